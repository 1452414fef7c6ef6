"""Which rows of a tensor are the samples: found from the model's inputs, proven by one more sample.

A leading dimension that equals the batch size proves nothing (a sequence-first tensor with T = B has it, too, and so
has a table with B rows). It must also follow when the batch grows: so the model is run on its own inputs and one more
row, without gradients; each converted layer's output must then have B + 1 rows, and what the added row holds must not
show in the others' outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._validate import BatchLayoutError
from .layers import BiasLayer


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name))


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return (
            type(value)({k: _map_tensors(v, change) for k, v in value.items()})
            if type(value) is dict
            else _mapping(value, change)
        )
    if isinstance(value, Mapping):
        return _mapping(value, change)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(v, change) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(v, change) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def _mapping(value: Mapping[Any, Any], change: Callable[[Tensor], Tensor]) -> Any:
    # Mapping classes of other libraries take a plain dict: a batch encoding, an ordered dict.
    return type(value)({k: _map_tensors(v, change) for k, v in value.items()})  # type: ignore[call-arg]


def leading_sizes(args: Any, kwargs: Any) -> set[int]:
    """Leading sizes of all tensor inputs of at least one dimension."""
    return {t.shape[0] for t in tensors_in((args, kwargs)) if t.dim() > 0}


def batch_of(args: Any, kwargs: Any) -> int:
    """B: the one leading size that all tensor inputs share.

    Raises:
        BatchLayoutError: there is no tensor, or the leading sizes differ.
    """
    sizes = leading_sizes(args, kwargs)
    if len(sizes) != 1:
        found = "no tensor" if not sizes else f"leading sizes {sorted(sizes)}"
        raise BatchLayoutError(
            f"the batch size cannot be read off the model's inputs ({found}): wrap the step in `with engine.batch(B):`"
        )
    return sizes.pop()


def prove(model: nn.Module, args: Any, kwargs: Any, batch: int, layers: list[BiasLayer]) -> bool:
    """Run ``model`` twice on B + 1 rows, without gradients, and require what a batch-first model does.

    The added row repeats the first sample in one run and another sample in the other. In both, every converted layer
    must give B + 1 rows; and the outputs of the B samples must not notice what the added row holds.
    The generators' state and the buffers are as before afterwards.

    Returns:
        False where all samples are alike, so that the second question could not be asked.

    Raises:
        BatchLayoutError: naming the layer whose leading dimension does not follow the batch, or saying that the
            model mixes samples, or that it cannot be run with one more row.
    """
    faults: list[str] = []

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and (output.dim() < 2 or output.shape[0] != batch + 1):
            faults.append(f"{module.layer_name!r} gives shape {tuple(output.shape)} for {batch + 1} samples")

    other = _another_row(args, kwargs, batch)
    handles = [layer.register_forward_hook(look) for layer in layers if layer.trained]
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    outputs: list[list[Tensor]] = []
    try:
        with torch.no_grad():
            for row in (0,) if other is None else (0, other):
                grown = _map_tensors((args, kwargs), partial(_grow, batch=batch, row=row))
                with torch.random.fork_rng(devices=devices):
                    outputs.append(list(tensors_in(model(*grown[0], **grown[1]))))
                for buffer, before in buffers:
                    buffer.copy_(before)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError) as error:
        raise BatchLayoutError(
            f"the batch layout cannot be proven: the model fails on {batch + 1} samples, given {batch} ({error})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    if faults:
        raise BatchLayoutError(
            "the leading dimension does not follow the batch size in layer "
            + "; layer ".join(dict.fromkeys(faults))
            + ". Sequence-first inputs, tables without a batch dimension and folded or flattened batches give wrong "
            "per-sample gradients; make the layer's input batch-first, or leave its bias frozen"
        )
    _require_apart(outputs, batch)
    return other is not None


def _grow(tensor: Tensor, batch: int, row: int) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[0] != batch:
        return tensor
    return torch.cat([tensor, tensor[row : row + 1]])


def _another_row(args: Any, kwargs: Any, batch: int) -> int | None:
    """A row whose content differs from row 0 in some input; None where all samples are alike."""
    for tensor in tensors_in((args, kwargs)):
        if batch > 1 and tensor.dim() > 0 and tensor.shape[0] == batch:
            different = (tensor[1:] != tensor[:1]).flatten(1).any(1) if tensor.dim() > 1 else tensor[1:] != tensor[0]
            if bool(different.any()):
                return 1 + int(different.int().argmax())
    return None


def _require_apart(outputs: list[list[Tensor]], batch: int) -> None:
    sizes = {t.shape[0] for t in outputs[0] if t.dim() > 0}
    if batch in sizes and batch + 1 not in sizes:
        raise BatchLayoutError(
            f"the model's output has {batch} rows for {batch + 1} samples: its batch is not the leading dimension of "
            "its inputs (sequence-first inputs?); give it batch-first inputs"
        )
    for first, second in zip(outputs[0], outputs[-1], strict=True):
        if first.dim() == 0 or first.shape[0] != batch + 1 or first.shape != second.shape:
            continue
        if not first.is_floating_point():
            continue
        a, b = first[:batch].float(), second[:batch].float()
        finite = a.isfinite() & b.isfinite()
        size = float(a[finite].abs().max()) if bool(finite.any()) else 0.0
        if bool(((a - b).abs()[finite] > 1e-4 * size).any()):
            raise BatchLayoutError(
                "the output for a sample changes with another of the batch: the inputs are sequence-first, or the "
                "model mixes samples (batch statistics, attention or a loss across the batch). Per-sample gradients "
                "do not exist for such a model"
            )
