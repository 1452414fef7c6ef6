"""Linear layers: nn.Linear and the transposed Conv1D of transformers."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arrangement import by_sample
from ..weight_uses import Product
from .base import BiasLayer, LayerKind, register, register_lazy


class LinearLayer(BiasLayer):
    """y = x W^T + b, x [B, ..., d], y [B, ..., p]."""

    sinkable = frozenset({"weight"})
    weight: Tensor

    def forward(self, input: Tensor) -> Any:
        if input.dim() < 2 and self.unbatched():
            return super().forward(input)
        output = F.linear(input, self.plain_weight(), self.plain_bias())
        return self.tap(self.weighed(output, input, linear_use))


class Conv1DLayer(BiasLayer):
    """transformers' Conv1D: y = x W + b with W [d, p]."""

    sinkable = frozenset({"weight"})
    weight: Tensor
    nf: int

    def forward(self, x: Tensor) -> Any:
        if x.dim() < 2 and self.unbatched():
            return super().forward(x)
        flat = torch.addmm(self.plain_bias(), x.view(-1, x.size(-1)), self.plain_weight())  # type: ignore[arg-type]
        return self.tap(self.weighed(flat.view(*x.shape[:-1], self.nf), x, _turned_use))


def _samples(x: Tensor, kind: str | None, batch: int) -> Tensor:
    """x [B, ..., d], or as ``kind`` of an arrangement says, as [B, T, d]."""
    width = x.shape[-1]
    return (x if kind is None else by_sample(x, kind, batch)).reshape(batch, x.numel() // max(1, batch * width), width)


def linear_use(grad: Tensor, inputs: Tensor, kind: str | None, batch: int, first: int = 0) -> Product:
    return Product(_samples(grad, kind, batch), _samples(inputs, kind, batch), first)


def _turned_use(grad: Tensor, inputs: Tensor, kind: str | None, batch: int) -> Product:
    return Product(_samples(inputs, kind, batch), _samples(grad, kind, batch))


register(LayerKind("linear", nn.Linear, LinearLayer, whole_names=("weight", "bias")))


def _find_conv1d(cls: type) -> LayerKind | None:
    utils = sys.modules.get("transformers.pytorch_utils")
    base = getattr(utils, "Conv1D", None)
    if base is None or not issubclass(cls, base) or cls.forward is not base.forward:  # type: ignore[attr-defined]
        return None
    return LayerKind("transformers conv1d", base, Conv1DLayer, whole_names=("weight", "bias"))


register_lazy(_find_conv1d)
