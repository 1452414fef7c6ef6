"""Autograd functions: an output is passed through, and its gradient also yields per-sample rows.

The gradient of a bias needs nothing but the output gradient. So a layer computes its output with the
bias detached, by the very operation that the original layer uses (outputs are bit-equal, and autograd
keeps only what the input gradient needs), and hands it to :class:`BiasGradFunction`, which changes
nothing in the forward and visits the output gradient once in the backward.

Source: Bu et al., arXiv 2210.00036, equation (4): the per-sample bias gradient is the sum over T of
the output gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from ._backward import KERNEL_DTYPES, handed_over
from ._validate import EngineError
from .arrangement import by_sample, fold


def samples_by_position(grad: Tensor, width: int, channels_first: bool) -> Tensor:
    """View an output gradient as [B, T, p], copying only where no view exists.

    Args:
        grad: [B, ..., p] (features last; the last dimensions multiply to ``width``) or [B, p, ...].
        width: p, the number of elements of the bias.
        channels_first: dimension 1 is the bias dimension, as in convolutions.
    """
    batch = grad.shape[0]
    if grad.numel() == 0:
        return grad.new_empty((batch, 0, width))
    if not channels_first:
        return grad.reshape(batch, -1, width)
    if grad.dim() == 2:
        return grad.unsqueeze(1)
    if not grad.is_contiguous() and grad.stride(1) == 1:  # channels_last: features are last in memory
        return grad.movedim(1, -1).reshape(batch, -1, width)
    return grad.reshape(batch, width, -1).transpose(1, 2)


def bias_grad(grad: Tensor, width: int, channels_first: bool = False, backend: str = "auto") -> Tensor:
    """Per-sample bias gradient: [B, T..., p] or [B, p, T...] -> [B, p], summed over T in float32.

    float64 gradients stay float64 (gradcheck). Inside ``torch.compile`` and where a graph of the
    backward is wanted, the sum is the plain PyTorch one, which the compiler fuses with the operation before it.
    """
    plain = not channels_first and grad.dim() == 3 and grad.shape[2] == width  # the usual case of text: no call
    view = grad if plain else samples_by_position(grad, width, channels_first)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return view.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32))
    if grad.dtype not in KERNEL_DTYPES:
        return reference.bias_grad(view)
    return backends.serving(backend, grad.device.type).bias_grad(view)


def deliver(ctx: Any, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the inputs 1 and 2 of a function, the bias and its leaf, from ``rows`` [B, p]: one of them, or none.

    ctx: has ``bias``, the shape and dtype of input 1 (or None).
    """
    if ctx.needs_input_grad[2]:
        return None, rows
    if ctx.needs_input_grad[1]:
        shape, dtype = ctx.bias
        return rows.sum(0).to(dtype).view(shape), None
    return None, None


def shape_of(bias: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    """What :func:`deliver` needs of input 1."""
    return None if bias is None else (bias.shape, bias.dtype)


def refuse_graph_of_rows() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise EngineError(
            "backward(create_graph=True) is not possible on a private model: per-sample gradients "
            "would leave the ledger; call backward() without create_graph"
        )


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """``function.apply(*args)`` without what it does for torch.func's transforms, where none is active.

    That takes as long as the rest of the call, and is paid once a layer and step.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        result: Tensor = function.apply(*args)
    else:
        result = super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    return result


def pass_on(output: Tensor) -> Tensor:
    """The same memory as a tensor of its own to autograd: no copy, and in-place operations after it stay legal.

    Marking ``output`` as changed in place would do too, but costs three copies of each gradient (CopySlices) where
    it is a view, as the output of F.linear is. No operation of a converted layer keeps its output for the backward,
    so there is no version for an in-place change to break. The compiler can trace neither and removes the clone.
    """
    return output.clone() if torch.compiler.is_compiling() else output.data


class BiasGradFunction(torch.autograd.Function):
    """Identity on ``output``; the backward gives the bias its gradient, per sample where ``rows`` is given.

    Either ``rows`` [B, p] float32, a leaf whose value is never read and whose ``grad`` is the layer's slice of the
    ledger, or ``bias``, which gets its ordinary gradient, summed over the batch; the other one is None.
    ``kind`` of an arrangement: where ``output`` holds the samples; None: one row each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        channels_first: bool,
        backend: str,
        kind: str | None,
    ) -> Tensor:
        ctx.kind = kind
        if rows is not None:
            (ctx.batch, ctx.width), ctx.shape = rows.shape, None
        elif bias is not None:
            ctx.width, ctx.shape, ctx.dtype = bias.numel(), bias.shape, bias.dtype
        ctx.channels_first, ctx.backend = channels_first, backend
        if not torch.compiler.is_compiling() and kind is None:
            ctx.awaits, ctx.sums = (ctx.width, channels_first), None
        return pass_on(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.shape is None:
            refuse_graph_of_rows()
        if ctx.kind is not None:
            return grad, None, arranged_bias_grad(ctx, grad), None, None, None
        rows = None if torch.compiler.is_compiling() else handed_over(ctx, grad)
        if rows is None:
            rows = bias_grad(grad, ctx.width, ctx.channels_first, ctx.backend)
        if ctx.shape is None:
            return grad, None, rows, None, None, None
        return grad, rows.sum(0).to(ctx.dtype).view(ctx.shape), None, None, None, None


def arranged_bias_grad(ctx: Any, grad: Tensor) -> Tensor:
    """Per-sample sums of a gradient that holds several rows of each sample -> [B, p].

    ctx: ``kind`` (see arrangement), ``batch``, ``width``, ``channels_first``, ``backend``.
    """
    if ctx.channels_first:
        return fold(bias_grad(grad, ctx.width, True, ctx.backend), ctx.kind, ctx.batch)
    return bias_grad(by_sample(grad, ctx.kind, ctx.batch), ctx.width, False, ctx.backend)


class SpreadFunction(torch.autograd.Function):
    """A parameter once a sample, [B, *shape], without a copy; its gradient is the leaf's, ``rows`` [B, p] float32."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, rows: Tensor) -> Tensor:
        return parameter.expand(rows.shape[0], *parameter.shape).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_rows()
        return None, grad.reshape(grad.shape[0], -1).float()
