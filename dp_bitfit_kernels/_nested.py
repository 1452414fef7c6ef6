"""Tensors in the arguments and outputs of a model: nested tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import Enum
from numbers import Integral, Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._validate import BatchLayoutError


def leaves_in(value: Any, around: tuple[int, ...] = ()) -> Iterator[Any]:
    """Everything in nested tuples, lists, mappings and dataclasses that is none of these.

    around: ids of those that it is in, for what holds itself.
    """
    items: Iterable[Any]
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, tuple | list):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = (getattr(value, f.name) for f in dataclasses.fields(value))
    else:
        yield value
        return
    if id(value) not in around:
        for item in items:
            yield from leaves_in(item, (*around, id(value)))


Place = tuple[tuple[Any, int], ...]  # keys from the outside in, each with the number of those beside it


def held_in(value: Any, place: Place = (), known: dict[int, Any] | None = None) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor in them, in other collections, and in the attributes of objects (a cache, a distribution), with its
    place. Not looked into: modules, classes.

    Raises:
        BatchLayoutError: there is an iterator, which can be read but once.
    """
    known = {} if known is None else known
    if isinstance(value, Tensor):
        yield place, value
    elif value is None or isinstance(value, _CLOSED) or id(value) in known:
        return
    if isinstance(value, Iterator):
        raise BatchLayoutError(
            f"the model returns a {type(value).__name__}: what it holds cannot be asked. Return a list of it"
        )
    known[id(value)] = value  # alive, so that no other has its id
    items = list(_items(value))
    for key, item in items:
        yield from held_in(item, (*place, (key, len(items))), known)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """(key, item) of what a collection, a function or another object holds."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, Collection) and not isinstance(value, Tensor | np.ndarray):
        yield from enumerate(value)
    elif isinstance(value, functools.partial):
        yield from enumerate((value.func, value.args, value.keywords))
    elif isinstance(value, types.FunctionType | types.MethodType):
        cells = getattr(value, "__closure__", None) or ()
        yield from enumerate([cell.cell_contents for cell in cells if cell != types.CellType()])
        yield "self", getattr(value, "__self__", None)
    for name in [*getattr(value, "__dict__", ()), *_slots(type(value))]:
        if not isinstance(value, types.FunctionType) and hasattr(value, name):
            yield name, getattr(value, name)


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            yield f"_{base.__name__.lstrip('_')}{name}" if private else name


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
_OF_TORCH = (torch.dtype, torch.device, torch.memory_format)
_PLAIN = (Tensor, *_NUMBERS, set, frozenset, *_OF_TORCH, slice, range)
_CLOSED = (
    *(*_NUMBERS, bytes, *_OF_TORCH, slice, range),
    *(nn.Module, type, types.ModuleType, types.BuiltinFunctionType, weakref.ref),
)
