"""Convolutions: the bias is dimension 1 of the output."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arrangement import by_sample
from ..functional_window import ConvFunction, Window
from ..weight_uses import Convolution, Folded, Use
from .base import BiasLayer, LayerKind, register


class ConvLayer(BiasLayer):
    """y [B, p, ...] = conv(x [B, d, ...], W) + b."""

    channels_first = True
    keeps_little = True
    sinkable = frozenset({"weight"})
    weight: Tensor

    def forward(self, input: Tensor) -> Any:
        if input.dim() < len(self.kernel_size) + 2 and self.unbatched():  # type: ignore[arg-type]
            return super().forward(input)
        window = self.window(input) if self.lean or self.traced() else None
        if window is None:
            output: Tensor = self._conv_forward(input, self.plain_weight(), self.plain_bias())  # type: ignore[operator]
            return self.tap(self.told(output, input))
        weight = self.plain_weight()
        output = self.through(ConvFunction, input, weight, self.plain_bias(), window, self.layer_name, self.backend)
        return self.told(output, input)

    def told(self, output: Tensor, input: Tensor) -> Tensor:
        """``output``, whose gradient also gives the weight's."""
        if not self.private_weight:
            return output
        m: Any = self
        window, padded = self.window(input), None
        if window is None:
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            padded = (tuple(m._reversed_padding_repeated_twice), mode)
            window = Window(m.stride, (0,) * len(m.kernel_size), m.dilation, m.groups)
        return self.weighed(output, input, partial(_use, window=window, kernel=tuple(m.kernel_size), padded=padded))

    def traced(self) -> bool:
        """Under torch.compile a convolution's backward has the input as an argument, which nothing can leave out."""
        return self.memory != "off" and torch.compiler.is_compiling() and self.gives_all_gradients()

    def gives_all_gradients(self) -> bool:
        bias = self._parameters["bias"]
        given = self.private_weight or not self.weight.requires_grad
        return given and (bias is None or not bias.requires_grad or "bias" in self.trained)

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


def convolution_use(
    grad: Tensor, inputs: Tensor, kind: str | None, batch: int, window: Window, kernel: tuple[int, ...]
) -> Use:
    """What ``grad`` [n, p, ...] and ``inputs`` [n, c, ...] say of the weight; n = k B where windows are folded."""
    if kind is None or grad.shape[0] == batch:
        return Convolution(grad, inputs, window, kernel)
    grad, inputs = (by_sample(x, kind, batch).reshape(x.shape) for x in (grad, inputs))
    return Folded(Convolution(grad, inputs, window, kernel), batch)


def _use(
    grad: Tensor,
    inputs: Tensor,
    kind: str | None,
    batch: int,
    window: Window,
    kernel: tuple[int, ...],
    padded: tuple[tuple[int, ...], str] | None,
) -> Use:
    if padded is not None:
        inputs = F.pad(inputs, padded[0], mode=padded[1])
    return convolution_use(grad, inputs, kind, batch, window, kernel)


for _base in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(
        LayerKind(
            _base.__name__.lower(),
            _base,
            ConvLayer,
            whole_names=("weight", "bias"),
            methods=("forward", "_conv_forward"),
            keeps_less=("exact", "compact"),
        )
    )
