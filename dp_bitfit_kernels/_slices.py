"""Trials of modules that are run on each sample by itself, on a batch that the proof of the layout runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._nested import plain_in, tensors_in
from ._validate import BatchLayoutError
from .evidence import INSTEAD, same
from .layers.one_by_one import Call, OneByOneLayer, replaced

_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError, AttributeError)


def alike(first: Any, second: Any) -> bool:
    """Equal but for rounding: kernels are chosen by the number of samples. What is neither a tensor nor a container
    of some is compared, too, where it is a number or a word."""
    a, b = list(tensors_in(first)), list(tensors_in(second))
    rounded = all(same(x, y, _room(x.dtype)) for x, y in zip(a, b, strict=True)) if len(a) == len(b) else False
    return rounded and list(plain_in(first)) == list(plain_in(second))


def _room(dtype: torch.dtype) -> float:
    return 0.05 if dtype in (torch.float16, torch.bfloat16) else 1e-3  # of the largest value


def require_same(layer: OneByOneLayer, call: Call, arguments: Any, batch: int) -> None:
    """The layer gives for the batch what it gives for its samples, in evaluation mode.

    Raises:
        BatchLayoutError: naming it.
    """
    args, kwargs = arguments
    with _evaluating(layer):
        try:
            whole = layer.whole(*args, **kwargs)
            parts = layer.sliced(call, arguments, batch, {})
        except _FAILURES as error:
            raise BatchLayoutError(
                f"layer {layer.layer_name!r} cannot be run one sample at a time: {error}. {INSTEAD}", [layer]
            ) from error
    if not alike(whole, parts):
        raise BatchLayoutError(
            f"layer {layer.layer_name!r} gives other outputs when it is run one sample at a time: it mixes samples, or "
            f"knows of them by other means than its tensors. {INSTEAD}",
            [layer],
        )


def works_at_once(layer: OneByOneLayer, call: Call, arguments: Any, batch: int) -> bool:
    """Whether one forward for all samples has the outputs and the gradients that the samples have.

    What ``torch.func.vmap`` has no rule for, or only a loop of its own, is not run by it; nor is what it takes another
    way through (``requires_grad`` is False within it, ``padding_idx`` is forgotten).
    """
    try:
        with warnings.catch_warnings(record=True) as said, torch.enable_grad():
            warnings.simplefilter("always")
            _gradients(layer, layer.mapped, call, arguments, batch)  # as it is trained: what is random is not compared
            with _evaluating(layer):
                at_once = _gradients(layer, layer.mapped, call, arguments, batch)
                by_one = _gradients(layer, layer.sliced, call, arguments, batch)
        slow = any("performance drop" in str(warning.message) for warning in said)
        return not slow and alike(at_once[0], by_one[0]) and _close(at_once[1], by_one[1])
    except _FAILURES:
        return False


def _gradients(
    layer: OneByOneLayer, run: Callable[..., Any], call: Call, arguments: Any, batch: int
) -> tuple[Any, list[Tensor]]:
    """The output of a run; gradients of a random sum of it with respect to each sample's copies and to the inputs."""
    copies: Mapping[str, Tensor] = {name: _spread(layer, name, batch) for name in sorted(layer.trained)}
    given = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors_in(arguments)]
    fresh = [t.clone() if t.requires_grad else t for t in given]  # a leaf takes no change in place
    output = run(call, replaced(arguments, fresh), batch, copies)
    generator = torch.Generator().manual_seed(0)
    reached = [t for t in tensors_in(output) if t.requires_grad]
    seeds = [torch.randn(t.shape, generator=generator).to(t) for t in reached]
    wanted = [*copies.values(), *(t for t in given if t.requires_grad)]
    found = torch.autograd.grad(reached, wanted, seeds, allow_unused=True) if reached else [None] * len(wanted)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    detached = replaced(output, [t.detach() for t in tensors_in(output)])
    return detached, gradients


def _close(first: list[Tensor], second: list[Tensor]) -> bool:
    """Gradients equal but for rounding; one that is nothing else (zero but for it) is held against the largest."""
    largest = max((float(t.abs().max()) for t in second if t.numel()), default=0.0)
    return all(
        same(a, b, _room(a.dtype)) or float((a - b).abs().max()) <= 1e-3 * _room(a.dtype) * largest
        for a, b in zip(first, second, strict=True)
    )


def _spread(layer: OneByOneLayer, name: str, batch: int) -> Tensor:
    parameter = layer.get_parameter(name).detach()
    return parameter.expand(batch, *parameter.shape).requires_grad_()


@contextmanager
def _evaluating(layer: OneByOneLayer) -> Iterator[None]:
    modes = [(module, module.training) for module in layer.modules()]
    try:
        layer.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
