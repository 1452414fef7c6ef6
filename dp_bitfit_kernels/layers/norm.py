"""Normalisation layers: LayerNorm, GroupNorm, and BatchNorm with frozen running statistics."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..functional_norm import BatchNormFunction, GroupNormFunction, LayerNormFunction
from .base import BiasLayer, LayerKind, register


class _NormLayer(BiasLayer):
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def gives_all_gradients(self) -> bool:
        weight, bias = self.weight, self.bias
        return (weight is None or not weight.requires_grad) and (
            bias is None or not bias.requires_grad or "bias" in self.trained
        )


class LayerNormLayer(_NormLayer):
    """Bias of shape ``normalized_shape``, the last dimensions of the output."""

    normalized_shape: tuple[int, ...]

    def forward(self, input: Tensor) -> Any:
        shape = self.normalized_shape
        if input.dim() <= len(shape) and self.unbatched():
            return nn.LayerNorm.forward(self, input)  # type: ignore[arg-type]
        if not self.lean or input.dim() <= len(shape) or math.prod(shape) == 0:
            return self.tap(F.layer_norm(input, shape, self.weight, self.plain_bias(), self.eps))
        compact = self.memory == "compact"
        arguments = (shape, self.weight, self.plain_bias(), self.eps, compact, self.layer_name, self.backend)
        return self.through(LayerNormFunction, input, *arguments)


class GroupNormLayer(_NormLayer):
    channels_first = True
    num_groups: int

    def forward(self, input: Tensor) -> Tensor:
        if not self.lean or input.dim() < 2 or input.numel() == 0:
            return self.tap(F.group_norm(input, self.num_groups, self.weight, self.plain_bias(), self.eps))
        compact = self.memory == "compact"
        arguments = (self.num_groups, self.weight, self.plain_bias(), self.eps, compact, self.layer_name, self.backend)
        return self.through(GroupNormFunction, input, *arguments)


class BatchNormLayer(_NormLayer):
    """BatchNorm in its evaluation form, in training too: statistics of a private batch are never computed."""

    channels_first = True
    keeps_little = True
    running_mean: Tensor
    running_var: Tensor

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[operator]
        statistics = (self.running_mean, self.running_var, self.weight, self.plain_bias())
        if not self.lean or input.dim() < 2:
            return self.tap(F.batch_norm(input, *statistics, False, 0.0, self.eps))
        return self.through(BatchNormFunction, input, *statistics, self.eps, self.layer_name, self.backend)


def _needs_statistics(module: nn.Module) -> str | None:
    if getattr(module, "running_mean", None) is None or getattr(module, "running_var", None) is None:
        return "BatchNorm without running statistics mixes the samples of a batch; replace it by GroupNorm"
    return None


register(LayerKind("layernorm", nn.LayerNorm, LayerNormLayer, keeps_less=("compact",)))
register(LayerKind("groupnorm", nn.GroupNorm, GroupNormLayer, keeps_less=("compact",)))
for _base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    register(
        LayerKind(
            _base.__name__.lower(),
            _base,
            BatchNormLayer,
            freezes_statistics=True,
            methods=("forward", "_check_input_dim"),
            problem=_needs_statistics,
        )
    )
