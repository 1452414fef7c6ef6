"""Norms whose class goes on with modules that it holds: timm's norms with a dropout and an activation behind them.

They are converted as their base class is, and the held modules are called after it: their own forward is not run. So
only forwards of files that were read for it are taken, and that an instance does just this is still tried, on a copy
with random parameters and statistics: outputs and gradients must be the same, bit for bit.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import BiasLayer, LayerKind, kind_of_class
from .norm import BatchNormLayer, GroupNormLayer, LayerNormLayer

_LOOKED_AT = frozenset({"timm.layers.norm_act"})  # modules in which forwards are defined
_SAMPLES = 2
# Whatever an instance of another kind raises on the trial, it is not of this one.
_FAILURES = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, StopIteration)


class _ThenLayer(BiasLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (input,) = (*args, *kwargs.values())
        output = super().forward(input)
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
    """The kind of a norm of these files that calls the modules it holds after its base's forward; else None."""
    if type(module).forward.__module__ not in _LOOKED_AT:
        return None
    shape = _input_shape(module)
    bases = (kind_of_class(base) for base in type(module).__mro__[1:])
    kind = next((kind for kind in bases if kind is not None), None)
    if shape is None or kind is None or kind.mixin not in _MIXINS or kind.problem(module):
        return None
    if not any(True for _ in module.children()) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    try:
        if not _goes_on(module, kind, shape):
            return None
    except _FAILURES:
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
    held = [*twin.parameters(), *twin.buffers()]
    if any(tensor.is_meta for tensor in held):
        twin = twin.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    own: Callable[[nn.Module, Tensor], Any] = type(module).forward

    def base(twin: nn.Module, x: Tensor) -> Any:
        output = kind.base.forward(twin, x)
        for child in twin.children():
            output = child(output)
        return output

    with torch.random.fork_rng(range(torch.cuda.device_count())):
        with torch.no_grad():
            for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
                if tensor.is_floating_point():
                    drawn = torch.randn(tensor.shape, generator=generator)
                    tensor.copy_(drawn.abs() + 0.5 if name.endswith("var") else drawn)
        like = next((t for t in (*twin.parameters(), *twin.buffers()) if t.is_floating_point()), torch.zeros(()))
        for size in (0.1, 1.0, 30.0):
            x = (size * torch.randn(shape, generator=generator)).to(like)
            for mode in (False, True):
                twin.train(mode)
                twin.training = mode and not kind.freezes_statistics
                if not _same(*(_run(forward, twin, x) for forward in (own, base))):
                    return False
    return True


def _run(forward: Callable[[nn.Module, Tensor], Any], twin: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of a random sum of it with respect to the input and to the parameters."""
    torch.manual_seed(0)
    wanted = [x.clone().requires_grad_(), *(p.requires_grad_() for p in twin.parameters())]
    output = forward(twin, wanted[0].clone())
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    found = torch.autograd.grad(output, wanted, seed, allow_unused=True)
    return [output.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True))]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
