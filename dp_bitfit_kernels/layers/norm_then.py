"""Norms whose class goes on with modules that it holds: timm's norms with a dropout and an activation behind them.

They are converted as their base class is, and the held modules are called after it. That the class does just this is
tried on a copy with random parameters and statistics: the outputs must be the same, bit for bit.
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor, nn

from .base import BiasLayer, LayerKind, kind_of_class
from .norm import BatchNormLayer, GroupNormLayer, LayerNormLayer

_SAMPLES = 2


class _ThenLayer(BiasLayer):
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(input)
        for child in self.children():
            output = child(output)
        return output


class BatchNormThenLayer(_ThenLayer, BatchNormLayer):
    """BatchNorm with frozen statistics, then the modules that it holds."""


class GroupNormThenLayer(_ThenLayer, GroupNormLayer):
    """GroupNorm, then the modules that it holds."""


class LayerNormThenLayer(_ThenLayer, LayerNormLayer):
    """LayerNorm, then the modules that it holds."""


_MIXINS: dict[type, type[BiasLayer]] = {
    BatchNormLayer: BatchNormThenLayer,
    GroupNormLayer: GroupNormThenLayer,
    LayerNormLayer: LayerNormThenLayer,
}


def find(module: nn.Module) -> LayerKind | None:
    """The kind of a norm whose class calls the modules it holds after its base's forward; else None."""
    shape = _input_shape(module)
    bases = (kind_of_class(base) for base in type(module).__mro__[1:])
    kind = next((kind for kind in bases if kind is not None), None)
    if shape is None or kind is None or kind.mixin not in _MIXINS or not any(True for _ in module.children()):
        return None
    if len(inspect.signature(module.forward).parameters) != 1 or kind.problem(module):
        return None
    if not _goes_on(module, kind, shape):
        return None
    return LayerKind(
        type(module).__name__.lower(),
        type(module),
        _MIXINS[kind.mixin],
        freezes_statistics=kind.freezes_statistics,
        keeps_less=kind.keeps_less,
        problem=kind.problem,
    )


def _input_shape(module: nn.Module) -> tuple[int, ...] | None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        trailing = {nn.BatchNorm1d: (5,), nn.BatchNorm3d: (2, 3, 2)}
        spread = next((size for base, size in trailing.items() if isinstance(module, base)), (3, 4))
        return (_SAMPLES, module.num_features, *spread)
    if isinstance(module, nn.GroupNorm):
        return (_SAMPLES, module.num_channels, 3, 4)
    if isinstance(module, nn.LayerNorm):
        return (_SAMPLES, 3, *module.normalized_shape)
    return None


def _goes_on(module: nn.Module, kind: LayerKind, shape: tuple[int, ...]) -> bool:
    twin = copy.deepcopy(module)
    if any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers())):
        twin = twin.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        like = next(twin.parameters())
        x = torch.randn(shape, generator=generator).to(like)
        for mode in (False, True):
            twin.train(mode)
            twin.training = mode and not kind.freezes_statistics
            torch.manual_seed(0)
            try:
                whole = twin(x.clone())
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):  # not an input that it takes
                return False
            torch.manual_seed(0)
            parts = kind.base.forward(twin, x.clone())
            for child in twin.children():
                parts = child(parts)
            if not isinstance(whole, Tensor) or not torch.equal(whole, parts):
                return False
    return True
