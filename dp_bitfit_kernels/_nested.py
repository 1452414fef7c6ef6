"""Tensors in the arguments and outputs of a model: nested tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from numbers import Integral, Number
from typing import Any

import torch
from torch import Tensor


def leaves_in(value: Any) -> Iterator[Any]:
    """Everything in nested tuples, lists, mappings and dataclasses that is none of these."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from leaves_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from leaves_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from leaves_in(getattr(value, f.name))
    else:
        yield value


Place = tuple[tuple[Any, int], ...]  # keys from the outside in, each with the number of those beside it


def held_in(value: Any, place: Place = (), known: set[int] | None = None) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor in them, and in the attributes of other objects among them (a cache), with its place."""
    known = set() if known is None else known
    if isinstance(value, Tensor):
        yield place, value
        return
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, tuple | list):
        items = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif value is None or callable(value) or isinstance(value, _PLAIN) or id(value) in known:
        return
    else:
        known.add(id(value))
        names = [*getattr(value, "__dict__", ()), *_slots(type(value))]
        items = [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    for key, item in items:
        yield from held_in(item, (*place, (key, len(items))), known)


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses."""
    return (leaf for leaf in leaves_in(value) if isinstance(leaf, Tensor))


def dense_in(tensor: Any) -> Iterator[Tensor]:
    """The tensors that hold its numbers: itself, or those inside a class that wraps some (torchao's weights)."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from dense_in(getattr(tensor, name))
    else:
        yield tensor


def plain_in(value: Any) -> Iterator[Any]:
    """Every number, word, flag and None in them."""
    return (leaf for leaf in leaves_in(value) if leaf is None or isinstance(leaf, _NUMBERS))


def strangers(value: Any) -> Iterator[str]:
    """Class names of what is neither a tensor, nor a plain value, nor a container of these: it may hold tensors."""
    for leaf in leaves_in(value):
        if not (leaf is None or callable(leaf) or isinstance(leaf, _PLAIN)):
            yield type(leaf).__name__


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


def form(value: Any, numbers: bool = False) -> tuple[Any, ...]:
    """What stays the same of a call when the batch or the lengths change: where its tensors are, and of how many
    dimensions; of the rest, what is None, and flags, words and members of enumerations; ``numbers``: whole ones, too.
    """
    if isinstance(value, Tensor):
        return (value.dim(),)
    if isinstance(value, Mapping):
        return tuple((str(key), form(item, numbers)) for key, item in value.items())
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ("words",)  # one a sample, often
    if isinstance(value, tuple | list):
        return tuple(form(item, numbers) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple((f.name, form(getattr(value, f.name), numbers)) for f in dataclasses.fields(value))
    if isinstance(value, bool | str | Enum) or (numbers and isinstance(value, Integral)):
        return (value,)
    return (value is None,)


_NUMBERS = (Number, str, Enum)  # numbers of NumPy, too
_PLAIN = (Tensor, *_NUMBERS, set, frozenset, torch.dtype, torch.device, torch.memory_format, slice, range)
