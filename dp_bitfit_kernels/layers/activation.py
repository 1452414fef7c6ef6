"""Element-wise modules, swapped for what they keep: bits (ReLU, dropout), one tensor or less (GELU, SiLU)."""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import apply
from ..functional_pointwise import ActivationFunction, ClampFunction, DropoutFunction, LevelFunction, activate
from ..reference_backward import KINDS
from .base import ConvertedLayer, LayerKind, register, register_lazy

_ALWAYS = ("exact", "compact")


class ClampLayer(ConvertedLayer):
    """ReLU, ReLU6, Hardtanh, LeakyReLU."""

    keeps_little = True

    def limits(self) -> tuple[float, float, float]:
        """low, high (NaN: none) and the slope below low."""
        m: Any = self
        if isinstance(m, nn.Hardtanh):  # ReLU6 is one
            return m.min_val, m.max_val, 0.0
        return 0.0, math.nan, m.negative_slope if isinstance(m, nn.LeakyReLU) else 0.0

    def forward(self, input: Tensor) -> Any:
        if not self.lean or not input.requires_grad or not input.is_floating_point():
            return super().forward(input)
        inplace: bool = self.inplace  # type: ignore[assignment]
        return apply(ClampFunction, input, *self.limits(), inplace, self.layer_name, self.backend)


class DropoutLayer(ConvertedLayer):
    p: float
    keeps_little = True

    def forward(self, input: Tensor) -> Any:
        served = self.lean and self.training and 0.0 < self.p < 1.0 and input.requires_grad and input.numel() > 0
        if not served or not input.is_floating_point():
            return super().forward(input)
        inplace: bool = self.inplace  # type: ignore[assignment]
        return apply(DropoutFunction, input, self.p, inplace, self.layer_name, self.backend)


class ActivationLayer(ConvertedLayer):
    """An activation with a formula of its own; where the module's settings make it another, its own forward runs."""

    rounds_constants = False  # to float32: in float64 it is another function

    def formula(self) -> tuple[int, bool] | None:
        """Number of the activation, and whether the module spells it out in several operations."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Any:
        formula = self.formula() if self.lean and input.requires_grad and input.is_floating_point() else None
        if formula is not None and formula[1] and input.dtype == torch.float64 and self.rounds_constants:
            formula = None
        if formula is None:
            return super().forward(input)
        kind = formula[0]
        if self.memory == "compact" and input.dtype != torch.float64:
            operation = partial(activate, kind=kind)
            return apply(LevelFunction, input, KINDS[kind], operation, self.layer_name, self.backend)
        return apply(ActivationFunction, input, *formula, self.layer_name, self.backend)


class TanhLayer(ConvertedLayer):
    """Autograd keeps its output, which is all that an exact gradient needs; compact keeps less."""

    def forward(self, input: Tensor) -> Any:
        if not self.lean or not input.requires_grad or not input.is_floating_point() or input.dtype == torch.float64:
            return super().forward(input)
        return apply(LevelFunction, input, "tanh", torch.tanh, self.layer_name, self.backend)


class GELULayer(ActivationLayer):
    approximate: str

    def formula(self) -> tuple[int, bool]:
        return KINDS.index("gelu" if self.approximate == "none" else "gelu_tanh"), False


class SiLULayer(ActivationLayer):
    def formula(self) -> tuple[int, bool] | None:
        return None if getattr(self, "inplace", False) else (KINDS.index("silu"), False)


class ActGELULayer(ActivationLayer):
    """transformers' GELUActivation and GELUTanh: they call ``self.act``, torch's operation or the formula in Python."""

    kind = "gelu"

    def formula(self) -> tuple[int, bool]:
        act: Any = self.act
        return KINDS.index(self.kind), getattr(act, "func", act) is not F.gelu


class ActGELUTanhLayer(ActGELULayer):
    kind = "gelu_tanh"


class SpelledGELULayer(ActivationLayer):
    """transformers' NewGELU, FastGELU and AccurateGELU: the tanh formula in several operations."""

    def formula(self) -> tuple[int, bool]:
        return KINDS.index("gelu_tanh"), True


class FastGELULayer(SpelledGELULayer):
    rounds_constants = True


class QuickGELULayer(ActivationLayer):
    def formula(self) -> tuple[int, bool]:
        return KINDS.index("quick_gelu"), True


def _kind(base: type[nn.Module], mixin: type[ConvertedLayer], name: str = "", keeps_less: Any = _ALWAYS) -> LayerKind:
    return LayerKind(name or base.__name__.lower(), base, mixin, bias_names=(), whole_names=(), keeps_less=keeps_less)


for _base in (nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, nn.ReLU):
    register(_kind(_base, ClampLayer))
register(_kind(nn.Dropout, DropoutLayer))
register(_kind(nn.GELU, GELULayer))
register(_kind(nn.SiLU, SiLULayer))
register(_kind(nn.Tanh, TanhLayer, keeps_less=("compact",)))

_OF_TRANSFORMERS: dict[str, type[ActivationLayer]] = {
    "GELUActivation": ActGELULayer,
    "GELUTanh": ActGELUTanhLayer,
    "PytorchGELUTanh": SpelledGELULayer,
    "NewGELUActivation": SpelledGELULayer,
    "FastGELUActivation": FastGELULayer,
    "AccurateGELUActivation": SpelledGELULayer,
    "QuickGELUActivation": QuickGELULayer,
    "SiLUActivation": SiLULayer,
}


def _find_activation(cls: type) -> LayerKind | None:
    mixin = _OF_TRANSFORMERS.get(cls.__name__)
    activations = sys.modules.get("transformers.activations")
    if mixin is None or activations is None or getattr(activations, cls.__name__, None) is not cls:
        return None
    return _kind(cls, mixin, "transformers " + cls.__name__.lower())


register_lazy(_find_activation)
