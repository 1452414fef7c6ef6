"""Differentially private bias-term fine-tuning (DP-BiTFiT) for PyTorch models.

Bu et al., "Differentially Private Bias-Term Fine-tuning of Foundation Models", arXiv 2210.00036.
"""

from __future__ import annotations

from . import _extension

_extension.load()

from . import clipping, presets
from ._validate import (
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
from .capture import CapturedStep, capture_step
from .check import ModelCheck, check_model
from .checkpoint import load_biases, save_biases
from .convert import conversion_report, convert_model, restore_model
from .engine import PrivacyEngine
from .memory_report import MemoryReport, memory_report
from .phases import Phase

__version__ = "0.1.0"

__all__ = [
    "AccountingError",
    "BackendError",
    "BatchLayoutError",
    "CapturedStep",
    "CheckpointError",
    "ClippingError",
    "ConversionError",
    "DPBiTFiTError",
    "EngineError",
    "MemoryReport",
    "ModelCheck",
    "OpError",
    "OptimizerError",
    "Phase",
    "PrivacyEngine",
    "SamplingError",
    "UnsupportedModuleError",
    "capture_step",
    "check_model",
    "clipping",
    "conversion_report",
    "convert_model",
    "load_biases",
    "memory_report",
    "presets",
    "restore_model",
    "save_biases",
]
