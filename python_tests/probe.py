"""An engine opened for the auditor: hand-made tickets, the integer sum of each release, what noise was asked for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels.clipping import GRID
from dp_bitfit_kernels.sampling import Ticket


class Keep(torch.optim.Optimizer):
    """Changes nothing and keeps the releases that it is handed, one flat [P] vector a step."""

    def __init__(self, params: Any):
        super().__init__(params, {})
        self.releases: list[Tensor] = []

    def step(self, closure: Any = None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        assert all(g is not None for g in grads)
        self.releases.append(torch.cat([g.flatten().clone() for g in grads]))


@dataclasses.dataclass
class NoiseCall:
    """What one release asked of ``noisy_sum_``."""

    total: Tensor  # [P] int64, before the noise
    key: Tensor
    step: int
    stream: int
    first: int
    noise_std: float
    scale: float


class Probe:
    """A private model whose draws are opened by hand. ``calls`` lists what each release was made of."""

    def __init__(
        self,
        model: nn.Module,
        *,
        bound: float = 1.0,
        sigma: float = 0.0,
        expected: float = 4.0,
        seed: int | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] = Keep,
        head: tuple[str, ...] = (),
        **options: Any,
    ):
        if not any(isinstance(m, dpk.layers.BiasLayer) for m in model.modules()):
            dpk.convert_model(model, train_modules=head)
        self.engine = dpk.PrivacyEngine(unsafe_deterministic_seed=seed)
        self.inner = optimizer([p for p in model.parameters() if p.requires_grad])
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=model,
            optimizer=self.inner,
            data_loader=DataLoader(TensorDataset(torch.zeros(8)), batch_size=4),
            noise_multiplier=sigma,
            max_grad_norm=bound,
            expected_batch_size=expected,
            **options,
        )
        self.session = self.engine._session
        self.ledger = self.session.ledger
        self.calls: list[NoiseCall] = []
        real = self.ledger.backend.noisy_sum_

        def spy(release, total, key, step, stream, first, noise_std, scale):
            self.calls.append(NoiseCall(total.clone(), key, int(step), stream, first, noise_std, scale))
            real(release, total, key, step, stream, first, noise_std, scale)

        self.ledger.backend = dataclasses.replace(self.ledger.backend, noisy_sum_=spy)
        self._draw = 1000

    def part(self, batch: Any, loss: Callable[[Any], Tensor], mask: Tensor | None, part: int, parts: int) -> bool:
        size = len(batch) if isinstance(batch, Tensor) else len(batch[0])
        self.session.on_ticket(Ticket(self._draw, part, parts, size, mask))
        value = self.model(batch) if isinstance(batch, Tensor) else self.model(*batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loss(value).backward()
        return self.optimizer.step()

    def step(self, x: Tensor, loss: Callable[[Any], Tensor], mask: Tensor | None = None) -> Tensor:
        """One draw of one physical batch. -> its integer sum [P]"""
        self._draw, before = self._draw + 1, len(self.calls)
        assert self.part(x, loss, mask, 0, 1) is True
        return torch.cat([call.total for call in self.calls[before:]])  # each weight without rows has a call of its own

    def split(self, xs: list[Tensor], losses: list[Callable[[Any], Tensor]]) -> Tensor:
        """One draw over several physical batches. -> its integer sum [P]"""
        self._draw += 1
        for i, (x, loss) in enumerate(zip(xs, losses, strict=True)):
            assert self.part(x, loss, None, i, len(xs)) is (i == len(xs) - 1)
        return self.calls[-1].total

    def noise(self, steps: int) -> Tensor:
        """Residuals [steps, P] of releases of fully masked batches, in units of sigma * R."""
        unit = self.session.noise_multiplier * self.ledger.plan.sensitivity / self.session.expected_batch_size
        return torch.stack([r.double() / unit for r in self.inner.releases[-steps:]])

    @property
    def names(self) -> list[str]:
        return [e.name for e in self.ledger.entries]


def integer_norm(total: Tensor) -> float:
    """Norm of an int64 vector; exact below 2^26 elements of 2^20, for every partial sum of squares fits float64."""
    return float(total.double().square().sum().sqrt())


def without(size: int, row: int) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[row] = False
    return mask


SCALES = (1e-8, 1e-3, 1.0, 1e3, 1e8)


class Twice(nn.Module):
    """One layer run twice, a bias tied to it, a layer never run."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(2, 2)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.reentrant = nn.Linear(5, 5), reentrant
        self.block = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.LayerNorm(5))

    def forward(self, x):
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)


def transposed_linear():
    from transformers.pytorch_utils import Conv1D  # a slow import, for this kind alone

    return Conv1D(4, 5)


class Autocast(nn.Module):
    """The forward under autocast, the backward outside."""

    def __init__(self, inner, dtype):
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype):
            return self.inner(x)


def whole_head():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


# model, shape of one sample with T positions, dimension of the output that holds the positions. Where the model is one
# layer, the gradient of its bias is the sum over positions of what the loss multiplies its output by.
KINDS = {
    "linear_2d": (lambda: nn.Linear(5, 4), lambda t: (5,), None),
    "linear_3d": (lambda: nn.Linear(5, 4), lambda t: (t, 5), 1),
    "linear_4d": (lambda: nn.Linear(5, 4), lambda t: (1, t, 5), 2),
    "linear_5d": (lambda: nn.Linear(5, 4), lambda t: (t, 1, 1, 5), 1),
    "conv1d": (lambda: nn.Conv1d(3, 4, 1), lambda t: (3, t), 2),
    "conv2d": (lambda: nn.Conv2d(3, 4, 1), lambda t: (3, 1, t), 3),
    "conv3d": (lambda: nn.Conv3d(2, 3, 1), lambda t: (2, t, 1, 1), 2),
    "layernorm": (lambda: nn.LayerNorm(6), lambda t: (t, 6), 1),
    "groupnorm": (lambda: nn.GroupNorm(2, 6), lambda t: (6, t), 2),
    "batchnorm1d": (lambda: nn.BatchNorm1d(6), lambda t: (6, t), 2),
    "batchnorm2d": (lambda: nn.BatchNorm2d(6), lambda t: (6, 1, t), 3),
    "batchnorm3d": (lambda: nn.BatchNorm3d(4), lambda t: (4, 1, 1, t), 4),
    "transformers_conv1d": (transposed_linear, lambda t: (t, 5), 1),
    "whole_head": (whole_head, lambda t: (t, 5), 1),
    "twice": (Twice, lambda t: (t, 5), 1),
    "checkpointed": (lambda: Checkpointed(False), lambda t: (t, 5), 1),
    "checkpointed_reentrant": (lambda: Checkpointed(True), lambda t: (t, 5), 1),
}
COMPOSITE = ("whole_head", "twice", "checkpointed", "checkpointed_reentrant")
DTYPES = {
    "float32": (torch.float32, None),
    "model_bf16": (torch.bfloat16, None),
    "autocast_bf16": (torch.float32, torch.bfloat16),
    "autocast_fp16": (torch.float32, torch.float16),
}


def build(kind, t, dtype="float32", size=4, **options):
    """(probe, x [size, ...], positions): the probe's model in the dtype, autocast inside its forward."""
    make, shape, positions = KINDS[kind]
    torch.manual_seed(3)
    model, x = make(), torch.randn(size, *shape(t))
    parameters, autocast = DTYPES[dtype]
    model = model.to(parameters)
    if autocast is not None:
        model = Autocast(model, autocast)
    head = ("*2",) if kind == "whole_head" else ()
    options.setdefault("loss_reduction", "sum")
    return Probe(model, head=head, **options), x.to(parameters), positions


def directions(out, positions, opposed):
    """What the loss multiplies the output by: all ones, or signs that cancel over positions, or over samples."""
    w = torch.ones(out.shape)
    if opposed:
        dim = positions if positions is not None and out.shape[positions] > 1 else 0
        signs = (-1.0) ** torch.arange(out.shape[dim])
        w = w * signs.view([-1 if d == dim else 1 for d in range(out.dim())])
    return w


def loss_of(x, positions, scale, opposed=False, mean=False):
    def loss(out):
        value = (scale * directions(out, positions, opposed) * out.float()).sum()
        return value / len(x) if mean else value

    return loss


def clipped(probe, row, scale=1.0):
    """What the row [P] of the last step should have added, before rounding, by its own float64 arithmetic."""
    row = probe.ledger._slab.rows[row].double() * scale
    plan = probe.ledger.plan
    out = torch.zeros_like(row)
    for group, (start, stop) in enumerate(pairwise(plan.offsets)):
        part, bound = row[start:stop], plan.bounds[group]
        norm = float(part.norm())
        if plan.gamma is not None:
            factor = 1 / (norm + plan.gamma)
        elif plan.factor_fn is not None:
            factor = min(float(plan.factor_fn(torch.tensor([norm]).double())), bound / max(norm, 1e-300)) / bound
        else:
            factor = 1 / max(norm, bound)
        out[start:stop] = part * factor * plan.grid[group]
    return out if row.isfinite().all() else torch.zeros_like(row)


def leave_one_out(probe, x, loss, row, scale=1.0):
    """The integer difference that one record makes; checked against the bound and against its own clipped row."""
    whole = probe.step(x, loss)
    want = clipped(probe, row, scale)
    difference = whole - probe.step(x, loss, without(len(x), row))
    assert int((difference**2).sum()) <= GRID**2  # in integers: no tolerance
    assert (difference - want).abs().max() <= 0.5 + 1e-3
    return difference
