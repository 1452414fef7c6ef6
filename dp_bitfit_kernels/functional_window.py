"""Convolutions with a frozen weight and pooling: of their input they keep its shape, or a byte a window.

The input gradient of a convolution needs the weight alone, yet autograd keeps the input. PyTorch's own backward is
called with an uninitialised tensor in its place: of an input whose gradient is asked for it reads sizes and strides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backward import handed_over, is_channels_last, not_a_view, refuse_graph, saved
from .functional import bias_grad, deliver, shape_of

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Window(NamedTuple):
    """Geometry of a convolution, a number for each dimension of the image."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Outline(NamedTuple):
    """What is kept of an input: enough to stand in for it where only its sizes and strides are read."""

    shape: torch.Size
    channels_last: bool

    def stand_in(self, grad: Tensor) -> Tensor:
        """A tensor of the input's shape and memory order; its memory is never touched."""
        if grad.shape == self.shape and is_channels_last(grad) == self.channels_last:
            return grad
        order = torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d
        return torch.empty(
            self.shape,
            dtype=grad.dtype,
            device=grad.device,
            memory_format=order if self.channels_last else torch.contiguous_format,
        )


def _outline(x: Tensor) -> _Outline:
    return _Outline(x.shape, is_channels_last(x))


class ConvFunction(torch.autograd.Function):
    """y = conv(x, W) + b with W frozen; the bias sum is taken over from what produced the gradient where it can be."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        weight: Tensor,
        shift: Tensor | None,
        window: Window,
        layer: str,
        backend: str,
    ) -> Tensor:
        ctx.window, ctx.layer, ctx.backend, ctx.bias = window, layer, backend, shape_of(bias)
        ctx.outline = _outline(x)
        if (bias is not None or rows is not None) and not torch.compiler.is_compiling():
            ctx.awaits, ctx.sums = (weight.shape[0], True), None
        ctx.save_for_backward(weight)
        convolution = CONVOLUTIONS[len(window.stride)]
        return convolution(x, weight, shift, window.stride, window.padding, window.dilation, window.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph(ctx)
        (weight,) = saved(ctx)
        to_bias: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            sums = None if torch.compiler.is_compiling() else handed_over(ctx, grad)
            to_bias = deliver(ctx, bias_grad(grad, weight.shape[0], True, ctx.backend) if sums is None else sums)
        dx = None
        if ctx.needs_input_grad[0]:
            stride, padding, dilation, groups = ctx.window
            dx = torch.ops.aten.convolution_backward(
                grad,
                ctx.outline.stand_in(grad),
                weight.to(grad.dtype),  # under autocast the gradient is narrower
                None,
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                groups,
                [True, False, False],
            )[0]
        return (dx, *to_bias, *(None,) * 5)


_MAX_POOLS: dict[int, tuple[Any, Any]] = {
    2: (torch.ops.aten.max_pool2d_with_indices, torch.ops.aten.max_pool2d_with_indices_backward),
    3: (torch.ops.aten.max_pool3d_with_indices, torch.ops.aten.max_pool3d_with_indices_backward),
}


class Pool(NamedTuple):
    """Geometry of a pooling window, a number for each dimension of the image; one position axis is a height of one."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool


# A few KB for each kind of window and image width, as many as there are; a captured graph may read them.
_made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}


def _window_tables(pool: Pool, image: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Distance of each place of a window from its first, in elements of the image, and the inverse of that."""
    key = (pool.kernel, pool.dilation, image[1:], device)
    found = _made.get(key)
    if found is None:
        distances = [0]
        for size, spread, extent in zip(pool.kernel, pool.dilation, image, strict=True):
            distances = [before * extent + step * spread for before in distances for step in range(size)]
        places = [0] * (max(distances) + 1)
        for place, distance in enumerate(distances):
            places[distance] = place
        found = (
            torch.tensor(distances, dtype=torch.int64, device=device),
            torch.tensor(places, dtype=torch.uint8, device=device),
        )
        if type(found[0]) is Tensor:  # not of a mode that only plays tensors
            _made[key] = found
    return found


def _first_places(pool: Pool, image: tuple[int, ...], out: Sequence[int], device: torch.device) -> Tensor:
    """Index in the image of the first place of each output's window (outside it where there is padding)."""
    first = torch.zeros((), dtype=torch.int64, device=device)
    for stride, padding, extent, count in zip(pool.stride, pool.padding, image, out, strict=True):
        first = first.unsqueeze(-1) * extent + torch.arange(count, device=device) * stride - padding
    return first


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``, in a fifth of the time."""
    return torch.index_select(table, 0, index.reshape(-1)).view(index.shape)


class MaxPoolFunction(torch.autograd.Function):
    """Max pooling that keeps, for each output, the place in its window: one byte (windows of at most 256 places)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool, layer: str) -> Tensor:
        ctx.pool, ctx.layer, ctx.flat = pool, layer, x.dim() < len(pool.kernel) + 2
        x = x.unsqueeze(2) if ctx.flat else x
        ctx.outline = _outline(x)
        forward, _ = _MAX_POOLS[len(pool.kernel)]
        y, index = forward(x, pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        dims = len(pool.kernel)
        image = tuple(x.shape[-dims:])
        first = _first_places(pool, image, y.shape[-dims:], x.device)
        _, place = _window_tables(pool, image, x.device)
        ctx.save_for_backward(_looked_up(place, index.sub_(first)))
        return not_a_view(y.squeeze(2)) if ctx.flat else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph(ctx)
        (places,) = saved(ctx)
        pool, dims = ctx.pool, len(ctx.pool.kernel)
        grad = grad.unsqueeze(2) if ctx.flat else grad
        image = tuple(ctx.outline.shape[-dims:])
        first = _first_places(pool, image, grad.shape[-dims:], grad.device)
        distance, _ = _window_tables(pool, image, grad.device)
        index = _looked_up(distance, places.int()).add_(first)
        _, backward = _MAX_POOLS[dims]
        geometry = (pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        dx = backward(grad, ctx.outline.stand_in(grad), *geometry, index)
        return dx.squeeze(2) if ctx.flat else dx, None, None


class ShapePoolFunction(torch.autograd.Function):
    """Average pooling: the backward reads the input's shape alone.

    forward, backward: the operation, and its gradient as a function of (grad, stand-in for the input).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor, Tensor], Tensor],
        layer: str,
    ) -> Tensor:
        ctx.outline, ctx.gradient, ctx.layer = _outline(x), backward, layer
        return not_a_view(forward(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph(ctx)
        return ctx.gradient(grad, ctx.outline.stand_in(grad)), None, None, None


def tuple_of(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A module's size argument, one number for each dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
