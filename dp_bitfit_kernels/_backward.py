"""What the functions that keep little for backward share: memory order, the sum handed to the layer before, errors.

**Handing sums over.** Where the output of a biased layer goes straight into an element-wise module, that module's
backward produces the very gradient that the layer's bias sums. It takes the sum in the same visit and puts it on the
layer's node of the graph (``node.sums``). The layer must not believe it blindly: autograd may have added a second
gradient, a hook may have changed it. So the layer uses the sum only if the gradient that it receives *is* the tensor
that was summed, with the version that it had then, in the same run of backward, and otherwise takes the sum itself. The
tensor is held until the layer has looked, so its identity cannot pass to another, and autograd, seeing it held, does
not add into it in place. Some writes leave no version behind (``.data``, NumPy, collective operations): all that can
run between the two are hooks. Where the tensor between them has one when the gradient is made, no sum is handed over.
(Hooks of the graph's nodes themselves, ``y.grad_fn.register_hook``, are not seen: they must not write past the version
counter.)
Nothing of this outlives the node: a graph that is dropped takes its sums along. Under torch.compile none of it runs;
Inductor fuses the traced sum with what produces the gradient.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from ._validate import EngineError

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serving(backend: str, tensor: Tensor) -> backends.Backend:
    """The backend for ``tensor``; float64 (gradcheck) is the reference's alone."""
    name = backend if tensor.dtype in KERNEL_DTYPES else "reference"
    return backends.serving(name, tensor.device.type)


def is_channels_last(x: Tensor) -> bool:
    """Whether the elements of an image x [B, C, ...] lie in memory with the channels innermost, and only so."""
    if x.is_contiguous() or x.dim() not in (4, 5):
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


Order = tuple[int, ...] | None  # dimensions from the outermost to the innermost; None: as they are


def channels_last_order(dims: int) -> Order:
    return (0, *range(2, dims), 1)


def order_of(x: Tensor) -> Order:
    """The order of the dimensions in the memory of an element-wise operation's output, which follows its input's."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    order = tuple(sorted(range(x.dim()), key=lambda dim: (-strides[dim], dim)))
    if not x.permute(order).is_contiguous():  # gaps or expanded: as torch lays out what is made like it
        strides = torch.empty_like(x, device="meta").stride()
        order = tuple(sorted(range(x.dim()), key=lambda dim: (-strides[dim], dim)))
    return None if order == tuple(range(x.dim())) else order


def in_order(x: Tensor, order: Order) -> Tensor:
    """x as a contiguous tensor of permuted dimensions; a view where its memory is in that order."""
    return (x if order is None else x.permute(order)).contiguous()


def out_of_order(x: Tensor, order: Order) -> Tensor:
    """Undoes :func:`in_order`."""
    if order is None:
        return x
    inverse = [0] * len(order)
    for place, dim in enumerate(order):
        inverse[dim] = place
    return x.permute(inverse)


def not_a_view(y: Tensor) -> Tensor:
    """The same memory; in-place operations on a function's output are legal only where it is no view."""
    return y.data if y._is_view() else y


def awaiting(x: Tensor) -> Any:
    """The node of a layer that will sum the gradient of its output ``x`` over T for its bias, or None."""
    node = x.grad_fn
    if getattr(node, "awaits", None) is None:
        return None
    if x._backward_hooks is None:  # so that hooks that are registered later are seen as well
        x._backward_hooks = OrderedDict()
        node._register_hook_dict(x)  # type: ignore[union-attr]
    return node


def three_dimensional(x: Tensor, node: Any, order: Order) -> tuple[Tensor, int]:
    """x, in memory order, as [B, R, C], and which dimension the layer of ``node`` sums (0: there is none)."""
    if node is None or x.numel() == 0:
        return x.view(1, 1, x.numel()), 0
    width, channels_first = node.awaits
    batch, dims = x.shape[0], x.dim()
    if order is None:
        return (x.view(batch, width, -1), 2) if channels_first and dims > 2 else (x.view(batch, -1, width), 1)
    if channels_first and order == channels_last_order(dims):
        return x.view(batch, -1, width), 1
    return x.view(1, 1, x.numel()), 0


def visit(ctx: Any, grad: Tensor, op: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Tensor:
    """``op`` on ``grad`` in the memory order of the forward, and the sums that it took left with the layer before.

    ctx: has ``node`` (see :func:`awaiting`), ``hooks`` (of the tensor between) and ``order``.
    op: ([B, R, C], reduce) -> (result, rows).
    """
    ordered = in_order(grad, ctx.order)
    view, reduce = three_dimensional(ordered, None if ctx.hooks else ctx.node, ctx.order)
    result, rows = op(view, reduce)
    dx = out_of_order(result.view(ordered.shape), ctx.order)
    if reduce:
        ctx.node.sums = (dx, dx._version, torch._C._current_graph_task_id(), rows)
    return dx


def handed_over(ctx: Any, grad: Tensor) -> Tensor | None:
    """The per-sample sums of ``grad`` [B, p] that its producer left, if they are proven to be of this gradient."""
    sums, ctx.sums = ctx.sums, None
    if sums is None or sums[0] is not grad or sums[1] != grad._version:
        return None
    rows: Tensor = sums[3]
    return rows if sums[2] == torch._C._current_graph_task_id() else None


def saved(ctx: Any) -> tuple[Any, ...]:
    """``ctx.saved_tensors``, with an error that names the layer where one was changed after the forward."""
    try:
        tensors: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise EngineError(
            f"layer {ctx.layer!r}: what it needs for backward was changed in place after it ran ({error})"
        ) from error
    return tensors


def refuse_graph(ctx: Any) -> None:
    """The backward of a lean function is not differentiable itself."""
    if torch.is_grad_enabled():
        raise EngineError(
            f"layer {ctx.layer!r}: backward(create_graph=True) is not possible where only what the first derivative "
            'needs is kept; for second derivatives convert the model with memory="off", without an engine'
        )
