"""Element-wise modules that keep bits: clamps (ReLU and friends), dropout, activations.

Kept for backward, an element: one bit (clamps, dropout); the input itself (GELU, SiLU: the gradient is that of
PyTorch's own formula); 24 bits (activations spelled out in several operations, whose derivative is kept as a number
in fixed point, no further from it than float32 rounding); 3 bits (memory="compact": the derivative as one of eight
levels).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import few_bits
from ._backward import (
    awaiting,
    in_order,
    not_a_view,
    order_of,
    out_of_order,
    refuse_graph,
    saved,
    serving,
    visit,
)
from .reference_backward import KINDS

_GELU, _GELU_TANH, _SILU, _ = range(len(KINDS))


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def begin(ctx: Any, x: Tensor, layer: str, backend: str) -> Tensor:
        """Note what the backward needs of ``x`` besides values; returns x in memory order."""
        ctx.node, ctx.layer, ctx.backend = awaiting(x), layer, backend
        ctx.hooks = None if ctx.node is None else x._backward_hooks
        ctx.order = order_of(x)
        return in_order(x, ctx.order)


class _Bits(_Pointwise):
    """What multiplies its gradient by ``ctx.factors``: one where a bit is set, the other where it is not."""

    @staticmethod
    def end(ctx: Any, x: Tensor, y: Tensor, bits: Tensor, inplace: bool) -> Tensor:
        """Keep the bits; y, in memory order, becomes the output, or is written over ``x`` where it is not yet."""
        ctx.save_for_backward(bits)
        y = not_a_view(out_of_order(y, ctx.order))
        if not inplace:
            return y
        ctx.mark_dirty(x)
        return x if y.data_ptr() == x.data_ptr() else x.copy_(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph(ctx)
        (bits,) = saved(ctx)
        ops, (on, off) = serving(ctx.backend, grad), ctx.factors
        dx = visit(ctx, grad, lambda g, reduce: ops.bit_scale(g, bits, on, off, reduce))
        return dx, *(None,) * (len(ctx.needs_input_grad) - 1)


class ClampFunction(_Bits):
    """ReLU, ReLU6, Hardtanh and LeakyReLU: y = x between low and high, else the limit or slope * x. Keeps one bit."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: float, high: float, slope: float, inplace: bool, layer: str, backend: str
    ) -> Tensor:
        ordered = _Pointwise.begin(ctx, x, layer, backend)
        ctx.factors = (1.0, slope)
        ops = serving(backend, x)
        if inplace and ordered.data_ptr() == x.data_ptr():
            y, bits = ordered, ops.clamp_pack_(ordered, low, high, slope)
        else:
            y, bits = ops.clamp_pack(ordered, low, high, slope)
        return _Bits.end(ctx, x, y, bits, inplace)


@functools.lru_cache(maxsize=64)
def _kept_scale(p: float, dtype: torch.dtype, fused: bool) -> float:
    """1 / (1 - p) as the module that is replaced rounds it."""
    return 1.0 / (1.0 - p) if fused else float(torch.ones((), dtype=dtype).div_(1.0 - p))


class DropoutFunction(_Bits):
    """Dropout by torch's own generator and in its own order: the same mask as F.dropout. Keeps one bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, inplace: bool, layer: str, backend: str) -> Tensor:
        ordered = _Pointwise.begin(ctx, x, layer, backend)
        ops = serving(backend, x)
        fused = x.device.type != "cpu" and not inplace
        scale = _kept_scale(p, x.dtype, fused)
        ctx.factors = (scale, 0.0)
        if fused:
            dropped, keep = torch.native_dropout(x, p, True)
            y, bits = in_order(dropped, ctx.order), ops.pack_bits(in_order(keep, ctx.order))
        else:
            noise = torch.bool if x.device.type == "cpu" else x.dtype  # a CPU draws the same bits for every dtype
            keep = torch.empty_like(x, dtype=noise).bernoulli_(1.0 - p).bool()
            bits = ops.pack_bits(in_order(keep, ctx.order))
            y = ops.bit_scale(ordered.view(1, 1, ordered.numel()), bits, scale, 0.0, 0)[0].view(ordered.shape)
        return _Bits.end(ctx, x, y, bits, inplace)


def activate(x: Tensor, kind: int) -> Tensor:
    """Activation number ``kind`` by torch's own operation where there is one."""
    if kind == _SILU:
        return F.silu(x)
    if kind in (_GELU, _GELU_TANH):
        return F.gelu(x, approximate="tanh" if kind == _GELU_TANH else "none")
    return x * torch.sigmoid(1.702 * x)


class LevelFunction(_Pointwise):
    """memory="compact": an activation whose derivative is kept as one of eight levels, 3 bits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, name: str, operation: Callable[[Tensor], Tensor], layer: str, backend: str
    ) -> Tensor:
        ordered = _Pointwise.begin(ctx, x, layer, backend)
        ctx.name = name
        edges, _ = few_bits.tables(name, x.device)
        ctx.save_for_backward(serving(backend, x).level_pack(ordered, edges))
        return operation(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph(ctx)
        (planes,) = saved(ctx)
        ops, (_, levels) = serving(ctx.backend, grad), few_bits.tables(ctx.name, grad.device)
        return visit(ctx, grad, lambda g, reduce: ops.level_scale(g, planes, levels, reduce)), None, None, None, None


class ActivationFunction(_Pointwise):
    """GELU in all its spellings, SiLU, QuickGELU.

    spelled: the module writes its formula out in several operations, so that there is no gradient formula of torch's
    to be equal to: y is then within 2 units in the last place of max(|x|, |y|), and a float32 derivative is kept in 24
    bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int, spelled: bool, layer: str, backend: str) -> Tensor:
        ordered = _Pointwise.begin(ctx, x, layer, backend)
        ctx.kind, ctx.packed = kind, spelled and x.dtype == torch.float32
        if ctx.packed:
            y, codes = serving(backend, x).slope_pack(ordered, kind)
            ctx.save_for_backward(codes)
            return not_a_view(out_of_order(y, ctx.order))
        ctx.save_for_backward(x)
        return activate(x, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph(ctx)
        (kept,) = saved(ctx)
        ops, kind = serving(ctx.backend, grad), ctx.kind
        if ctx.packed:
            dx = visit(ctx, grad, lambda g, reduce: ops.slope_scale(g, kept, reduce))
        elif ctx.node is None and kind <= _SILU:
            dx = _torchs_own(grad, kept, kind)
        else:
            x = in_order(kept, ctx.order)
            dx = visit(ctx, grad, lambda g, reduce: ops.activation_grad(g, x.view(g.shape), kind, reduce))
        return dx, None, None, None, None


def _torchs_own(grad: Tensor, x: Tensor, kind: int) -> Tensor:
    """Where no sum is to be taken: the bits of the module that is replaced."""
    dx: Tensor
    if kind == _SILU:
        dx = torch.ops.aten.silu_backward(grad, x)
    else:
        dx = torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if kind == _GELU_TANH else "none")
    return dx
