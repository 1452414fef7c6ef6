"""Normalisation layers that visit their output gradient once: the input gradient and the per-sample bias gradient.

Kept for backward: nothing of the batch (BatchNorm with frozen statistics, an affine map); the input and the row
statistics (LayerNorm, GroupNorm); in memory="compact" the normalised input in 8 bits and a scale a row instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backward import channels_last_order, in_order, is_channels_last, out_of_order, refuse_graph, saved, serving
from .functional import bias_grad, deliver, shape_of


def _wide(value: Tensor | None, like: Tensor) -> Tensor | None:
    """As float32, or float64 beside a float64 gradient: what the ops take."""
    return None if value is None else value.reshape(-1).to(torch.promote_types(like.dtype, torch.float32))


def _widened_by_autocast(x: Tensor) -> bool:
    """Autocast runs layer_norm and group_norm in float32 on a GPU, and leaves them alone on a CPU."""
    return x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)


def _is_canonical_channels_last(x: Tensor) -> bool:
    """Also in the strides of dimensions of one element, by which torch chooses its GroupNorm."""
    if not is_channels_last(x):
        return False
    order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.stride() == torch.empty(x.shape, device="meta", memory_format=order).stride()


class BatchNormFunction(torch.autograd.Function):
    """BatchNorm by its running statistics: y = (x - mean) * scale + bias with scale = weight / sqrt(var + eps)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        shift: Tensor | None,
        eps: float,
        layer: str,
        backend: str,
    ) -> Tensor:
        ctx.bias, ctx.layer, ctx.backend, ctx.eps = shape_of(bias), layer, backend, eps
        ctx.order = channels_last_order(x.dim()) if is_channels_last(x) else None
        ctx.save_for_backward(var, weight)
        return F.batch_norm(x, mean, var, weight, shift, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph(ctx)
        var, weight = saved(ctx)
        wide = torch.promote_types(grad.dtype, torch.float32)
        scale = (var.to(wide) + ctx.eps).rsqrt()
        if weight is not None:
            scale = scale * weight.to(wide)
        ordered = in_order(grad, ctx.order)
        channels, batch = scale.shape[0], grad.shape[0]
        last = ctx.order is not None or grad.dim() == 2
        # Sizes spelled out: an empty batch leaves nothing to infer one from.
        others = grad[0, 0].numel() if batch and channels else 0
        shape = (batch, others, channels) if last else (batch, channels, others)
        dx, sums = serving(ctx.backend, grad).affine_grad(ordered.view(shape), scale, 1 if last else 2)
        dx = out_of_order(dx.view(ordered.shape), ctx.order)
        return (dx, *deliver(ctx, sums), *(None,) * 7)


class _Norm(torch.autograd.Function):
    @staticmethod
    def keep(ctx: Any, x: Tensor, width: int, statistics: tuple[Tensor, Tensor], weight: Tensor | None) -> None:
        """Save what the input gradient needs: x as it is, or its rows of ``width`` elements in 8 bits."""
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, rstd = (value.reshape(-1).to(wide) for value in statistics)
        if ctx.compact and x.dtype != torch.float64:
            codes, scale = serving(ctx.backend, x).quantize_norm(x.view(mean.numel(), width), mean, rstd)
            ctx.save_for_backward(codes, None, scale, rstd, weight)
        else:
            ctx.save_for_backward(x, mean, rstd, rstd, weight)


class LayerNormFunction(_Norm):
    """LayerNorm over the last dimensions, which hold as many elements as the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        shape: tuple[int, ...],
        weight: Tensor | None,
        shift: Tensor | None,
        eps: float,
        compact: bool,
        layer: str,
        backend: str,
    ) -> Tensor:
        ctx.bias, ctx.layer, ctx.backend, ctx.compact = shape_of(bias), layer, backend, compact
        ctx.width = math.prod(shape)
        x = x.contiguous()
        if _widened_by_autocast(x):
            x = x.float()
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, shift, eps)
        if ctx.needs_input_grad[0]:
            _Norm.keep(ctx, x, ctx.width, (mean, rstd), weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph(ctx)
        if not ctx.needs_input_grad[0]:
            return (None, *deliver(ctx, bias_grad(grad, ctx.width, False, ctx.backend)), *(None,) * 7)
        kept, mean, scale, rstd, weight = saved(ctx)
        batch = grad.shape[0]
        view = grad.contiguous().view(batch, rstd.numel() // max(1, batch), ctx.width)
        summed = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, sums = serving(ctx.backend, grad).layer_norm_grad(
            view, kept.view(view.shape), mean, scale, rstd, _wide(weight, grad), int(summed)
        )
        return (dx.view(grad.shape), *deliver(ctx, sums), *(None,) * 7)


class GroupNormFunction(_Norm):
    """GroupNorm of [B, C, ...]; a bias a channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        groups: int,
        weight: Tensor | None,
        shift: Tensor | None,
        eps: float,
        compact: bool,
        layer: str,
        backend: str,
    ) -> Tensor:
        ctx.bias, ctx.layer, ctx.backend, ctx.compact = shape_of(bias), layer, backend, compact
        ctx.groups = groups
        if _widened_by_autocast(x):
            x = x.float()
        batch, channels = x.shape[:2]
        positions = x.numel() // max(1, batch * channels)
        kept = x.contiguous()
        x = x if x.device.type == "cpu" and _is_canonical_channels_last(x) else kept
        y, mean, rstd = torch.native_group_norm(x, weight, shift, batch, channels, positions, groups, eps)
        if ctx.needs_input_grad[0]:
            _Norm.keep(ctx, kept, kept.numel() // max(1, batch * groups), (mean, rstd), weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph(ctx)
        batch, channels = grad.shape[:2]
        if not ctx.needs_input_grad[0]:
            return (None, *deliver(ctx, bias_grad(grad, channels, True, ctx.backend)), *(None,) * 7)
        kept, mean, scale, rstd, weight = saved(ctx)
        view = grad.contiguous().view(batch, channels, grad.numel() // max(1, batch * channels))
        statistics = (batch, ctx.groups)
        dx, sums = serving(ctx.backend, grad).group_norm_grad(
            view,
            kept.view(view.shape),
            None if mean is None else mean.view(statistics),
            scale.view(statistics),
            rstd.view(statistics),
            _wide(weight, grad),
        )
        return (dx.view(grad.shape), *deliver(ctx, sums), *(None,) * 7)
