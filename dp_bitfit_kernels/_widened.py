"""Runs a model in a wider dtype, without a copy of it: for asking what rounding would hide, or make up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

HALF = (torch.bfloat16, torch.float16)
_NARROW = {torch.float32: HALF, torch.float64: (*HALF, torch.float32)}


class Widened(TorchDispatchMode):
    """Operations see float32 in the place of bfloat16 and float16, or float64 in that of all three, and make it where
    these are asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype, self._narrow = dtype, _NARROW[dtype]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own_args, own_kwargs = tree_map(self._wide, (args, kwargs or {}))
        made = func(*own_args, **own_kwargs)
        if func._schema.is_mutable and args and isinstance(args[0], Tensor) and args[0].dtype in self._narrow:
            return args[0].copy_(own_args[0])  # written in place: a parameter, a buffer, an input
        return made

    def _wide(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._dtype) if value.dtype in self._narrow else value
        return self._dtype if isinstance(value, torch.dtype) and value in self._narrow else value
