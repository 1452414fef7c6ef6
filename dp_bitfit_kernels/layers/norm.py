"""Normalisation layers: LayerNorm, GroupNorm, and BatchNorm with frozen running statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import apply
from ..functional_norm import BatchNormFunction, GroupNormFunction, LayerNormFunction
from ..functional_weight import ScaleGradFunction
from .base import BiasLayer, LayerKind, register


class _NormLayer(BiasLayer):
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def gives_all_gradients(self) -> bool:
        weight, bias = self.weight, self.bias
        return (weight is None or not weight.requires_grad or self.private_weight) and (
            bias is None or not bias.requires_grad or "bias" in self.trained
        )

    def scaled(
        self,
        output: Tensor,
        input: Tensor,
        normed: Callable[[Tensor], Tensor],
        over_last: tuple[float, bool] | None = None,
    ) -> Tensor:
        """``output``, whose gradient also gives the scale its rows: see ``ScaleGradFunction``."""
        if not self.private_weight or not self.recording():
            return output
        self.check_rows(output)
        arguments = (normed, over_last, self.channels_first, self.kind, self.layer_name, self.backend)
        return apply(ScaleGradFunction, output, input.detach(), self.weight_rows, *arguments)


class LayerNormLayer(_NormLayer):
    """Bias of shape ``normalized_shape``, the last dimensions of the output."""

    normalized_shape: tuple[int, ...]

    def forward(self, input: Tensor) -> Any:
        shape = self.normalized_shape
        if input.dim() <= len(shape) and self.unbatched():
            return nn.LayerNorm.forward(self, input)  # type: ignore[arg-type]
        if not self.lean or input.dim() <= len(shape) or math.prod(shape) == 0:
            output = self.tap(F.layer_norm(input, shape, self.plain_weight(), self.plain_bias(), self.eps))
        else:
            compact = self.memory == "compact"
            arguments = (
                shape,
                self.plain_weight(),
                self.plain_bias(),
                self.eps,
                compact,
                self.layer_name,
                self.backend,
            )
            output = self.through(LayerNormFunction, input, *arguments)
        normed = partial(F.layer_norm, normalized_shape=shape, eps=self.eps)
        return self.scaled(output, input, normed, (self.eps, True) if self.eps >= 0.0 else None)


class GroupNormLayer(_NormLayer):
    channels_first = True
    num_groups: int

    def forward(self, input: Tensor) -> Tensor:
        if not self.lean or input.dim() < 2 or input.numel() == 0:
            output = self.tap(F.group_norm(input, self.num_groups, self.plain_weight(), self.plain_bias(), self.eps))
        else:
            compact = self.memory == "compact"
            own = (self.plain_weight(), self.plain_bias(), self.eps)
            arguments = (self.num_groups, *own, compact, self.layer_name, self.backend)
            output = self.through(GroupNormFunction, input, *arguments)
        return self.scaled(output, input, partial(F.group_norm, num_groups=self.num_groups, eps=self.eps))


class BatchNormLayer(_NormLayer):
    """BatchNorm in its evaluation form, in training too: statistics of a private batch are never computed."""

    channels_first = True
    keeps_little = True
    running_mean: Tensor
    running_var: Tensor

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[operator]
        statistics = (self.running_mean, self.running_var)
        own = (self.plain_weight(), self.plain_bias())
        if not self.lean or input.dim() < 2:
            output = self.tap(F.batch_norm(input, *statistics, *own, False, 0.0, self.eps))
        else:
            output = self.through(BatchNormFunction, input, *statistics, *own, self.eps, self.layer_name, self.backend)
        return self.scaled(output, input, partial(_by_statistics, mean=statistics[0], var=statistics[1], eps=self.eps))


def _by_statistics(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return F.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), eps=eps)  # of a model in half precision, x is wider


class RMSNormLayer(_NormLayer):
    """y = x / sqrt(mean x^2 + eps) * w; it has no bias."""

    bias = None
    normalized_shape: tuple[int, ...]

    def forward(self, x: Tensor) -> Any:
        shape = self.normalized_shape
        if x.dim() <= len(shape) and self.unbatched():
            return nn.RMSNorm.forward(self, x)  # type: ignore[arg-type]
        output = F.rms_norm(x, shape, self.plain_weight(), self.eps)
        normed = partial(F.rms_norm, normalized_shape=shape, eps=self.eps)
        return self.scaled(output, x, normed, (self.eps, False) if self.eps is not None and self.eps >= 0.0 else None)


def _needs_statistics(module: nn.Module) -> str | None:
    if getattr(module, "running_mean", None) is None or getattr(module, "running_var", None) is None:
        return "BatchNorm without running statistics mixes the samples of a batch; replace it by GroupNorm"
    return None


_BOTH = ("weight", "bias")
register(LayerKind("layernorm", nn.LayerNorm, LayerNormLayer, whole_names=_BOTH, keeps_less=("compact",)))
register(LayerKind("groupnorm", nn.GroupNorm, GroupNormLayer, whole_names=_BOTH, keeps_less=("compact",)))
register(LayerKind("rmsnorm", nn.RMSNorm, RMSNormLayer, bias_names=(), whole_names=("weight",)))
for _base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    register(
        LayerKind(
            _base.__name__.lower(),
            _base,
            BatchNormLayer,
            whole_names=_BOTH,
            freezes_statistics=True,
            methods=("forward", "_check_input_dim"),
            problem=_needs_statistics,
        )
    )
