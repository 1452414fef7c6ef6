"""Which implementation of the ops serves a device: one contract, three backends."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _extension, _ops, reference, reference_backward, reference_weights
from ._validate import BackendError

NAMES = ("auto", "reference", "native", "triton")

# Fastest first, for each device type; the reference serves everything.
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "reference"),
    "cuda": ("native", "triton", "reference"),
}


@dataclass(frozen=True)
class Backend:
    """The ops of one backend, all with the arguments of ``_ops.SCHEMAS``."""

    name: str
    bias_grad: Callable[[Tensor], Tensor]
    bias_grad_: Callable[[Tensor, Tensor], None]
    clip_factors: Callable[..., tuple[Tensor, Tensor]]
    clipped_sum_: Callable[..., None]
    noisy_sum: Callable[..., Tensor]
    noisy_sum_: Callable[..., None]
    random_words: Callable[..., Tensor]
    pack_bits: Callable[[Tensor], Tensor]
    clamp_pack: Callable[..., tuple[Tensor, Tensor]]
    clamp_pack_: Callable[..., Tensor]
    bit_scale: Callable[..., tuple[Tensor, Tensor]]
    activation_grad: Callable[..., tuple[Tensor, Tensor]]
    slope_pack: Callable[..., tuple[Tensor, Tensor]]
    slope_scale: Callable[..., tuple[Tensor, Tensor]]
    level_pack: Callable[[Tensor, Tensor], Tensor]
    level_scale: Callable[..., tuple[Tensor, Tensor]]
    quantize_norm: Callable[..., tuple[Tensor, Tensor]]
    layer_norm_grad: Callable[..., tuple[Tensor, Tensor]]
    group_norm_grad: Callable[..., tuple[Tensor, Tensor]]
    affine_grad: Callable[..., tuple[Tensor, Tensor]]
    # Compiled for CPUs alone: elsewhere these do, of which ``weights`` asks for the sums by numbers only.
    clipped_index_sum_: Callable[..., None] = reference_weights.clipped_index_sum_
    clipped_outer_sum_: Callable[..., None] = reference_weights.clipped_outer_sum_
    ghost_squares: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = reference_weights.ghost_squares
    scale_grad: Callable[..., Tensor] = reference_weights.scale_grad


def _from(name: str, *sources: Any) -> Backend:
    found = {op: getattr(source, op) for source in sources for op in _ops.SCHEMAS if hasattr(source, op)}
    return Backend(name, **found)


def _from_dispatcher() -> Backend:
    # The one overload of each: a call by the op's name alone looks for the overload, once a layer and step.
    return Backend("native", **{op: getattr(torch.ops.dp_bitfit_kernels, op).default for op in _ops.SCHEMAS})


def unavailable(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot serve ``device_type``; None where it can."""
    if name == "reference":
        return None
    if name == "native":
        return _extension.native_available(device_type)
    if device_type != "cuda" and device_type != "xpu":
        return f"Triton kernels do not run on {device_type!r} tensors"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


@cache
def _backend(name: str) -> Backend:
    if name == "reference":
        return _from(name, reference, reference_backward, reference_weights)
    if name == "native":
        return _from_dispatcher()
    return _from(name, importlib.import_module("dp_bitfit_kernels.kernels"))


def select(name: str, device: torch.device | str) -> Backend:
    """The backend ``name`` for ``device``; ``"auto"`` takes the fastest that is available.

    Raises:
        BackendError: unknown name, or a backend named outright that cannot serve the device.
    """
    return serving(name, torch.device(device).type)


@cache
def serving(name: str, device_type: str) -> Backend:
    """As :func:`select`, by the type of the device: remembered, for what runs once a layer and step."""
    if name not in NAMES:
        raise BackendError(f"backend={name!r} is unknown: choose one of {', '.join(NAMES)}")
    if name == "auto":
        candidates = _PREFERENCE.get(device_type, ("reference",))
        return _backend(next(c for c in candidates if unavailable(c, device_type) is None))
    reason = unavailable(name, device_type)
    if reason is not None:
        raise BackendError(f"backend={name!r} cannot serve {device_type!r} tensors: {reason}; use backend='auto'")
    return _backend(name)
