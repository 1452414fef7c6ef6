"""Layers whose bias is added last: transposed convolutions, InstanceNorm, Bilinear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..functional_window import Window
from ..weight_uses import Use
from .base import BiasLayer, LayerKind, register
from .conv import convolution_use

_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class ConvTransposeLayer(BiasLayer):
    """y [B, p, ...]: the input gradient of a convolution, as a layer."""

    channels_first = True
    sinkable = frozenset({"weight"})
    weight: Tensor

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Any:
        m: Any = self
        dims = len(m.kernel_size)
        if input.dim() < dims + 2 and self.unbatched():
            return super().forward(input, output_size)
        geometry = (m.stride, m.padding, m.kernel_size)
        padding = m._output_padding(input, output_size, *geometry, dims, m.dilation)
        operation = _TRANSPOSED[dims]
        weight = self.plain_weight()
        output = operation(input, weight, self.plain_bias(), m.stride, m.padding, padding, m.groups, m.dilation)
        window = Window(m.stride, m.padding, m.dilation, m.groups)
        return self.tap(self.weighed(output, input, partial(_turned_use, window=window, kernel=tuple(m.kernel_size))))


def _turned_use(grad: Tensor, inputs: Tensor, **geometry: Any) -> Use:
    """The layer's weight gradient is that of a convolution of its output gradient, whose gradient is the input.

    Where output_padding made the output longer, the convolution has so much less padding at its end.
    """
    window, kernel = geometry["window"], geometry["kernel"]
    sizes = zip(grad.shape[2:], inputs.shape[2:], *window[:3], kernel, strict=True)
    more = [out - ((n - 1) * step - 2 * pad + spread * (size - 1) + 1) for out, n, step, pad, spread, size in sizes]
    if any(more):
        ends = zip(reversed(window.padding), reversed(more), strict=True)
        grad = F.pad(grad, [side for pad, extra in ends for side in (pad, pad - extra)])
        geometry["window"] = window._replace(padding=(0,) * len(kernel))
    return convolution_use(inputs, grad, **geometry)


class InstanceNormLayer(BiasLayer):
    """Each sample and channel by its own statistics; by running ones where it has them, in training too."""

    channels_first = True
    weight: Tensor | None

    def forward(self, input: Tensor) -> Any:
        m: Any = self
        m._check_input_dim(input)
        if input.dim() == m._get_no_batch_dim() and self.unbatched():
            return super().forward(input)
        own = m.running_mean is None
        output = F.instance_norm(input, m.running_mean, m.running_var, self.weight, self.plain_bias(), own, 0.0, m.eps)
        return self.tap(output)


class BilinearLayer(BiasLayer):
    """y = x1 W x2 + b, [B, ..., p]."""

    weight: Tensor

    def forward(self, input1: Tensor, input2: Tensor) -> Any:
        if input1.dim() < 2 and self.unbatched():
            return super().forward(input1, input2)
        return self.tap(F.bilinear(input1, input2, self.weight, self.plain_bias()))


for _base in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register(
        LayerKind(
            _base.__name__.lower(),
            _base,
            ConvTransposeLayer,
            whole_names=("weight", "bias"),
            methods=("forward", "_output_padding"),
        )
    )
for _norm in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
    register(
        LayerKind(
            _norm.__name__.lower(),
            _norm,
            InstanceNormLayer,
            freezes_statistics=True,
            methods=("forward", "_check_input_dim", "_get_no_batch_dim"),
        )
    )
register(LayerKind("bilinear", nn.Bilinear, BilinearLayer))
