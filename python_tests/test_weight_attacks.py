"""Attacks on trained weights that once came through: each is right now, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from attach import flat
from torch import Tensor, nn
from weight_cases import NORMS, trained

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels.clipping import GRID

pytestmark = pytest.mark.usefixtures("no_rows")


def contribution(model: nn.Module, inputs: Tensor, left: Tensor, norm: str, bound: float, cast: object = None) -> float:
    """Norm of what one sample adds to the integer sum, over GRID; ``left`` is the gradient of the output."""
    engine, model, optimizer, _ = trained(model, inputs, bound=bound, per_sample_norm=norm)
    ledger, lengths = engine._session.ledger, []
    parts = ledger._parts

    def seen():  # type: ignore[no-untyped-def]
        own = list(parts())
        lengths.append(sum(int(v) ** 2 for _, total in own for v in total[total != 0].tolist()) ** 0.5)
        return iter(own)

    ledger._parts = seen
    with engine.batch(1):
        if cast is None:
            (model(inputs) * left).sum().backward()
            optimizer.step()
        else:
            with torch.autocast("cpu", cast):  # type: ignore[arg-type]
                (model(inputs).float() * left).sum().backward()
                optimizer.step()
    return lengths[0] / GRID


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype, size, terms", [(torch.float64, 1e40, 4), (torch.float32, 1e18, 2100)])
def test_rows_beyond_float32(norm, dtype, size, terms):
    """The norm of a row may be finite in float64 while the row is not in float32."""
    model = nn.Linear(8, 8, bias=False).to(dtype)
    inputs = torch.full((1, terms, 8), size if dtype == torch.float64 else 1e18, dtype=dtype)
    left = torch.ones(1, terms, 8, dtype=dtype) * (1.0 if dtype == torch.float64 else 1e18)
    assert contribution(model, inputs, left, norm, 1.0) == 0.0


class Halves(nn.Module):
    """One layer, called for each half of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.own(x[:, :4]), self.own(x[:, 4:])], 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8, bias=False), Halves], ids=["whole", "halves"])
def test_a_step_within_autocast(make, norm, cast):
    """Tokens share one large direction and cancel in it: a Gram in bfloat16 sees the direction alone."""
    left = torch.zeros(1, 8, 8)
    left[..., 0] = 1.0
    left[0, range(8), [1 + t % 7 for t in range(8)]] = 2**-5
    inputs = torch.zeros(1, 8, 8)
    inputs[..., 0] = torch.tensor([1.0, -1.0] * 4)
    assert contribution(make(), inputs, left, norm, 1e-3, cast) <= 1.0


@pytest.mark.parametrize("norm", NORMS)
def test_flushed_denormals(norm):
    torch.set_flush_denormal(True)
    try:
        share = contribution(
            nn.Linear(8, 8, bias=False), torch.ones(1, 1, 8), torch.full((1, 1, 8), 2e-20), norm, 1e-24
        )
    finally:
        torch.set_flush_denormal(False)
    assert share <= 1.0


class TiedConvolutions(nn.Module):
    """One weight in a grouped and in a plain convolution: its rows see different channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 1, groups=2, bias=False), nn.Conv2d(2, 6, 1, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x)[:, 3:], -self.b(x[:, 2:])[:, :3]], 1)


@pytest.mark.parametrize("norm", NORMS)
def test_ties_of_grouped_convolutions(norm):
    torch.manual_seed(0)
    x, left = torch.randn(1, 4, 3, 3), torch.randn(1, 3, 3, 3).repeat(1, 2, 1, 1)
    assert contribution(TiedConvolutions(), x, left, norm, 1e-3) <= 1.0


class Shares(nn.Module):
    """x [B, 3, 6]; what it does with a table [1, 3, 6] that is not adding each sample's copy to it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.table, self.head, self.how = nn.Parameter(torch.randn(1, 3, 6)), nn.Linear(6, 3), how

    def forward(self, x: Tensor) -> Tensor:
        if (self.how == "in training" and self.training) or self.how == "first":
            x = x + self.table[0]
        elif self.how == "mean":
            x = x + self.table.mean(0)
        elif self.how == "flip":
            x = x + self.table.expand(len(x), -1, -1).flip(0)
        elif self.how == "roll":
            x = x + self.table.expand(len(x), -1, -1).roll(2, 0)
        scores = self.head((x if self.how != "masked" else x + self.table[0]).mean(1))
        if self.how == "masked":
            scores = scores.masked_fill(torch.tensor([False, False, True]), torch.finfo(scores.dtype).min)
        return scores


@pytest.mark.parametrize("batch", [1, 2, 7, 8])
@pytest.mark.parametrize("how", ["in training", "first", "mean", "flip", "roll", "masked"])
def test_copies_that_reach_other_samples(how, batch):
    engine, model, _, _ = trained(Shares(how).train(), torch.randn(batch, 3, 6))
    with pytest.raises(dpk.BatchLayoutError, match="what the samples share"), engine.batch(batch):
        model(torch.randn(batch, 3, 6))


class Bare(nn.Module):
    """Positions without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        return self.head((x + self.positions(torch.arange(x.shape[1]))).tanh().mean(1))


@pytest.mark.parametrize("batches", [(4,), (5,), (6,), (4, 4, 5), (5, 4, 6)])
def test_tables_as_long_as_the_batch(batches):
    """T = 5 tokens: the table has as many rows as the batch, or as the batch that the proof runs."""
    torch.manual_seed(0)
    engine, model, optimizer, _ = trained(Bare(), torch.randn(6, 5, 6), bound=1e3)
    for batch in batches:
        x, y = torch.randn(batch, 5, 6), torch.arange(batch) % 3
        plain = dpk.restore_model(copy.deepcopy(model))
        F.cross_entropy(plain(x), y).backward()
        before = flat(model)
        with engine.batch(batch):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        want = torch.cat([p.grad.flatten() for p in plain.parameters()]) * batch / 6
        torch.testing.assert_close(before - flat(model), want, rtol=1e-2, atol=2e-3)


class Centred(nn.Module):
    """Scores less their mean over the batch, some of them masked, beside 40 that are scaled by ``beside``."""

    def __init__(self, masked: int, mask: float, beside: float) -> None:
        super().__init__()
        self.inner, self.others = nn.Linear(6, 4), nn.Linear(6, 40)
        self.masked, self.mask, self.beside = torch.arange(4) >= 4 - masked, mask, beside

    def forward(self, x: Tensor) -> Tensor:
        scores = self.inner(x)
        scores = (scores - scores.mean(0)).masked_fill(self.masked, self.mask)
        return torch.cat([scores, self.beside * self.others(x)], 1) if self.beside else scores


@pytest.mark.parametrize(
    "masked, mask, beside",
    [
        (0, 0.0, 0.0),
        (1, -1e9, 0.0),
        (3, -1e9, 0.0),  # most are
        (3, torch.finfo(torch.float32).min, 0.0),
        (1, -torch.inf, 0.0),
        (0, 0.0, 1e-6),  # most are so small that scores look like masks
        (1, -1e9, 1e-6),
    ],
)
def test_mixing_behind_masked_scores(masked, mask, beside):
    engine, model, _, _ = trained(Centred(masked, mask, beside), torch.randn(7, 6))
    with pytest.raises(dpk.BatchLayoutError, match="changes with another of the batch"), engine.batch(7):
        model(torch.randn(7, 6))


class Divides(nn.Module):
    def __init__(self, in_training: bool) -> None:
        super().__init__()
        self.inner, self.in_training = nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 3)), in_training

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / len(x) if self.training or not self.in_training else self.inner(x)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("in_training", [False, True])
def test_a_model_that_divides_by_the_batch(in_training, batch):
    engine, model, _, _ = trained(Divides(in_training).train(), torch.randn(batch, 6))
    with pytest.raises(dpk.BatchLayoutError, match="number of samples"), engine.batch(batch):
        model(torch.randn(batch, 6))


class Scaled(nn.Module):
    """By the largest of the whole batch, which one more copy of a sample does not move."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.first, self.last, self.by = nn.Linear(5, 6), nn.Linear(6, 4), by

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "largest input":
            return self.last(self.first(x / x.max()).tanh())
        hidden = self.first(x)
        if self.by == "largest activation":
            return self.last(hidden / hidden.abs().max())
        cell = hidden.detach().abs().max() / 7
        return self.last(hidden + ((hidden / cell).round() * cell - hidden).detach())


@pytest.mark.parametrize("batch", [2, 8, 64])
@pytest.mark.parametrize("by", ["largest input", "largest activation", "dynamic quantisation"])
def test_a_model_that_scales_by_the_largest_of_the_batch(by, batch):
    torch.manual_seed(1)
    x = torch.randn(batch, 5)
    engine, model, _, _ = trained(Scaled(by), x)
    with pytest.raises(dpk.BatchLayoutError, match="do not exist for such a model"), engine.batch(batch):
        model(x)


@pytest.mark.parametrize("kind", ["complex", "small", "large"])
def test_mixing_in_numbers_that_float32_does_not_hold(kind):
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.inner(x).double()
            z = z - z.mean(0)
            if kind == "complex":
                return torch.complex(z, -z)
            return z * (1e-50 if kind == "small" else 1e50)

    x = torch.randn(4, 6)
    engine, model, _, _ = trained(Mixes(), x)
    with pytest.raises(dpk.BatchLayoutError, match="do not exist for such a model"), engine.batch(4):
        model(x)


def test_random_numbers_are_not_taken_for_the_number_of_samples():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 40), nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.head(F.dropout(self.inner(x), 0.3, self.training)), 0.3, self.training)

    for batch in (1, 7):
        x = torch.randn(batch, 6)
        engine, model, optimizer, _ = trained(Noisy().train(), x)
        with engine.batch(batch):
            model(x).square().sum().backward()
            assert optimizer.step()


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_are_asked_for_are_not_the_weights(norm):
    """torch.autograd.grad of an input (adversarial examples, saliency) goes by the layers and leaves nothing there."""
    x, y, releases = torch.randn(6, 5, 6), torch.arange(6) % 3, []
    for asked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Flatten(), nn.Linear(35, 3))
        engine, model, optimizer, _ = trained(model, x, bound=1e3, per_sample_norm=norm)
        before, own = flat(model), x.clone().requires_grad_()
        with engine.batch(6):
            loss = F.cross_entropy(model(own), y)
            if asked:
                torch.autograd.grad(loss, own, retain_graph=True)
            loss.backward()
            optimizer.step()
        releases.append(before - flat(model))
    assert releases[0].any() and torch.equal(*releases)


@pytest.mark.parametrize("options", [(3, 1, 0, 1, 1, True, 2), (3, 2, 1, 1), (3, 2, 0, 1), (2, 3, 1, 2)])
@pytest.mark.parametrize("norm", NORMS)
def test_output_padding(options, norm):
    """Also beyond the stride, which is legal below the dilation; arguments of ConvTranspose2d from the kernel on."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.ConvTranspose2d(4, 5, *options), nn.Tanh(), nn.Flatten())
    x = torch.randn(3, 4, 5, 4)
    seed = torch.randn_like(plain(x))
    model = copy.deepcopy(plain)
    (plain(x) * seed).sum().backward()
    engine, model, optimizer, _ = trained(model, x, bound=1e4, per_sample_norm=norm, loss_reduction="sum")
    before = flat(model)
    with engine.batch(3):
        (model(x) * seed).sum().backward()
        optimizer.step()
    want = torch.cat([p.grad.flatten() for p in plain.parameters()]) / 3
    torch.testing.assert_close(before - flat(model), want, rtol=1e-2, atol=3e-2)


def test_weights_that_hooks_make():
    """torch.nn.utils.weight_norm makes the weight ahead of the layer's forward and keeps it as an attribute."""
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 7)), nn.Tanh(), nn.Linear(7, 3))
    engine, model, _, _ = trained(model, torch.randn(6, 6), bound=1e3)
    with pytest.raises(dpk.BatchLayoutError, match="keeps tensors as attributes"), engine.batch(6):
        model(torch.randn(6, 6))
