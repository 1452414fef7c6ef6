"""Tensors in the arguments and outputs of a model: nested tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor


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


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return (
            type(value)({k: map_tensors(v, change) for k, v in value.items()})
            if type(value) is dict
            else _mapping(value, change)
        )
    if isinstance(value, Mapping):
        return _mapping(value, change)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, change) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, change) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def _mapping(value: Mapping[Any, Any], change: Callable[[Tensor], Tensor]) -> Any:
    # Mapping classes of other libraries take a plain dict: a batch encoding, an ordered dict.
    return type(value)({k: map_tensors(v, change) for k, v in value.items()})  # type: ignore[call-arg]


def plain_in(value: Any) -> Iterator[Any]:
    """Every number, word, flag and None in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from plain_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from plain_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from plain_in(getattr(value, f.name))
    elif value is None or isinstance(value, bool | int | float | complex | str | Enum):
        yield value


def form(value: Any, numbers: bool = False) -> tuple[Any, ...]:
    """What stays the same of a call when the batch or the lengths change: where its tensors are, and of how many
    dimensions; of the rest, what is None, and flags, words and members of enumerations; ``numbers``: whole ones, too.
    """
    if isinstance(value, Tensor):
        return (value.dim(),)
    if isinstance(value, Mapping):
        return tuple((str(key), form(item, numbers)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return tuple(form(item, numbers) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple((f.name, form(getattr(value, f.name), numbers)) for f in dataclasses.fields(value))
    if isinstance(value, bool | str | Enum) or (numbers and isinstance(value, int)):
        return (value,)
    return (value is None,)


def strangers(value: Any) -> Iterator[str]:
    """Class names of what is neither a tensor, nor a plain value, nor a container of these: it may hold tensors."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from strangers(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from strangers(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from strangers(getattr(value, f.name))
    elif not (value is None or callable(value) or isinstance(value, _PLAIN)):
        yield type(value).__name__


_PLAIN = (Tensor, bool, int, float, complex, str, Enum, torch.dtype, torch.device, torch.memory_format, slice, range)
