"""Convolutions: the bias is dimension 1 of the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional_window import ConvFunction, Window
from .base import BiasLayer, LayerKind, register


class ConvLayer(BiasLayer):
    """y [B, p, ...] = conv(x [B, d, ...], W) + b."""

    channels_first = True
    keeps_little = True
    weight: Tensor

    def forward(self, input: Tensor) -> Any:
        if input.dim() < len(self.kernel_size) + 2 and self.unbatched():  # type: ignore[arg-type]
            return super().forward(input)
        window = self.window(input) if self.lean or self.traced() else None
        if window is None:
            output: Tensor = self._conv_forward(input, self.weight, self.plain_bias())  # type: ignore[operator]
            return self.tap(output)
        return self.through(ConvFunction, input, self.weight, self.plain_bias(), window, self.layer_name, self.backend)

    def traced(self) -> bool:
        """Under torch.compile a convolution's backward has the input as an argument, which nothing can leave out."""
        return self.memory != "off" and torch.compiler.is_compiling() and self.gives_all_gradients()

    def gives_all_gradients(self) -> bool:
        bias = self._parameters["bias"]
        return not self.weight.requires_grad and (bias is None or not bias.requires_grad or "bias" in self.trained)

    def window(self, input: Tensor) -> Window | None:
        """The geometry where ConvFunction serves: padding by zeros, and a batch."""
        m: Any = self
        padding = m.padding
        if padding == "valid":
            padding = (0,) * len(m.kernel_size)
        elif padding == "same":
            total = [spread * (size - 1) for spread, size in zip(m.dilation, m.kernel_size, strict=True)]
            if any(extent % 2 for extent in total):  # more on one side than on the other
                return None
            padding = tuple(extent // 2 for extent in total)
        if input.dim() != len(m.kernel_size) + 2 or m.padding_mode != "zeros":
            return None
        return Window(m.stride, padding, m.dilation, m.groups)


for _base in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(
        LayerKind(
            _base.__name__.lower(),
            _base,
            ConvLayer,
            methods=("forward", "_conv_forward"),
            keeps_less=("exact", "compact"),
        )
    )
