"""Trials of modules that are run on each sample by itself, on a batch that the proof of the layout runs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ._nested import map_tensors, plain_in, tensors_in
from ._survey import evaluating
from ._validate import BatchLayoutError
from .evidence import INSTEAD, same
from .layers.one_by_one import Call, OneByOneLayer, replaced

_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError, AttributeError)


def alike(first: Any, second: Any) -> bool:
    """Equal but for rounding: kernels are chosen by the number of samples. What is neither a tensor nor a container
    of some is compared, too, where it is a number or a word."""
    a, b = list(tensors_in(first)), list(tensors_in(second))
    rounded = all(same(x, y, room(x.dtype)) for x, y in zip(a, b, strict=True)) if len(a) == len(b) else False
    return rounded and list(plain_in(first)) == list(plain_in(second))


def room(dtype: torch.dtype) -> float:
    return 0.05 if dtype in (torch.float16, torch.bfloat16) else 1e-3  # of the largest value


def require_same(layer: OneByOneLayer, call: Call, arguments: Any, batch: int) -> None:
    """The layer gives for the batch what it gives for its samples, in evaluation mode, and keeps nothing of them.

    Raises:
        BatchLayoutError: naming it.
    """
    try:
        with evaluating(layer):
            args, kwargs = _fresh(arguments)
            whole = layer.whole(*args, **kwargs)
            parts, kept = _watched(layer, call, arguments, batch)
        if any(module.training for module in layer.modules()):
            kept += _watched(layer, call, arguments, batch)[1]
    except _FAILURES as error:
        raise BatchLayoutError(
            f"layer {layer.layer_name!r} cannot be run one sample at a time: {error}. {INSTEAD}", [layer]
        ) from error
    if kept:
        raise BatchLayoutError(
            f"layer {layer.layer_name!r} is run one sample at a time, but keeps tensors of its forward somewhere (an "
            f"object, a hook that records), where others may look for the whole batch. {INSTEAD}",
            [layer],
        )
    if not alike(whole, parts):
        raise BatchLayoutError(
            f"layer {layer.layer_name!r} gives other outputs when it is run one sample at a time: it mixes samples, or "
            f"knows of them by other means than its tensors. {INSTEAD}",
            [layer],
        )


def _watched(layer: OneByOneLayer, call: Call, arguments: Any, batch: int) -> tuple[Any, int]:
    """The output of a run of each sample, and how many tensors that it made outlive it beside that.

    A cache that the first samples filled holds nothing of the others; what each sample leaves is seen.
    """
    made = _Made()
    with torch.no_grad():
        layer.sliced(call, _fresh(arguments), batch, {})  # caches
        with made:
            output = layer.sliced(call, _fresh(arguments), batch, {})
    known = {t.untyped_storage()._cdata for t in (*tensors_in(output), *layer.parameters(), *layer.buffers())}
    if made.alive(known):
        gc.collect()  # what refers to itself lives until then
    return output, made.alive(known)


class _Made(TorchDispatchMode):
    """Remembers, without keeping it alive, the memory of every tensor that operations make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs or {}))}
        for tensor in tensors_in(output):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in given:
                self.memory[reference.cdata] = reference
        return output

    def alive(self, known: set[int]) -> int:
        return sum(not ref.expired() for cdata, ref in self.memory.items() if cdata not in known)


def works_at_once(layer: OneByOneLayer, call: Call, arguments: Any, batch: int) -> bool:
    """Whether one forward for all samples has the outputs and the gradients that the samples have.

    What ``torch.func.vmap`` has no rule for, or only a loop of its own, is not run by it; nor is what it takes another
    way through (``requires_grad`` is False within it, ``padding_idx`` is forgotten), nor what stays random without its
    dropout modules, so that nothing can be compared.
    """
    try:
        with warnings.catch_warnings(record=True) as said, torch.enable_grad(), without_dropout(layer):
            warnings.simplefilter("always")
            same_now = _same_at_once(layer, call, arguments, batch)
            with evaluating(layer):
                same_then = _same_at_once(layer, call, arguments, batch)
        return same_now and same_then and not any("performance drop" in str(warning.message) for warning in said)
    except _FAILURES:
        return False


def _same_at_once(layer: OneByOneLayer, call: Call, arguments: Any, batch: int) -> bool:
    at_once = _gradients(layer, layer.mapped, call, arguments, batch)
    by_one = _gradients(layer, layer.sliced, call, arguments, batch)
    return alike(at_once[0], by_one[0]) and _close(at_once[1], by_one[1])


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    found = [(m, m.p) for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    try:
        for module, _ in found:
            module.p = 0.0
        yield
    finally:
        for module, p in found:
            module.p = p


def _fresh(arguments: Any) -> Any:
    """The same, in memory of its own: a module may change its inputs in place."""
    return map_tensors(arguments, torch.clone)


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
        same(a, b, room(a.dtype)) or float((a - b).abs().max()) <= 1e-3 * room(a.dtype) * largest
        for a, b in zip(first, second, strict=True)
    )


def _spread(layer: OneByOneLayer, name: str, batch: int) -> Tensor:
    parameter = layer.get_parameter(name).detach()
    return parameter.expand(batch, *parameter.shape).requires_grad_()
