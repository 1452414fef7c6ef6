"""Linear layers: nn.Linear and the transposed Conv1D of transformers."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import WeightGradFunction, apply
from .base import BiasLayer, LayerKind, register, register_lazy


class LinearLayer(BiasLayer):
    """y = x W^T + b, x [B, ..., d], y [B, ..., p]."""

    weight: Tensor

    def forward(self, input: Tensor) -> Any:
        if input.dim() < 2 and self.unbatched():
            return super().forward(input)
        private = "weight" in self.trained and self.attachment is not None
        weight = self.weight.detach() if private else self.weight
        output = F.linear(input, weight, self.plain_bias())
        if private and self.recording():
            self.check_rows(output)
            output = apply(WeightGradFunction, output, input.detach(), self.weight_rows, self.kind)
        return self.tap(output)


class Conv1DLayer(BiasLayer):
    """transformers' Conv1D: y = x W + b with W [d, p]."""

    weight: Tensor
    nf: int

    def forward(self, x: Tensor) -> Any:
        if x.dim() < 2 and self.unbatched():
            return super().forward(x)
        flat = torch.addmm(self.plain_bias(), x.view(-1, x.size(-1)), self.weight)  # type: ignore[arg-type]
        return self.tap(flat.view(*x.shape[:-1], self.nf))


register(LayerKind("linear", nn.Linear, LinearLayer, whole_names=("weight", "bias")))


def _find_conv1d(cls: type) -> LayerKind | None:
    utils = sys.modules.get("transformers.pytorch_utils")
    base = getattr(utils, "Conv1D", None)
    if base is None or not issubclass(cls, base) or cls.forward is not base.forward:  # type: ignore[attr-defined]
        return None
    return LayerKind("transformers conv1d", base, Conv1DLayer)


register_lazy(_find_conv1d)
