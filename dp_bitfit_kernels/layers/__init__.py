"""Converted layers, one file a family, and the registry that finds the family of a module."""

from __future__ import annotations

from . import activation, added, attention, conv, embedding, linear, norm, pool, prompts
from .base import (
    BiasLayer,
    ConvertedLayer,
    LayerKind,
    convert_layer,
    is_converted,
    lookup,
    register,
    register_lazy,
    restore_layer,
)

__all__ = [
    "BiasLayer",
    "ConvertedLayer",
    "LayerKind",
    "activation",
    "added",
    "attention",
    "conv",
    "convert_layer",
    "embedding",
    "is_converted",
    "linear",
    "lookup",
    "norm",
    "pool",
    "prompts",
    "register",
    "register_lazy",
    "restore_layer",
]
