"""Tensors in the places of parameters, for one run of a module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

Places = Sequence[tuple[nn.Module, str]]  # modules, and the own names under which they hold one parameter


@contextmanager
def standing_in(chosen: Sequence[tuple[Places, Tensor]]) -> Iterator[None]:
    """Tensors in the places of parameters."""
    kept = [(module, own, module._parameters[own]) for places, _ in chosen for module, own in places]
    recurrent = {module: module._flat_weights for module, _, _ in kept if isinstance(module, nn.RNNBase)}
    try:
        for places, tensor in chosen:
            for module, own in places:
                module._parameters[own] = tensor  # type: ignore[assignment]
        for module in recurrent:  # it keeps a list of its own
            module.__dict__["_flat_weights"] = [module._parameters[name] for name in module._flat_weights_names]
        yield
    finally:
        for module, own, parameter in kept:
            module._parameters[own] = parameter
        for module, weights in recurrent.items():
            module.__dict__["_flat_weights"] = weights
