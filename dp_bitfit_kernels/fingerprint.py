"""What a captured graph has built in beside memory: the model as Python has it, and the kind of a batch."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._validate import EngineError
from .layers import ConvertedLayer
from .layers.base import STATE
from .layout import modules_of

_PLAIN = frozenset((int, float, bool, str, type(None)))
_DICTS = frozenset((dict, OrderedDict))
_KNOWN = frozenset(("training", "_modules", "_non_persistent_buffers_set"))
_DEPTH = 3


class Fingerprint:
    """What graphs have built in of the model: its modules, hooks and attributes, and where its tensors lie.

    Of a tensor: address, shape, strides, dtype, and whether it wants a gradient; not its values, which are read anew.
    Of plain values the value, also inside tuples, lists, dicts and configurations; of anything else, which object it
    is. Two are equal where a graph captured at one serves the other.
    """

    def __init__(self, model: nn.Module, memory: tuple[Any, ...]):
        self._objects: list[Any] = []  # kept, so that no other object gets their identity
        self._seen: set[int] = set()
        self._parts: list[Any] = [memory]
        for module in modules_of(model):
            own = module.__dict__
            self._parts.append(self._object(module))
            skipped = STATE if isinstance(module, ConvertedLayer) else ()
            for name, value in own.items():
                kind = type(value)
                if kind in _DICTS and not value:  # most are empty dictionaries of hooks
                    continue
                if name not in _KNOWN and name not in skipped:
                    self._parts.append(value if kind in _PLAIN else self._token(value, 0))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self._parts == other._parts

    __hash__ = None  # type: ignore[assignment]

    def _object(self, value: Any) -> int:
        self._objects.append(value)
        return id(value)

    def _token(self, value: Any, depth: int) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Tensor):
            if value.layout != torch.strided:
                return self._object(value)
            return value.data_ptr(), value.shape, value.stride(), value.dtype, value.requires_grad
        if isinstance(value, nn.Module):
            return self._object(value)
        if isinstance(value, (tuple, list, dict)):
            items = value.values() if isinstance(value, dict) else value
            return [self._token(item, depth + 1) for item in items] if depth < _DEPTH else self._object(value)
        shared = id(value) in self._seen
        if shared or depth == _DEPTH or not hasattr(value, "to_dict"):
            return self._object(value)
        self._seen.add(id(value))  # a configuration, which many modules share: looked at once
        return [self._object(value), self._token(dict(vars(value)), depth + 1)]


def outline(value: Any) -> Any:
    """The structure of a batch with its tensors' shapes and its plain values, to compare and to look up by."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, outline(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(outline, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(outline(getattr(value, field.name)) for field in dataclasses.fields(value))
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device):
        return type(value), value
    raise EngineError(f"a captured step takes tensors and plain values, got {type(value).__name__}")
