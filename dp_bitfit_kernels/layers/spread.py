"""What all samples share, made one copy a sample: position embeddings, class tokens.

A model adds a table [1, T, d] to a batch [B, T, d], or expands it. Given [B, T, d] in its place, one copy of the same
values a sample and no memory, it does the same, and each copy's gradient is its sample's. Whether it does the same, and
whether a copy reaches its own sample alone, is asked by the proof of the layout, which changes the copies of some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._selection import what_is
from ..functional import SpreadFunction, apply
from .base import LayerKind
from .below import LayerWithBelow
from .standing_in import standing_in


@dataclass(frozen=True)
class Copies:
    """What a trial makes of a shared tensor: ``samples`` copies, of which those ``changed`` are others."""

    samples: int
    changed: tuple[bool, ...]

    def of(self, shared: Tensor) -> Tensor:
        """[1, ...] -> [n, ...]."""
        copies = shared.expand(self.samples, *shared.shape[1:])
        if not any(self.changed):
            return copies
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(shared.shape, generator=generator).to(shared) * (shared.abs().max() + 1.0)
        mask = torch.tensor(self.changed, device=shared.device).view(-1, *(1,) * (shared.dim() - 1))
        return torch.where(mask, copies + change, copies)


class SpreadLayer(LayerWithBelow):
    """Mixin in front of any class that owns parameters [1, ...]: its own forward, with their copies in their places.

    Attributes:
        trial_copies: what a trial asks for.
    """

    keeps_name = True
    trial_copies: Copies | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.trial_copies is not None:
            copies = {name: self.trial_copies.of(self._value(name)) for name in sorted(self.trained)}
        elif self.attachment is not None and self.recording():
            copies = {name: apply(SpreadFunction, self._value(name)[0], leaf) for name, leaf in self.leaves.items()}
        else:
            return super().forward(*args, **kwargs)
        with standing_in([([(self, name)], copy) for name, copy in copies.items()]):
            return super().forward(*args, **kwargs)

    def _value(self, name: str) -> Tensor:
        parameter = self.trained_parameter(name)
        assert parameter is not None
        return parameter.detach()


def find(module: nn.Module) -> LayerKind | None:
    """The kind of a module that owns such parameters, other than biases; None where it owns none."""
    names = tuple(
        own
        for own, parameter in module._parameters.items()
        if parameter is not None
        and parameter.dim() > 1
        and parameter.shape[0] == 1
        and parameter.is_floating_point()
        and what_is([(module, own)]) is not None
    )
    if not names or type(module).forward is nn.Module.forward:
        return None
    return LayerKind(
        f"{type(module).__name__}, a copy a sample", type(module), SpreadLayer, bias_names=(), whole_names=names
    )
