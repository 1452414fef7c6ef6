"""Autograd functions of trained weights: an output is passed on; its gradient gives rows, or is told to a sink.

What they keep, the layer's input, any weight gradient needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._backward import saved
from ._validate import EngineError
from .arrangement import by_sample, fold
from .functional import apply, bias_grad, pass_on, refuse_graph_of_rows

if TYPE_CHECKING:
    from .weight_uses import Use
    from .weights import WeightSink


class WeightFunction(torch.autograd.Function):
    """Identity on ``output``; the backward gives ``sink`` the use that ``make`` builds of (gradient, input).

    ``anchor`` is a leaf that makes autograd come by though neither weight nor input may require a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        inputs: Tensor,
        sink: WeightSink,
        make: Callable[[Tensor, Tensor], Use],
        layer: str,
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.sink, ctx.make, ctx.layer = sink, make, layer
        return pass_on(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_rows()
        (inputs,) = saved(ctx)
        with torch.no_grad():
            ctx.sink.take(ctx.make(grad, inputs))
        return grad, None, None, None, None, None


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
    return apply(WeightFunction, output, sink.anchor, inputs.detach(), sink, make, layer)


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

    normed: the norm without scale and shift. kind: where ``output`` holds the samples; None: one row each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        rows: Tensor,
        normed: Callable[[Tensor], Tensor],
        channels_first: bool,
        kind: str | None,
        layer: str,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.normed, ctx.channels_first, ctx.kind, ctx.layer, ctx.backend = normed, channels_first, kind, layer, backend
        ctx.batch, ctx.width = rows.shape
        return pass_on(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_rows()
        (inputs,) = saved(ctx)
        product = ctx.normed(inputs.to(torch.promote_types(inputs.dtype, torch.float32))) * grad
        if ctx.kind is None:
            rows = bias_grad(product, ctx.width, ctx.channels_first, ctx.backend)
        elif ctx.channels_first:
            rows = fold(bias_grad(product, ctx.width, True, ctx.backend), ctx.kind, ctx.batch)
        else:
            rows = bias_grad(by_sample(product, ctx.kind, ctx.batch), ctx.width, False, ctx.backend)
        return grad, None, rows, *(None,) * 5
