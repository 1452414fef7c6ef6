"""Public errors of the package. Each message names what is at fault and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class DPBiTFiTError(Exception):
    """Base of every error that this package raises on purpose."""


class ConversionError(DPBiTFiTError):
    """A model cannot be converted as asked."""


class UnsupportedModuleError(ConversionError):
    """A parameter that should be trained lives in a module whose per-sample gradient is not known."""


class BatchLayoutError(DPBiTFiTError):
    """The rows of a tensor cannot be shown to be the samples of the batch.

    layers: the converted layers of which that was found, where it is known.
    """

    def __init__(self, message: str, layers: Sequence[Any] = ()):
        super().__init__(message)
        self.layers = tuple(layers)


class EngineError(DPBiTFiTError):
    """The privacy engine is used in a way that would void its guarantee."""


class OptimizerError(EngineError):
    """The optimizer does not fit the private model."""


class AccountingError(DPBiTFiTError):
    """Privacy parameters are invalid or a target cannot be met."""


class ClippingError(DPBiTFiTError):
    """A clipping method is invalid for the trained parameters."""


class SamplingError(DPBiTFiTError):
    """A data loader cannot be sampled privately."""


class CheckpointError(DPBiTFiTError):
    """A file is damaged, foreign or does not fit; nothing was changed."""


class BackendError(DPBiTFiTError):
    """A backend is missing or does not serve the device; names the reason."""


class OpError(DPBiTFiTError, ValueError):
    """An argument of an op has a wrong shape, dtype, device or value."""


def check_clip_scales(scale: float, gamma: float | None) -> None:
    """clip_factors multiplies by one and adds the other to a norm that may be 0."""
    for name, value in (("scale", scale), ("gamma", 1.0 if gamma is None else gamma)):
        if not (math.isfinite(value) and value > 0.0):
            raise OpError(f"clip_factors: {name} must be finite and positive, got {value}")


def check_one_device(op: str, *tensors: Tensor | None) -> None:
    """All on the device of the first."""
    for tensor in tensors:
        if tensor is not None and tensors[0] is not None and tensor.device != tensors[0].device:
            raise OpError(f"{op}: arguments are on {tensors[0].device} and on {tensor.device}: move them to one device")
