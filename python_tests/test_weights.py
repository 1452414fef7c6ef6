"""Trained weights: every way of taking norms and sums gives one step of the oracle."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import oracle
import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat, names_of
from probe import Probe
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from weight_cases import CASES, METHODS, NORMS, Twice, WeightCase

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels.clipping import GRID


def full(case: WeightCase, x: Tensor, bound: float, **options: object):  # type: ignore[no-untyped-def]
    """A private model of which everything is trained, on these samples, without noise."""
    model = dpk.convert_model(case.model(), train_modules=("*",), memory=case.memory)
    y = torch.arange(len(x)) % 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="clipped_sum='second_backward'")
        return attach(model, x, y, bound=bound, sample_rate=1.0, **options)


def rows_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[B, P] float64, of the oracle."""
    names = names_of(model)
    one = [
        oracle.rows(model, names, x[i : i + 1], lambda o, i=i: F.cross_entropy(o, y[i : i + 1])) for i in range(len(x))
    ]
    return torch.cat(one)


def step(model: nn.Module, optimizer: object, loader: object) -> tuple[Tensor, Tensor, Tensor]:
    """The update times E[B] = the released sum, [P] float64, and the batch."""
    ((x, y),) = list(loader)  # type: ignore[call-overload]
    before = flat(model)
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.step() is True  # type: ignore[attr-defined]
    return (before - flat(model)).double() * len(x), x, y


def assert_sum(got: Tensor, rows: Tensor, bound: float) -> None:
    """``got`` [P] is the clipped sum of ``rows`` [B, P], but for one grid cell a sample and element, for float32
    parameters, and for what clipping by an upper bound of the norm costs: up to a thousandth of each sample's part."""
    room = 1e-3 * oracle.clipped_sum(rows.abs(), bound) + len(rows) * bound / GRID + 2e-6
    assert ((got - oracle.clipped_sum(rows, bound)).abs() <= room).all()


@pytest.mark.parametrize("norm, total", METHODS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bound", [0.05, 2.0])
def test_a_step_equals_the_oracle(case, norm, total, bound, no_rows):
    engine, model, optimizer, loader = full(case, case.batch(), bound, per_sample_norm=norm, clipped_sum=total)
    rows = rows_of(model, *next(iter(DataLoaderOnce(loader))))
    got, _, _ = step(model, optimizer, loader)
    assert engine._session.ledger.sunk or norm == "instantiate"  # whose linear layers have rows
    assert_sum(got, rows, bound)


class DataLoaderOnce:
    """The batch that a loader will give at sample rate 1, without taking it."""

    def __init__(self, loader: object) -> None:
        self.tensors = loader.dataset.tensors  # type: ignore[attr-defined]

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield self.tensors


@pytest.mark.parametrize("clipping, gamma", [("automatic", 0.01), ("per_layer", None)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["twice", "conv2d", "tied"])
def test_other_clippings(name, norm, clipping, gamma, no_rows):
    case = CASES[name]
    _, model, optimizer, loader = full(case, case.batch(), 0.1, per_sample_norm=norm, clipping=clipping)
    rows = rows_of(model, *next(iter(DataLoaderOnce(loader))))
    sizes = [(n.rpartition(".")[0], p.numel()) for n, p in model.named_parameters() if p.requires_grad]
    got, _, _ = step(model, optimizer, loader)
    if gamma is not None:
        want = oracle.clipped_sum(rows, 0.1, gamma)
    else:
        layers = list(dict.fromkeys(layer for layer, _ in sizes))
        parts = torch.split(rows, [sum(n for own, n in sizes if own == layer) for layer in layers], 1)
        want = torch.cat([oracle.clipped_sum(part, 0.1 / len(layers) ** 0.5) for part in parts])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("norm, total", METHODS)
@pytest.mark.parametrize("name", ["linear of tokens", "tied", "conv2d", "self-attention", "positions", "norms"])
def test_a_bad_sample_changes_nothing(name, norm, total, no_rows):
    case = CASES[name]
    x = case.batch()
    releases = []
    for weight in (1.0, float("nan")):  # of the last sample's loss; left out in the first run
        engine, model, optimizer, _ = full(case, x, 0.1, per_sample_norm=norm, clipped_sum=total)
        before = flat(model)
        with engine.batch(len(x)):
            losses = F.cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="none")
            scale = torch.ones(len(x)).index_fill(0, torch.tensor([len(x) - 1]), weight if weight != 1.0 else 0.0)
            (losses * scale).mean().backward()
            optimizer.step()
        releases.append(before - flat(model))
    assert releases[0].isfinite().all() and releases[0].any()
    torch.testing.assert_close(releases[1], releases[0], rtol=0, atol=2e-7)


@pytest.mark.parametrize("norm, total", METHODS)
@pytest.mark.parametrize("name", ["linear of tokens", "twice", "conv2d", "conv transpose 2d", "self-attention"])
def test_a_sample_that_is_not_a_number_changes_nothing(name, norm, total, no_rows):
    """Its activations are NaN, too, and multiply whatever gradient comes."""
    case, releases = CASES[name], []
    for bad in (False, True):
        x = case.batch()
        engine, model, optimizer, _ = full(case, x, 0.1, per_sample_norm=norm, clipped_sum=total)
        before = flat(model)
        with engine.batch(len(x)):
            x[-1] = float("nan") if bad else x[-1]
            losses = F.cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="none")
            (losses if bad else losses * torch.tensor([1.0] * 5 + [0.0])).mean().backward()
            optimizer.step()
        releases.append(before - flat(model))
    assert releases[0].isfinite().all() and releases[0].any()
    torch.testing.assert_close(releases[1], releases[0], rtol=0, atol=2e-7)


@pytest.mark.parametrize("norm, total", METHODS)
def test_step_after_step(norm, total, no_rows):
    """Two steps are those of the oracle; a forward without gradients between them is nothing to it."""
    case = CASES["conv2d"]
    x, y = case.batch(), torch.arange(6) % 3
    engine, model, optimizer, _ = full(case, x, 0.1, per_sample_norm=norm, clipped_sum=total)
    for _ in range(2):
        rows, before = rows_of(model, x, y), flat(model)
        with engine.batch(6):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            model(x[:2])
        got = (before - flat(model)).double() * 6
        assert_sum(got, rows, 0.1)


def test_gradients_without_an_engine_are_those_of_autograd():
    for case in CASES.values():
        x, y = case.batch(), torch.arange(6) % 3
        plain = case.model()
        converted = dpk.convert_model(copy.deepcopy(plain), train_modules=("*",), memory=case.memory)
        for module in plain.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for model in (plain, converted):
            F.cross_entropy(model(x), y).backward()
        for (name, a), b in zip(plain.named_parameters(), converted.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None, (case.name, name)
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=f"{case.name} {name}")


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.reentrant = nn.Linear(6, 6), Twice(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("norm, total", METHODS)
def test_checkpointed_blocks(reentrant, norm, total, no_rows):
    case = WeightCase("checkpointed", "computed again in the backward", lambda: Checkpointed(reentrant))
    _, model, optimizer, loader = full(case, case.batch(), 0.1, per_sample_norm=norm, clipped_sum=total)
    plain = dpk.restore_model(copy.deepcopy(model))
    plain.reentrant = False  # type: ignore[assignment]
    rows = rows_of(plain, *next(iter(DataLoaderOnce(loader))))
    got, _, _ = step(model, optimizer, loader)
    assert_sum(got, rows, 0.1)


@pytest.mark.parametrize("norm", NORMS)
def test_parts_of_a_draw_add_up(norm, no_rows):
    case, releases = CASES["tied"], []
    for physical in (None, 1, 4):
        _, model, optimizer, loader = full(
            case, case.batch(), 0.1, per_sample_norm=norm, max_physical_batch_size=physical
        )
        before = flat(model)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        releases.append(before - flat(model))
    for other in releases[1:]:  # a row made in another batch may differ in its last bits
        torch.testing.assert_close(other, releases[0], rtol=0, atol=3e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_several_backwards_add_up_and_zero_grad_forgets(norm, no_rows):
    case = CASES["twice"]
    x, y = case.batch(), torch.arange(6) % 3
    releases = []
    for parts in (1, 2):
        engine, model, optimizer, _ = full(case, x, 0.1, per_sample_norm=norm)
        before = flat(model)
        with engine.batch(6):
            F.cross_entropy(model(x), y).backward()
            optimizer.zero_grad()  # nothing of this stays
            out = model(x)
            for _ in range(parts):
                (F.cross_entropy(out, y) / parts).backward(retain_graph=True)
            optimizer.step()
        releases.append(before - flat(model))
    torch.testing.assert_close(releases[1], releases[0], rtol=1e-4, atol=1e-6)


def test_a_graph_of_an_earlier_batch_adds_nothing(no_rows):
    case = CASES["linear of tokens"]
    x, y = case.batch(), torch.arange(6) % 3
    engine, model, optimizer, _ = full(case, x, 0.1)
    with engine.batch(6):
        old = F.cross_entropy(model(x), y)
        old.backward(retain_graph=True)
        optimizer.step()
    before = flat(model)
    with engine.batch(6):
        new = model(x)
        old.backward()
        with pytest.raises(dpk.OptimizerError, match="nothing was backpropagated"):
            optimizer.step()
        del new
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["norms", "norms of images", "tied", "conv2d", "self-attention"])
def test_models_in_half_precision(name, dtype, no_rows):
    case, y = CASES[name], torch.arange(6) % 3
    x = case.batch() if case.tokens else case.batch().to(dtype)
    probe = Probe(case.model().to(dtype), head=("*",), bound=0.1)
    loss = lambda scores, y=y: F.cross_entropy(scores.float(), y)  # noqa: E731
    got = probe.step(x, loss).double() * 0.1 / GRID
    one = [oracle.rows(probe.model, probe.names, x[i : i + 1], partial(loss, y=y[i : i + 1])) for i in range(6)]
    want = oracle.clipped_sum(torch.cat(one), 0.1)
    assert (got - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("vocabulary", [9, 400])
@pytest.mark.parametrize("tied", [False, True])
def test_noise_leaves_the_row_of_padding(tied: bool, vocabulary: int) -> None:
    """It gets no gradient, so noise would be all that moves it; as a row of the head, too, it is trained."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(vocabulary, 64, padding_idx=3)
            self.head = nn.Linear(64, vocabulary, bias=False)
            if tied:
                self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(torch.tanh(self.table(ids)).mean(1))
            return out

    torch.manual_seed(0)
    model = dpk.convert_model(Padded(), **dpk.presets.full())
    probe = Probe(model, sigma=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    before = model.table.weight.detach().clone()
    probe.part(torch.randint(0, 9, (4, 5)), lambda y: y.square().flatten(1).sum(1).mean(), None, 0, 1)
    moved = (model.table.weight.detach() - before).abs().amax(1) > 0
    assert moved[torch.arange(vocabulary) != 3].all() and bool(moved[3]) == tied


def test_padding_counts_in_no_norm() -> None:
    """Nor does it take room from other tokens: a bound of the norm of the others' gradient leaves them as they are."""
    torch.manual_seed(0)
    model = dpk.convert_model(nn.Sequential(nn.Embedding(9, 4, padding_idx=3)), **dpk.presets.full())
    probe = Probe(model, bound=2.0)
    total = probe.step(torch.tensor([[3, 5, 3, 3]]), lambda y: y.sum()).view(9, 4)
    assert total[5].double().square().sum().sqrt() / GRID > 0.99 and not total[3].any()
