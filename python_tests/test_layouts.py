"""Where layers hold the samples: proven, whatever the layout, or refused. check_model is the judge, and is judged."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import SequenceFirst, attach, private
from layouts import LAYOUTS, WIDTH, FlatTokens, WindowMajor, Windows
from oracle import rows as oracle_rows
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import arrangement, layers
from dp_bitfit_kernels._validate import BatchLayoutError, EngineError

BOUND = 10.0  # of no gradient here
ATOL = BOUND / 2**19  # of the grid that rows are rounded to, a few rows


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return loss_of(model(x))


def loss_of(y: Tensor) -> Tensor:
    weights = torch.linspace(-1.0, 1.0, y[0].numel(), dtype=y.dtype).view(y.shape[1:])
    return (y * weights).flatten(1).sum(1).sin().mean()


def converted(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    make, shape = LAYOUTS[name]
    torch.manual_seed(0)
    return dpk.convert_model(make(), **options), torch.randn(4, *shape)


@pytest.mark.parametrize("memory", ["exact", "off"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_those_of_the_samples(name: str, memory: str) -> None:
    model, x = converted(name, memory=memory)
    check = dpk.check_model(model, x, loss)
    assert check.worst < 1e-6
    assert check.silent == ()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    want = oracle_rows(model, names, x, loss_of)
    torch.testing.assert_close(released_rows(model, x), want, rtol=1e-4, atol=ATOL)


def released_rows(model: nn.Module, x: Tensor) -> Tensor:
    """What each sample adds to a release [B, P], from releases of one sample masked in at a time."""
    from probe import Probe

    probe = Probe(model, bound=BOUND, expected=1.0, loss_reduction="mean")
    only = torch.eye(len(x), dtype=torch.bool)
    for mask in only:
        probe.step(x, loss_of, mask)
    return torch.stack([release.double() for release in probe.inner.releases])


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_proven_holds_for_other_batch_sizes(name: str) -> None:
    from probe import Probe

    model, x = converted(name)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    want = oracle_rows(model, names, x, loss_of)
    probe = Probe(model, bound=BOUND, expected=1.0)
    for size in (4, 1, 3, 2):
        probe.step(x[:size], loss_of)
        torch.testing.assert_close(probe.inner.releases[-1].double(), want[:size].sum(0), rtol=1e-4, atol=ATOL)


def test_a_length_that_rows_follow_may_change_and_no_other_number_may() -> None:
    model, x = converted("flat tokens")
    dpk.check_model(model, x, loss)
    follower = model.up.arrangement
    assert follower.folds == {5}
    assert follower.follows == {(0, 1)}
    assert follower.holds((4 * 7, 8), 4, [(4, 7, WIDTH)])
    assert not follower.holds((4 * 7, 8), 4, [(4, 9, WIDTH)])  # packed: 28 of 36 tokens
    assert not follower.holds((4 * 7 + 1, 8), 4, [(4, 7, WIDTH)])
    assert not follower.holds((4 * 7, 8), 4, [])


class Packed(nn.Module):
    """Tokens that are not padding, of all samples, in one dimension (flash attention without padding)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]; a token that starts with 0 is padding
        real = x[..., 0] != 0
        out = x.new_zeros(*x.shape[:2], 3)
        out[real] = torch.tanh(self.inner(x[real]))
        return out.mean(1)


def test_packed_tokens_are_refused_even_where_the_numbers_fit() -> None:
    full = torch.randn(4, 6, WIDTH)
    torch.manual_seed(0)
    model = dpk.convert_model(Packed())
    dpk.check_model(model, full, loss)  # nothing is padded: six rows each
    padded = full.clone()
    padded[0, 2:, 0] = padded[1, 2:, 0] = 0.0  # 2 + 2 + 6 + 6 = 4 * 4 tokens
    _, model, optimizer, _ = private(Packed(), n=4, dims=(6, WIDTH), poisson_sampling=False)
    for _ in range(2):  # the first two batches are asked for their layout anyway, the third is not
        loss(model, full).backward()
        optimizer.step()
    with pytest.raises(BatchLayoutError, match="'inner'"):
        loss(model, padded).backward()


def test_a_table_whose_size_fits_is_no_batch() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("grid", torch.randn(20, WIDTH))  # 20 = 4 * 5 = 5 * 4
            self.positions = nn.Linear(WIDTH, 3)
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) * self.positions(self.grid).mean(0)

    x = torch.randn(4, WIDTH)
    with pytest.raises(BatchLayoutError, match="positions"):
        dpk.check_model(dpk.convert_model(Table()), x, loss)
    around = dpk.convert_model(Table(), sample_batch=x)
    assert dpk.conversion_report(around).one_by_one == {"": "Table"}
    assert dpk.check_model(around, x, loss).worst < 1e-6


def test_a_layer_chosen_by_a_batch_mate_is_refused() -> None:
    class Chosen(nn.Module):
        """Two layers of the same values: no output tells which of them ran."""

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(WIDTH, 3)
            self.other = nn.Linear(WIDTH, 3)
            self.other.load_state_dict(self.one.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return (self.one if bool(x[-1, 0] > 0) else self.other)(x)

    x = torch.randn(4, WIDTH)
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    with pytest.raises(BatchLayoutError, match="called or not by what the samples hold"):
        dpk.check_model(dpk.convert_model(Chosen()), x, loss)


def test_the_shape_alone_proves_nothing() -> None:
    # All samples alike, so that nothing can be told apart: only plain rows are taken.
    model, x = converted("windows")
    alike = torch.zeros_like(x[:1], dtype=torch.bool).expand(4, -1, -1, -1)

    class Flagged(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, flags: Tensor) -> Tensor:
            return self.inner(flags.float())

    with pytest.raises(BatchLayoutError, match=r"'inner\.norm'"):
        dpk.check_model(dpk.convert_model(Flagged(Windows())), alike, loss)


def test_compiled_after_one_eager_forward() -> None:
    model, x = converted("windows")
    dpk.check_model(model, x, loss)
    want = released_rows(model, x)
    torch._dynamo.reset()
    fresh, _ = converted("windows")
    dpk.check_model(fresh, x, loss)
    engine, fresh, optimizer, _ = attach(fresh, torch.randn(4, 1), poisson_sampling=False)
    compiled = torch.compile(fresh, fullgraph=True, backend="aot_eager")
    with engine.batch(4):
        loss(compiled, x).backward()
    slab = fresh.norm.attachment._slab
    torch.testing.assert_close(4.0 * slab.rows.double(), want, rtol=1e-4, atol=ATOL)
    optimizer.step()


def test_compiled_with_no_eager_forward_is_refused_and_then_works() -> None:
    torch._dynamo.reset()
    engine, model, optimizer, _ = private(SequenceFirst(), n=4, dims=(4, 6), poisson_sampling=False)
    x = torch.randn(4, 4, 6)  # T = B
    with engine.batch(4):
        loss(torch.compile(model, fullgraph=True, backend="aot_eager"), x).backward()
    with pytest.raises(BatchLayoutError, match="compile the model again"):
        optimizer.step()
    torch._dynamo.reset()
    with engine.batch(4):
        loss(torch.compile(model, fullgraph=True, backend="aot_eager"), x).backward()
    assert optimizer.step()


@pytest.mark.parametrize("kind", [arrangement.MAJOR, arrangement.INNER, arrangement.SECOND])
def test_by_sample_puts_each_row_to_its_sample(kind: str) -> None:
    batch, k, width = 3, 4, 5
    samples = torch.randn(batch, k, width)
    held = {
        arrangement.MAJOR: samples.reshape(-1, width),
        arrangement.INNER: samples.transpose(0, 1).reshape(-1, width),
        arrangement.SECOND: samples.transpose(0, 1).contiguous(),
    }[kind]
    assert torch.equal(arrangement.by_sample(held, kind, batch), samples)
    if kind != arrangement.SECOND:
        torch.testing.assert_close(arrangement.fold(held, kind, batch), samples.sum(1))


class TestCheckModel:
    def test_leaves_no_trace(self) -> None:
        model = dpk.convert_model(FlatTokens()).train()
        model.up.bias.grad = torch.ones(8)
        state = torch.get_rng_state()
        x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
        check = dpk.check_model(model, x, loss)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert torch.equal(model.up.bias.grad, torch.ones(8))
        assert model.up.attachment is None
        assert not model.up.trained_before
        assert "agree" in str(check)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_the_reduction_is_asked(self, reduction: str) -> None:
        model = dpk.convert_model(FlatTokens())
        x = torch.randn(3, 5, WIDTH)
        with pytest.raises(BatchLayoutError, match=f"is not the {reduction} of"):
            factor = 3.0 if reduction == "mean" else 1 / 3.0
            dpk.check_model(model, x, lambda m, b: factor ** (len(b) == 3) * loss(m, b), loss_reduction=reduction)

    def test_contrastive_loss_is_refused(self) -> None:
        model = dpk.convert_model(nn.Linear(WIDTH, 4))

        def contrastive(m: nn.Module, x: Tensor) -> Tensor:
            y = F.normalize(m(x), dim=1)
            return F.cross_entropy(y @ y.T, torch.arange(len(x)))

        with pytest.raises(BatchLayoutError, match="depends on the others"):
            dpk.check_model(model, torch.randn(4, WIDTH), contrastive)

    def test_token_mean_over_the_batch_is_refused(self) -> None:
        model = dpk.convert_model(nn.Linear(WIDTH, 4))
        labels = torch.tensor([[1, 2, -100], [3, -100, -100], [0, 1, 2]])
        batch = {"x": torch.randn(3, 3, WIDTH), "labels": labels}

        def token_mean(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(m(b["x"]).flatten(0, 1), b["labels"].flatten())

        with pytest.raises(BatchLayoutError, match="average"):
            dpk.check_model(model, batch, token_mean)

    def test_mixing_inside_the_model_is_refused_by_name(self) -> None:
        class Mixing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                y = self.first(x)
                return self.second(torch.tanh(y - y.mean(0)))

        with pytest.raises(BatchLayoutError, match="'second'"):
            dpk.check_model(dpk.convert_model(Mixing()), torch.randn(4, WIDTH), loss)

    def test_padding_that_matters_is_refused(self) -> None:
        class Pool(nn.Module):
            def __init__(self, masked: bool) -> None:
                super().__init__()
                self.masked, self.inner = masked, nn.Linear(WIDTH, 3)

            def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
                y = torch.tanh(self.inner(x))
                if not self.masked:
                    return y.mean(1)
                weights = attention_mask.float().unsqueeze(-1)
                return (y * weights).sum(1) / weights.sum(1)

        mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
        batch = {"x": torch.randn(3, 3, WIDTH), "attention_mask": mask}

        def of(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
            return loss_of(m(**b))

        check = dpk.check_model(dpk.convert_model(Pool(True)), batch, of)
        assert check.padding is not None
        assert check.padding < 1e-5
        with pytest.raises(BatchLayoutError, match="padding matters"):
            dpk.check_model(dpk.convert_model(Pool(False)), batch, of)

    def test_parameters_that_are_read_past_their_layer_are_named(self) -> None:
        class Past(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(WIDTH, 3)

            def forward(self, x: Tensor) -> Tensor:
                return torch.tanh(F.linear(x, self.inner.weight, self.inner.bias))

        x = torch.randn(4, WIDTH)
        with pytest.raises(BatchLayoutError, match=r"'inner\.bias'(.|\n)*sample_batch"):
            dpk.check_model(dpk.convert_model(Past()), x, loss)
        model = dpk.convert_model(Past(), sample_batch=x)
        assert dpk.conversion_report(model).one_by_one == {"": "Past"}
        assert dpk.check_model(model, x, loss).worst < 1e-6

    def test_bad_arguments(self) -> None:
        model = dpk.convert_model(nn.Linear(WIDTH, 3))
        with pytest.raises(EngineError, match="at least 2"):
            dpk.check_model(model, torch.randn(1, WIDTH), loss)
        with pytest.raises(EngineError, match="no loss"):
            dpk.check_model(model, torch.randn(4, WIDTH))
        with pytest.raises(EngineError, match="scalar"):
            dpk.check_model(model, torch.randn(4, WIDTH), lambda m, x: m(x))
        with pytest.raises(EngineError, match="no trained parameter leads to this loss"):
            dpk.check_model(model, torch.randn(4, WIDTH), lambda m, x: m(x).detach().mean())
        with pytest.raises(EngineError, match="loss_reduction"):
            dpk.check_model(model, torch.randn(4, WIDTH), loss, loss_reduction="max")
        with pytest.raises(dpk.UnsupportedModuleError, match="convert_model"):
            dpk.check_model(nn.Linear(WIDTH, 3).requires_grad_(False), torch.randn(4, WIDTH), loss)


def test_layers_know_their_arrangement_only_from_a_proof() -> None:
    model, x = converted("windows")
    assert all(m.arrangement is arrangement.PLAIN for m in model.modules() if isinstance(m, layers.BiasLayer))
    dpk.check_model(model, x, loss)
    assert model.norm.arrangement.folds == {4}
    dpk.restore_model(model)
    assert "arrangement" not in model.norm.__dict__


@pytest.mark.parametrize("place", [1, 2, 3])
def test_mixing_through_one_input_alone_is_seen(place: int) -> None:
    """Divides by what the masks of the batch hold: rows 0 and 1 may agree in it."""

    class ByMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.inner(x) / mask.sum()

    torch.manual_seed(0)
    mask = torch.ones(4, 5)
    mask[place, 2:] = 0.0
    batch = {"x": torch.randn(4, WIDTH), "mask": mask}
    from attach import attach

    _, model, _, _ = attach(dpk.convert_model(ByMask()), torch.randn(4, 1), poisson_sampling=False)
    with pytest.raises(BatchLayoutError, match="changes with another"):
        model(**batch)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38, 1e12])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sample_that_is_not_finite_hides_no_layout(name: str, place: int, value: float) -> None:
    """Wherever it is among the samples, and where it overflows within the model only: the rows of others are theirs."""
    model, x = converted(name)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    want = oracle_rows(model, names, x, loss_of)
    spoilt = x.clone()
    spoilt[place].view(-1)[WIDTH // 2] = value
    found = released_rows(model, spoilt)
    others = [i for i in range(len(x)) if i != place]
    torch.testing.assert_close(found[others], want[others], rtol=1e-4, atol=ATOL)
    assert float(found[place].norm()) <= BOUND
    if math.isnan(value):  # tanh makes a number of an infinity
        assert not found[place].any()


@pytest.mark.parametrize("make, kind", [(WindowMajor, "inner"), (FlatTokens, "major"), (SequenceFirst, "second")])
def test_no_choice_of_odd_tokens_makes_another_layout(make: type[nn.Module], kind: str) -> None:
    """Two samples of two tokens, each of which may be a NaN: what is no number must not pass for what it should be."""
    from probe import Probe

    torch.manual_seed(0)
    for odd in itertools.product((False, True), repeat=4):
        width = 6 if make is SequenceFirst else WIDTH
        model, x = dpk.convert_model(make()), torch.randn(2, 2, width)
        x[torch.tensor(odd).view(2, 2)] = math.nan
        probe = Probe(model, bound=BOUND, expected=1.0)
        if torch.tensor(odd).view(2, 2).any(1).all():  # no sample is left to ask
            with pytest.raises(BatchLayoutError, match="no sample of this batch gives finite numbers"):
                probe.step(x, loss_of)
            continue
        probe.step(x, loss_of)
        inner = next(m for m in model.modules() if isinstance(m, layers.BiasLayer))
        assert inner.arrangement.kind == kind and (kind != "major" or inner.arrangement.folds == {2}), odd


def test_a_sample_that_overflows_within_the_model_hides_nothing() -> None:
    """Its input is an ordinary number; what the layer is given is not."""
    from probe import Probe

    class Grown(WindowMajor):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((40.0 * x).exp())

    for odd in itertools.product((False, True), repeat=6):
        large = torch.tensor(odd).view(3, 2)  # samples, tokens
        if large.any(1).all():
            continue
        torch.manual_seed(0)
        model, x = dpk.convert_model(Grown()), 0.01 * torch.randn(3, 2, WIDTH)
        x[large] = 3.0
        Probe(model, bound=BOUND, expected=1.0).step(x, loss_of)
        assert model.inner.arrangement.kind == "inner", odd


def test_a_batch_without_numbers_goes_by_what_was_proven() -> None:
    from probe import Probe

    torch.manual_seed(0)
    model, x = dpk.convert_model(SequenceFirst()), torch.randn(3, 4, 6)
    probe = Probe(model, bound=BOUND, expected=1.0)
    assert probe.step(x, loss_of).any()
    assert not probe.step(torch.full_like(x, math.nan), loss_of).any()  # the second batch is asked again
    assert model.inner.arrangement.kind == "second"


def test_a_batch_without_numbers_proves_nothing_of_others() -> None:
    """Leading sizes that follow the batch are taken for that batch alone; it is asked again."""
    from probe import Probe

    torch.manual_seed(0)
    model = dpk.convert_model(nn.Sequential(nn.Linear(6, 3), nn.Tanh()))
    probe = Probe(model, bound=BOUND, expected=1.0)
    proofs = probe.session.proofs
    assert not probe.step(torch.full((3, 6), math.nan), loss_of).any() and not proofs.settled
    assert probe.step(torch.randn(3, 6), loss_of).any() and proofs.settled
