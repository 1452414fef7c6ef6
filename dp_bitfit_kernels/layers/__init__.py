"""Converted layers, one file a family, and the registry that finds the family of a module."""

from __future__ import annotations

from . import conv, linear, norm
from .base import BiasLayer, LayerKind, convert_layer, is_converted, lookup, register, register_lazy, restore_layer

__all__ = [
    "BiasLayer",
    "LayerKind",
    "conv",
    "convert_layer",
    "is_converted",
    "linear",
    "lookup",
    "norm",
    "register",
    "register_lazy",
    "restore_layer",
]
