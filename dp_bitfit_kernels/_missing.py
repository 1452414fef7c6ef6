"""Zero biases for layers that have none: language models whose linear layers come without."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ._selection import BiasRule
from ._survey import Site, Slot

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def widths(module: nn.Module) -> int | tuple[int, ...] | None:
    """Shape of the bias that a module of this class could have."""
    m: Any = module
    if isinstance(m, nn.Linear):
        return int(m.out_features)
    if isinstance(m, _CONVOLUTIONS):
        return int(m.out_channels)
    if isinstance(m, nn.LayerNorm):
        return tuple(m.normalized_shape)
    return None


def candidates(model: nn.Module, sites: Iterable[Site], tensors: Iterable[Slot]) -> list[Site]:
    """Layers that could be given a bias: of a known kind, called as layers, not what turns states into words."""
    outputs = _output_layers(model, tensors)
    return [
        site
        for site in sites
        if site.kind is not None
        and not site.obstacle
        and "bias" in site.kind.bias_names
        and "bias" in site.module._parameters
        and site.module._parameters["bias"] is None
        and widths(site.module) is not None
        and _weight(site.module) is not None
        and id(site.module) not in outputs
    ]


def _weight(module: nn.Module) -> torch.Tensor | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.is_floating_point() else None


def _output_layers(model: nn.Module, tensors: Iterable[Slot]) -> set[int]:
    """ids of the modules that give a score for each word."""
    found = set()
    for module in model.modules():
        ask: Callable[[], Any] | None = getattr(module, "get_output_embeddings", None)
        if ask is not None:
            try:
                found.add(id(ask()))
            except (AttributeError, NotImplementedError):  # a model without a head
                continue
    for tensor in tensors:
        if any(isinstance(site.module, nn.Embedding) for site, _ in tensor.owners):
            found |= {id(site.module) for site, _ in tensor.owners}
    return found


def add(sites: list[Site]) -> None:
    for site in sites:
        weight, shape = _weight(site.module), widths(site.module)
        assert weight is not None
        assert shape is not None
        zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        site.module._parameters["bias"] = nn.Parameter(zeros, requires_grad=False)


def remove(sites: list[Site]) -> None:
    for site in sites:
        site.module._parameters["bias"] = None


def chosen_of(sites: list[Site], rule: BiasRule, called: set[int] | None) -> list[Site]:
    """Those whose bias the rule would train, and that a sample batch calls."""
    return [
        site
        for site in sites
        if rule.reason([_bias_of(name) for name in site.names], None) is None
        and (called is None or id(site.module) in called)
    ]


def _bias_of(module_name: str) -> str:
    return f"{module_name}.bias" if module_name else "bias"


def names_of(sites: Iterable[Site]) -> list[str]:
    return [_bias_of(site.names[0]) for site in sites]
