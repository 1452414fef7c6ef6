"""Inputs of the ops that keep little for backward (reference_backward.py), each with the reason why it is here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_bitfit_kernels import reference_backward

NAN, INF = float("nan"), float("inf")
KINDS = reference_backward.KINDS


@dataclass(frozen=True)
class BackwardCase:
    """Shape [B, R, C] of a gradient. A large one is left out where kernels are interpreted.

    every_dtype: run in every dtype, not in float32 alone.
    """

    batch: int
    length: int
    width: int
    reason: str
    large: bool = False
    every_dtype: bool = False

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.width}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.length, self.width

    def skip_where_interpreted(self) -> None:
        if self.large and os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("too large for the interpreter")


CASES = (
    BackwardCase(
        3, 5, 7, "nothing divides anything; a sample ends within a byte, the last byte has one bit", every_dtype=True
    ),
    BackwardCase(2, 4, 64, "whole vectors, whole bytes", every_dtype=True),
    BackwardCase(4, 1, 70, "2-D input of a linear layer"),
    BackwardCase(2, 70, 1, "one feature"),
    BackwardCase(2, 12, 49, "7 x 7 image: rows start within a byte"),
    BackwardCase(2, 34, 130, "tiles cut off both ways", every_dtype=True),
    BackwardCase(1, 700, 3, "more rows than one float32 chain may add"),
    BackwardCase(2, 2, 1100, "more columns than one tile or one float32 chain"),
    BackwardCase(1, 5000, 3, "long R: partial sums in stages", large=True),
    BackwardCase(1, 3, 5000, "long C: means and sums in stages", large=True),
    BackwardCase(2, 300, 130, "several chunks of rows", large=True, every_dtype=True),
    BackwardCase(0, 4, 8, "empty batch"),
    BackwardCase(2, 0, 8, "nothing to sum over dimension 1"),
    BackwardCase(2, 4, 0, "nothing to sum over dimension 2"),
)
MATES = BackwardCase(3, 19, 21, "samples start within a byte and off 16-byte addresses")
LONG_MATES = BackwardCase(3, 300, 43, "long enough to be cut", large=True)

COUNTS = (0, 1, 7, 8, 9, 63, 64, 65, 1001, 2056)  # elements of what is packed

# x of an activation: where its polynomials and exponentials begin and end, beside the grid from -12 to 12.
TAILS = (0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, 100.0, -100.0, 1.0, -1.0, 5.0, -5.0, 9.01, -9.01, 88.0, -88.0)

# low, high, slope
CLAMPS = {
    "relu": (0.0, NAN, 0.0),
    "relu6": (0.0, 6.0, 0.0),
    "hardtanh, no float32 limits": (-0.1, 0.1, 0.0),
    "leaky relu": (0.0, NAN, 0.01),
    "steep leaky relu": (0.0, NAN, 1.7),
    "upper limit only": (-INF, 1.0, 0.0),
}


def inside(values: Tensor, offset: int = 0) -> Tensor:
    """A contiguous copy, ``offset`` elements after an aligned address, among values that would show in a result."""
    odd = NAN if values.dtype.is_floating_point else 1 if values.dtype == torch.bool else 127
    buffer = torch.full((values.numel() + 64 + offset,), odd, dtype=values.dtype)
    view = buffer[32 + offset : 32 + offset + values.numel()].view(values.shape)
    view.copy_(values)
    return view


def activation_inputs(count: int, generator: torch.Generator) -> Tensor:
    """[count] float32: TAILS first where they fit, then from -12 to 12, half of them within one of 0."""
    x = torch.rand(count, generator=generator) * 24.0 - 12.0
    x[::2] /= 12.0
    if count > 2 * len(TAILS):
        x[: len(TAILS)] = torch.tensor(TAILS)
    return x


@dataclass(frozen=True)
class Data:
    """What the ops take, unpacked: one leading sample dimension, except for the last six."""

    grad: Tensor  # [B, R, C]
    x: Tensor  # [B, R, C] of an activation
    features: Tensor  # [B, R, C] of a norm
    small: Tensor  # [B, R, C] int8
    mask: Tensor  # [B, R, C] bool
    slopes: Tensor  # [B, R, C] int32: 24-bit codes
    codes: Tensor  # [B, R, C] int32: 0 to 7
    shift: Tensor  # [B, R] of layer norm, and so on
    scale: Tensor  # [B, R]
    rstd: Tensor  # [B, R]
    weight: Tensor  # [C]
    row_weight: Tensor  # [R]
    levels: Tensor  # [8]
    groups: int
    offset: int
    reduce: int

    def sample(self, i: int) -> Data:
        """The same with sample i alone."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for f in fields(self)[:10]:
            values[f.name] = values[f.name][i : i + 1]
        return Data(**values)

    def put(self, values: Tensor) -> Tensor:
        return inside(values, self.offset)

    def planes(self, codes: Tensor, count: int) -> Tensor:
        """Bit planes [count, ceil(n / 8)] of codes [n]."""
        bits = [reference_backward.pack_bits((codes >> bit & 1).bool()) for bit in range(count)]
        return self.put(torch.stack(bits))

    def slope_bytes(self) -> Tensor:
        """[3, n] uint8."""
        flat = self.slopes.reshape(-1)
        return self.put(torch.stack([(flat >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)]))

    def grouped(self, values: Tensor) -> Tensor:
        """[B, G] from [B, R], R >= G; one group where there are no channels."""
        return self.put(values[:, : self.groups] if values.shape[1] else torch.ones(len(values), 1))


def make_data(case: BackwardCase, dtype: torch.dtype, reduce: int, offset: int = 0, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    shape, rows = case.shape, case.shape[:2]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def positive(*size: int) -> Tensor:
        return torch.rand(size, generator=generator) + 0.5

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    count = case.batch * case.length * case.width
    return Data(
        grad=normal(*shape).to(dtype),
        x=activation_inputs(count, generator).view(shape).to(dtype),
        features=(normal(*shape) * 2.0 + 0.3).to(dtype),
        small=integers(-127, 128).to(torch.int8),
        mask=integers(0, 2).bool(),
        slopes=integers(0, 2**24).int(),
        codes=integers(0, 8).int(),
        shift=normal(*rows) * 0.3,
        scale=positive(*rows),
        rstd=positive(*rows),
        weight=normal(case.width),
        row_weight=normal(case.length),
        levels=normal(8),
        groups=next((g for g in (4, 3, 2) if case.length and case.length % g == 0), 1),
        offset=offset,
        reduce=reduce,
    )


def _layer_norm(d: Data, x: Tensor, shift: bool, weight: bool) -> tuple[Any, ...]:
    flat = [d.put(value.reshape(-1)) for value in (d.shift, d.scale, d.rstd)]
    scale = flat[1] if x.dtype != torch.int8 else flat[1] / 127.0
    return (
        *(d.put(d.grad), d.put(x), flat[0] if shift else None, scale, flat[2]),
        *(d.put(d.weight) if weight else None, d.reduce),
    )


def _group_norm(d: Data, x: Tensor, shift: bool, weight: bool) -> tuple[Any, ...]:
    scale = d.grouped(d.scale if x.dtype != torch.int8 else d.scale / 127.0)
    return (
        *(d.put(d.grad), d.put(x), d.grouped(d.shift) if shift else None, scale, d.grouped(d.rstd)),
        d.put(d.row_weight) if weight else None,
    )


@dataclass(frozen=True)
class GradCall:
    """An op that turns a gradient into another, and how its arguments are made."""

    op: str
    make: Callable[[Data], tuple[Any, ...]]
    reduces: tuple[int, ...] = (0, 1, 2)
    exact: bool = False  # one float32 product: no freedom at all
    sums_grad: bool = False  # rows are sums of the gradient that comes in, not of the result
    spread: str = "element"  # what an odd value of the gradient reaches
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def _activation(kind: int) -> Callable[[Data], tuple[Any, ...]]:
    return lambda d: (d.put(d.grad), d.put(d.x), kind, d.reduce)


_LAYER: dict[str, Any] = {"reduces": (0, 1), "sums_grad": True, "spread": "row"}
_GROUP: dict[str, Any] = {"reduces": (2,), "sums_grad": True, "spread": "group"}

GRAD_CALLS: dict[str, GradCall] = {
    "bit_scale of dropout": GradCall(
        "bit_scale",
        lambda d: (d.put(d.grad), d.planes(d.mask.reshape(-1).int(), 1)[0], 1 / 0.9, 0.0, d.reduce),
        exact=True,
    ),
    "bit_scale of leaky relu": GradCall(
        "bit_scale",
        lambda d: (d.put(d.grad), d.planes(d.mask.reshape(-1).int(), 1)[0], 1.0, 0.01, d.reduce),
        exact=True,
    ),
    **{f"activation_grad of {name}": GradCall("activation_grad", _activation(kind)) for kind, name in enumerate(KINDS)},
    "slope_scale": GradCall(
        "slope_scale", lambda d: (d.put(d.grad), d.slope_bytes(), d.reduce), exact=True, dtypes=(torch.float32,)
    ),
    "level_scale": GradCall(
        "level_scale",
        lambda d: (d.put(d.grad), d.planes(d.codes.reshape(-1), 3), d.put(d.levels), d.reduce),
        exact=True,
    ),
    "layer_norm_grad": GradCall("layer_norm_grad", lambda d: _layer_norm(d, d.features, True, True), **_LAYER),
    "layer_norm_grad, plain": GradCall("layer_norm_grad", lambda d: _layer_norm(d, d.features, False, False), **_LAYER),
    "layer_norm_grad of int8": GradCall("layer_norm_grad", lambda d: _layer_norm(d, d.small, False, True), **_LAYER),
    "layer_norm_grad of shifted int8": GradCall(
        "layer_norm_grad", lambda d: _layer_norm(d, d.small, True, False), **_LAYER
    ),
    "group_norm_grad": GradCall("group_norm_grad", lambda d: _group_norm(d, d.features, True, True), **_GROUP),
    "group_norm_grad, plain": GradCall("group_norm_grad", lambda d: _group_norm(d, d.features, False, False), **_GROUP),
    "group_norm_grad of int8": GradCall("group_norm_grad", lambda d: _group_norm(d, d.small, False, True), **_GROUP),
    "affine_grad": GradCall(
        "affine_grad",
        lambda d: (d.put(d.grad), d.put(d.weight if d.reduce == 1 else d.row_weight), d.reduce),
        reduces=(1, 2),
        exact=True,
        sums_grad=True,
    ),
}
