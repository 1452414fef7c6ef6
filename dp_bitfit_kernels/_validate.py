"""Public errors of the package. Each message names what is at fault and what to do."""

from __future__ import annotations


class DPBiTFiTError(Exception):
    """Base of every error that this package raises on purpose."""


class ConversionError(DPBiTFiTError):
    """A model cannot be converted as asked."""


class UnsupportedModuleError(ConversionError):
    """A parameter that should be trained lives in a module whose per-sample gradient is not known."""


class BatchLayoutError(DPBiTFiTError):
    """The rows of a tensor cannot be shown to be the samples of the batch."""


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
