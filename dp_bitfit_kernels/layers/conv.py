"""Convolutions: the bias is dimension 1 of the output."""

from __future__ import annotations

from torch import Tensor, nn

from .base import BiasLayer, LayerKind, register


class ConvLayer(BiasLayer):
    """y [B, p, ...] = conv(x [B, d, ...], W) + b."""

    channels_first = True
    weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.weight, self.plain_bias())  # type: ignore[operator]
        return self.tap(output)


for _base in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(LayerKind(_base.__name__.lower(), _base, ConvLayer, methods=("forward", "_conv_forward")))
