"""Which rows of a tensor are the samples: found from the model's inputs, proven by one more sample.

A leading dimension that equals the batch size proves nothing (a sequence-first tensor with T = B has it, too, and so
has a table with B rows). It must also follow when the batch grows: so the model is run once on its own inputs with one
row repeated, without gradients, and each converted layer's output must then have B + 1 rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
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


def prove(model: nn.Module, args: Any, kwargs: Any, batch: int, layers: list[BiasLayer]) -> None:
    """Run ``model`` on B + 1 rows without gradients and require B + 1 rows of every converted layer.

    The generators' state and the buffers are as before afterwards.

    Raises:
        BatchLayoutError: naming the layer whose leading dimension does not follow the batch, or telling that
            the model cannot be run with one more row.
    """

    def grow(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != batch:
            return tensor
        return torch.cat([tensor, tensor[:1]])

    args, kwargs = _map_tensors((args, kwargs), grow)
    faults: list[str] = []

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and (output.dim() < 2 or output.shape[0] != batch + 1):
            faults.append(f"{module.layer_name!r} gives shape {tuple(output.shape)} for {batch + 1} samples")

    handles = [layer.register_forward_hook(look) for layer in layers if layer.trained]
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            model(*args, **kwargs)
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
            + "; layer ".join(faults)
            + ". Sequence-first inputs, tables without a batch dimension and folded or flattened batches give wrong "
            "per-sample gradients; make the layer's input batch-first, or leave its bias frozen"
        )
