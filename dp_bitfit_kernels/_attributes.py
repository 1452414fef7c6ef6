"""What modules hold beside parameters, buffers and submodules: counters, caches, tensors; put back after each trial."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .layers.base import STATE

_ABSENT = object()
_OF_MODULES = frozenset(vars(nn.Module())) | frozenset(STATE)
_COLLECTIONS = (dict, list, set)
_Known = dict[int, tuple[Tensor, int, Tensor]]  # id of a tensor -> itself, so that it lives, its version, a copy


class Attributes:
    """Of all modules of a model, as they are now.

    Put back are which object each attribute is, the items of plain dicts, lists and sets, and the values of tensors
    that were changed in place: what a forward builds at its first call it builds at each.
    """

    def __init__(self, model: nn.Module, known: _Known):
        """known: copies of tensors that were made before, by id; more are added."""
        self._modules = [(f"{name}." if name else "", module) for name, module in model.named_modules()]
        self._bound = [{k: v for k, v in vars(m).items() if k not in _OF_MODULES} for _, m in self._modules]
        values = [value for own in self._bound for value in own.values()]
        self._items = [(value, value.copy()) for value in values if type(value) in _COLLECTIONS]
        self._tensors = known
        for value in values:
            if isinstance(value, Tensor) and _plain(value):
                before = known.get(id(value))
                if before is None or before[1] != value._version:
                    known[id(value)] = value, value._version, value.detach().clone()

    def _now(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        for (prefix, module), bound in zip(self._modules, self._bound, strict=True):
            yield prefix, vars(module), bound

    def written(self) -> dict[str, Any]:
        """Numbers and tensors that are not what they were, by name; tensors are copies."""
        found: dict[str, Any] = {}
        for prefix, now, bound in self._now():
            for key, value in now.items():
                if key in _OF_MODULES:
                    continue
                self._note(found, prefix + key, value, bound.get(key, _ABSENT))
                if type(value) in _COLLECTIONS:
                    items = value.items() if isinstance(value, dict) else enumerate(value)
                    for place, item in items:
                        self._note(found, f"{prefix}{key}[{place!r}]", item, _ABSENT)
        return found

    def _note(self, found: dict[str, Any], name: str, value: Any, before: Any) -> None:
        if isinstance(value, Tensor) and _plain(value):
            known = self._tensors.get(id(value))
            if value is not before or known is None or value._version != known[1]:
                found[name] = value.detach().clone()
        elif isinstance(value, int | float) and value is not before:
            found[name] = value

    def put_back(self) -> None:
        for _, now, bound in self._now():
            for key in [key for key in now if key not in _OF_MODULES and key not in bound]:
                del now[key]
            for key, value in bound.items():
                if now.get(key, _ABSENT) is not value:
                    now[key] = value
        for collection, items in self._items:
            if isinstance(collection, list):
                collection[:] = items
            else:
                collection.clear()
                collection.update(items)
        for known, (tensor, version, numbers) in self._tensors.items():
            if tensor._version != version:
                tensor.detach().copy_(numbers)
                self._tensors[known] = tensor, tensor._version, numbers


def _plain(tensor: Tensor) -> bool:
    """Whether its numbers can be compared and written: no part of it lies on another, and it has some."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or tensor.is_inference():
        return False
    own = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return own and all(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def differ(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Names of numbers and tensors that are not the same after two runs."""
    return [name for name in first.keys() & last.keys() if not _same(first[name], last[name])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and (a == b or a != a)
