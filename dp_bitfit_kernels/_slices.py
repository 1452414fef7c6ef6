"""Trials of modules that are run on each sample by itself, on a batch that the proof of the layout runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._nested import tensors_in
from ._validate import BatchLayoutError
from .evidence import INSTEAD, same
from .layers.one_by_one import Call, OneByOneLayer

_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError, AttributeError)
_ROOM = 1e-3  # of the largest value: kernels are chosen by the number of samples


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
    if not _alike(whole, parts):
        raise BatchLayoutError(
            f"layer {layer.layer_name!r} gives other outputs when it is run one sample at a time: it mixes samples, or "
            f"knows of them by other means than its tensors. {INSTEAD}",
            [layer],
        )


def works_at_once(layer: OneByOneLayer, call: Call, arguments: Any, batch: int) -> bool:
    """Whether one forward for all samples gives what the samples give, and can be differentiated.

    What ``torch.func.vmap`` has no rule for, or only a loop of its own, is not run by it.
    """
    copies = {name: _spread(layer.get_parameter(name), batch) for name in sorted(layer.trained)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*performance drop.*")
            with torch.enable_grad():
                layer.mapped(call, arguments, batch, copies)
            with _evaluating(layer):
                return _alike(layer.mapped(call, arguments, batch, copies), layer.sliced(call, arguments, batch, {}))
    except (*_FAILURES, UserWarning):
        return False


def _spread(parameter: Tensor, batch: int) -> Tensor:
    return parameter.detach().expand(batch, *parameter.shape).requires_grad_()


def _alike(first: Any, second: Any) -> bool:
    a, b = list(tensors_in(first)), list(tensors_in(second))
    return len(a) == len(b) and all(same(x, y, _ROOM) for x, y in zip(a, b, strict=True))


@contextmanager
def _evaluating(layer: OneByOneLayer) -> Iterator[None]:
    modes = [(module, module.training) for module in layer.modules()]
    try:
        layer.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
