"""Modules that are swapped for what they keep for backward, each with the reason why it is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LeanCase:
    """A module, the shape of one sample, and what it may keep.

    bits: kept for each element of the input, besides statistics of `extra` float32 a sample.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    bits: float
    reason: str
    extra: int = 0
    exact_gradient: bool = True  # bit-equal to autograd's own

    def __str__(self) -> str:
        return self.name

    def module(self) -> nn.Module:
        """With random parameters and statistics."""
        torch.manual_seed(0)
        module = self.build().train()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 2.0)
        return module

    def input(self, batch: int = 5) -> Tensor:
        """Values on both sides of every limit."""
        return 4.0 * torch.randn(batch, *self.sample, generator=torch.Generator().manual_seed(1))


class _Two(nn.ReLU):
    """A subclass that changes nothing."""


IMAGE = (6, 9, 7)
LEAN_CASES = (
    LeanCase("relu", nn.ReLU, IMAGE, 1, "a bit"),
    LeanCase("relu_subclass", _Two, IMAGE, 1, "the parent's forward"),
    LeanCase("relu_tokens", nn.ReLU, (11, 13), 1, "features last, nothing divides anything"),
    LeanCase("relu6", nn.ReLU6, IMAGE, 1, "two limits"),
    LeanCase("hardtanh", lambda: nn.Hardtanh(-0.5, 2.0), IMAGE, 1, "limits of its own"),
    LeanCase("leaky_relu", lambda: nn.LeakyReLU(0.3), IMAGE, 1, "a slope on the other side"),
    LeanCase("dropout", lambda: nn.Dropout(0.4), IMAGE, 1, "torch's own mask"),
    LeanCase("dropout_tokens", lambda: nn.Dropout(0.1), (11, 13), 1, "the usual p"),
    LeanCase("gelu", nn.GELU, (11, 13), 32, "the input"),
    LeanCase("gelu_tanh", lambda: nn.GELU("tanh"), IMAGE, 32, "the input"),
    LeanCase("silu", nn.SiLU, (11, 13), 32, "the input"),
    LeanCase("conv1d", lambda: nn.Conv1d(6, 4, 3, bias=False), (6, 20), 0, "one position axis"),
    LeanCase("conv2d", lambda: nn.Conv2d(6, 6, 3, padding=1, bias=False), IMAGE, 0, "output shaped as the input"),
    LeanCase("conv2d_stride", lambda: nn.Conv2d(6, 8, 3, 2, 1, bias=False), IMAGE, 0, "another shape"),
    LeanCase("conv2d_groups", lambda: nn.Conv2d(6, 12, 3, dilation=2, groups=3, bias=False), IMAGE, 0, "dilated"),
    LeanCase("conv2d_depthwise", lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), IMAGE, 0, "a kernel of its own"),
    LeanCase("conv2d_bias", lambda: nn.Conv2d(6, 4, 1), IMAGE, 0, "with a trained bias"),
    LeanCase("conv3d", lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 4, 5, 3), 0, "three position axes"),
    LeanCase("batchnorm1d", lambda: nn.BatchNorm1d(6), (6, 9), 0, "an affine map", exact_gradient=False),
    LeanCase("batchnorm1d_2d", lambda: nn.BatchNorm1d(6), (6,), 0, "T = 1", exact_gradient=False),
    LeanCase("batchnorm2d", lambda: nn.BatchNorm2d(6), IMAGE, 0, "an affine map", exact_gradient=False),
    LeanCase(
        "batchnorm2d_bare", lambda: nn.BatchNorm2d(6, affine=False), IMAGE, 0, "no parameter", exact_gradient=False
    ),
    LeanCase("maxpool2d", lambda: nn.MaxPool2d(3, 2, 1), IMAGE, 4, "overlapping windows, padding"),
    LeanCase("maxpool2d_ceil", lambda: nn.MaxPool2d((2, 3), ceil_mode=True), IMAGE, 4, "a window that ends outside"),
    LeanCase("maxpool2d_dilated", lambda: nn.MaxPool2d(2, 1, dilation=(2, 3)), IMAGE, 8, "spread places"),
    LeanCase("maxpool1d", lambda: nn.MaxPool1d(3, 2), (6, 20), 8, "one position axis"),
    LeanCase("maxpool3d", lambda: nn.MaxPool3d(2), (2, 4, 5, 3), 8, "three position axes"),
    LeanCase("avgpool1d", lambda: nn.AvgPool1d(3, 2, 1), (6, 20), 0, "one position axis"),
    LeanCase("avgpool2d", lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE, 0, "shape only"),
    LeanCase("avgpool3d", lambda: nn.AvgPool3d(2), (2, 4, 5, 3), 0, "shape only"),
    LeanCase("adaptive1d", lambda: nn.AdaptiveAvgPool1d(3), (6, 20), 0, "one position axis"),
    LeanCase("adaptive2d", lambda: nn.AdaptiveAvgPool2d((3, 2)), IMAGE, 0, "uneven windows"),
    LeanCase("adaptive2d_one", lambda: nn.AdaptiveAvgPool2d(1), IMAGE, 0, "a mean"),
    LeanCase("adaptive3d", lambda: nn.AdaptiveAvgPool3d(2), (2, 4, 5, 3), 0, "three position axes"),
    LeanCase("layernorm", lambda: nn.LayerNorm(13), (11, 13), 32, "input and statistics", 22, False),
    LeanCase("layernorm_2d", lambda: nn.LayerNorm(13), (13,), 32, "T = 1", 2, False),
    LeanCase("layernorm_nd", lambda: nn.LayerNorm((3, 6)), (4, 3, 6), 32, "several dimensions", 8, False),
    LeanCase("layernorm_bare", lambda: nn.LayerNorm(13, bias=False), (11, 13), 32, "only a weight", 22, False),
    LeanCase("groupnorm", lambda: nn.GroupNorm(3, 6), IMAGE, 32, "input and statistics", 6, False),
    LeanCase("groupnorm_2d", lambda: nn.GroupNorm(3, 12), (12,), 32, "T = 1", 6, False),
    LeanCase("groupnorm_each", lambda: nn.GroupNorm(6, 6), IMAGE, 32, "InstanceNorm's groups", 12, False),
)


def plain_twin(module: nn.Module) -> nn.Module:
    """As autograd runs it for bias-only training: weights frozen, statistics of BatchNorm frozen."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] == "bias")
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
    return module
