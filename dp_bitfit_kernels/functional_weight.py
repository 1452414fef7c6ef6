"""Autograd functions of trained weights: an output is passed on; its gradient gives rows, or is told to a sink.

What they keep, the layer's input, any weight gradient needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._backward import saved, serving
from ._validate import EngineError
from .arrangement import by_sample, fold
from .functional import apply, bias_grad, pass_on, refuse_graph_of_rows

if TYPE_CHECKING:
    from .weight_uses import Use
    from .weights import WeightSink


class WeightFunction(torch.autograd.Function):
    """Identity on ``output``; the backward leaves what ``make`` builds of (gradient, input) in ``pending``.

    ``anchor`` is a leaf that makes autograd come by though neither weight nor input may require a gradient. Only when
    autograd accumulates into it is the use taken: a gradient that is asked for by ``torch.autograd.grad``, of an input
    say, is not for the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        inputs: Tensor,
        pending: list[Use],
        make: Callable[[Tensor, Tensor], Use],
        layer: str,
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.pending, ctx.make, ctx.layer = pending, make, layer
        return pass_on(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_rows()
        (inputs,) = saved(ctx)
        with torch.no_grad():
            ctx.pending[:] = [ctx.make(grad, inputs)]
        return grad, torch.empty(0, device=grad.device), None, None, None, None


def _take(sink: WeightSink, pending: list[Use], anchor: Tensor) -> None:
    anchor.grad = None
    sink.take(pending.pop())


def tell(output: Tensor, inputs: Tensor, sink: WeightSink, make: Callable[[Tensor, Tensor], Use], layer: str) -> Tensor:
    """``output``, whose gradient will also reach the sink.

    Raises:
        EngineError: under torch.compile, which cannot trace what a backward leaves outside of its graph.
    """
    if torch.compiler.is_compiling():
        raise EngineError(
            f"layer {layer!r}: a weight of more elements than fit the rows is trained, which torch.compile cannot "
            "trace: make_private(per_sample_norm='instantiate') keeps the rows of linear layers, or leave the model "
            "uncompiled"
        )
    sink.calls += 1
    anchor, pending = torch.empty(0, device=output.device, requires_grad=True), list[Any]()
    anchor.register_post_accumulate_grad_hook(partial(_take, sink, pending))
    return apply(WeightFunction, output, anchor, inputs.detach(), pending, make, layer)


class WeightRowsFunction(torch.autograd.Function):
    """Identity on ``output``; the backward gives ``rows`` [B, p * d] the rows of the use that ``make`` builds."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        rows: Tensor,
        make: Callable[[Tensor, Tensor], Use],
        height: int,
        layer: str,
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.make, ctx.height, ctx.layer = make, height, layer
        return pass_on(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_rows()
        (inputs,) = saved(ctx)
        use = ctx.make(grad, inputs)
        rows = use.rows(slice(0, use.batch), slice(0, ctx.height))
        return grad, None, rows.reshape(use.batch, -1), None, None, None


class ScaleGradFunction(torch.autograd.Function):
    """Identity on the ``output`` of a norm; the backward gives its scale the rows sum_t grad * normed(inputs), [B, p].

    normed: the norm without scale and shift; over_last: its eps, and whether it subtracts the mean, where it is one
    over the last dimensions. kind: where ``output`` holds the samples; None: one row each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        rows: Tensor,
        normed: Callable[[Tensor], Tensor],
        over_last: tuple[float, bool] | None,
        channels_first: bool,
        kind: str | None,
        layer: str,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.normed, ctx.over_last = normed, over_last
        ctx.channels_first, ctx.kind, ctx.layer, ctx.backend = channels_first, kind, layer, backend
        ctx.batch, ctx.width = rows.shape
        return pass_on(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_rows()
        (inputs,) = saved(ctx)
        rows = _scale_rows(ctx, grad, inputs)
        return grad, None, rows, *(None,) * 6


def _scale_rows(ctx: Any, grad: Tensor, inputs: Tensor) -> Tensor:
    if ctx.over_last is not None and ctx.kind is None and grad.device.type == "cpu" and grad.dtype == inputs.dtype:
        shape = (ctx.batch, grad.numel() // max(1, ctx.batch * ctx.width), ctx.width)
        return serving(ctx.backend, grad).scale_grad(
            *(x.contiguous().view(shape) for x in (grad, inputs)), *ctx.over_last
        )
    product = ctx.normed(inputs.to(torch.promote_types(inputs.dtype, torch.float32)))
    product = product.mul_(grad) if product.dtype == torch.promote_types(product.dtype, grad.dtype) else product * grad
    if ctx.kind is None:
        return bias_grad(product, ctx.width, ctx.channels_first, ctx.backend)
    if ctx.channels_first:
        return fold(bias_grad(product, ctx.width, True, ctx.backend), ctx.kind, ctx.batch)
    return bias_grad(by_sample(product, ctx.kind, ctx.batch), ctx.width, False, ctx.backend)
