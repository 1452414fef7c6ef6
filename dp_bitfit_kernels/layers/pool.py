"""Pooling modules, swapped for what they keep: a byte a window instead of the input, or nothing."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import apply
from ..functional_window import MaxPoolFunction, Pool, ShapePoolFunction, tuple_of
from .base import ConvertedLayer, LayerKind, register

_aten = torch.ops.aten


class _PoolLayer(ConvertedLayer):
    dims = 2
    keeps_little = True

    def serves(self, input: Tensor) -> bool:
        return self.lean and input.requires_grad and input.dim() == self.dims + 2 and input.numel() > 0

    def sizes(self, name: str, ahead: int) -> tuple[int, ...]:
        """A size argument of the module, a number for each dimension of the image; ``ahead``: of a height of one."""
        own = tuple_of(getattr(self, name), self.dims)
        return (ahead, *own) if self.dims == 1 else own


class MaxPoolLayer(_PoolLayer):
    def forward(self, input: Tensor) -> Any:
        m: Any = self
        kernel = self.sizes("kernel_size", 1)
        cast = self.dims == 3 and torch.is_autocast_enabled(input.device.type)  # autocast may run it in float32
        if cast or not self.serves(input) or m.return_indices or math.prod(kernel) > 256:
            return super().forward(input)
        pool = Pool(
            kernel, self.sizes("stride", 1), self.sizes("padding", 0), self.sizes("dilation", 1), bool(m.ceil_mode)
        )
        return apply(MaxPoolFunction, input, pool, self.layer_name)


class _AveragePool(_PoolLayer):
    def forward(self, input: Tensor) -> Any:
        own = super().forward
        if not self.serves(input):
            return own(input)
        return apply(ShapePoolFunction, input, own, self.gradient(), self.layer_name)

    def gradient(self) -> Any:
        """(grad, stand-in for the input) -> input gradient."""
        raise NotImplementedError


class AvgPoolLayer(_AveragePool):
    def gradient(self) -> Any:
        m: Any = self
        operation = _aten.avg_pool3d_backward if self.dims == 3 else _aten.avg_pool2d_backward
        sizes = (self.sizes("kernel_size", 1), self.sizes("stride", 1), self.sizes("padding", 0))
        return partial(
            _average, operation, (*sizes, m.ceil_mode, m.count_include_pad, getattr(m, "divisor_override", None))
        )


class AdaptiveAvgPoolLayer(_AveragePool):
    def gradient(self) -> Any:
        operation = _aten._adaptive_avg_pool3d_backward if self.dims == 3 else _aten._adaptive_avg_pool2d_backward
        return partial(_average, operation, ())

    def serves(self, input: Tensor) -> bool:
        size = self.output_size
        one = all(extent == 1 for extent in (size if isinstance(size, tuple) else (size,)))
        return super().serves(input) and not one  # then it is a mean, which keeps nothing


def _average(operation: Any, geometry: tuple[Any, ...], grad: Tensor, stand_in: Tensor) -> Tensor:
    flat = grad.dim() == 3  # one position axis: an image of height one, as in PyTorch's own one-dimensional pools
    gradient: Tensor = (
        operation(grad.unsqueeze(2), stand_in.unsqueeze(2), *geometry).squeeze(2)
        if flat
        else operation(grad, stand_in, *geometry)
    )
    return gradient


for _mixin, _bases in (
    (MaxPoolLayer, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)),
    (AvgPoolLayer, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)),
    (AdaptiveAvgPoolLayer, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)),
):
    for _dims, _base in enumerate(_bases, start=1):
        register(
            LayerKind(
                _base.__name__.lower(),
                _base,
                type(_mixin.__name__, (_mixin,), {"dims": _dims, "__module__": __name__}),
                bias_names=(),
                whole_names=(),
                keeps_less=("exact", "compact"),
            )
        )
