"""Normalisation layers: LayerNorm, GroupNorm, and BatchNorm with frozen running statistics."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import BiasLayer, LayerKind, register


class LayerNormLayer(BiasLayer):
    """Bias of shape ``normalized_shape``, the last dimensions of the output."""

    weight: Tensor | None
    normalized_shape: tuple[int, ...]
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return self.tap(F.layer_norm(input, self.normalized_shape, self.weight, self.plain_bias(), self.eps))


class GroupNormLayer(BiasLayer):
    channels_first = True
    weight: Tensor | None
    num_groups: int
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return self.tap(F.group_norm(input, self.num_groups, self.weight, self.plain_bias(), self.eps))


class BatchNormLayer(BiasLayer):
    """BatchNorm in its evaluation form, in training too: statistics of a private batch are never computed."""

    channels_first = True
    weight: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[operator]
        output = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.plain_bias(), False, 0.0, self.eps
        )
        return self.tap(output)


def _needs_statistics(module: nn.Module) -> str | None:
    if getattr(module, "running_mean", None) is None or getattr(module, "running_var", None) is None:
        return "BatchNorm without running statistics mixes the samples of a batch; replace it by GroupNorm"
    return None


register(LayerKind("layernorm", nn.LayerNorm, LayerNormLayer))
register(LayerKind("groupnorm", nn.GroupNorm, GroupNormLayer))
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
