"""Differentially private bias-term fine-tuning (DP-BiTFiT) for PyTorch models.

Bu et al., "Differentially Private Bias-Term Fine-tuning of Foundation Models", arXiv 2210.00036.
"""

from __future__ import annotations

from . import _extension

_extension.load()

from . import clipping  # noqa: E402 - the compiled ops must be there before anything looks for them
from ._validate import (  # noqa: E402
    AccountingError,
    BackendError,
    BatchLayoutError,
    CheckpointError,
    ClippingError,
    ConversionError,
    DPBiTFiTError,
    EngineError,
    OpError,
    OptimizerError,
    SamplingError,
    UnsupportedModuleError,
)
from .checkpoint import load_biases, save_biases  # noqa: E402
from .convert import conversion_report, convert_model, restore_model  # noqa: E402
from .engine import PrivacyEngine  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AccountingError",
    "BackendError",
    "BatchLayoutError",
    "CheckpointError",
    "ClippingError",
    "ConversionError",
    "DPBiTFiTError",
    "EngineError",
    "OpError",
    "OptimizerError",
    "PrivacyEngine",
    "SamplingError",
    "UnsupportedModuleError",
    "clipping",
    "conversion_report",
    "convert_model",
    "load_biases",
    "restore_model",
    "save_biases",
]
