"""Runs a model of half precision in float32, without a copy of it: for asking what rounding would hide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

HALF = (torch.bfloat16, torch.float16)


class InFloat32(TorchDispatchMode):
    """Operations see float32 in the place of bfloat16 and float16, and make it where these are asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own_args, own_kwargs = tree_map(_wide, (args, kwargs or {}))
        made = func(*own_args, **own_kwargs)
        if func._schema.is_mutable and args and isinstance(args[0], Tensor) and args[0].dtype in HALF:
            return args[0].copy_(own_args[0])  # written in place: a parameter, a buffer, an input
        return made


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value
