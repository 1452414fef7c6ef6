"""Which modules are run one sample at a time, for parameters that no layer's rule covers: the smallest that will do."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import layers
from ._survey import Site, Slot
from .layers.one_by_one import OneByOneLayer

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Hosts:
    """Modules run one sample at a time.

    around: modules that cannot be hosts themselves, and why, as found by running them; the one around each is taken
        instead.
    called: ids of the modules that a sample batch calls; None where none was given.
    """

    def __init__(self, sites: Sequence[Site], around: Mapping[nn.Module, str], called: set[int] | None):
        self._sites = {name: site for site in sites for name in site.names}
        self._unfit = {id(module): why for module, why in around.items()}
        self._called = called
        self._chosen: dict[int, Site] = {}

    def of(self, tensor: Slot) -> Site | str:
        """The host that covers every use of the parameter, or why there is none."""
        if not tensor.parameter.is_floating_point():
            return f"its dtype is {tensor.parameter.dtype}: only real floating-point parameters can be trained"
        if tensor.parameter.is_inference():
            return "it was made under torch.inference_mode, so it can never require a gradient"
        if any(getattr(site.module, "max_norm", None) is not None for site, _ in tensor.owners):
            return "its module scales it in place in each forward (max_norm)"
        name = common([name for site, _ in tensor.owners for name in site.names])
        while True:
            site = self._sites[name]
            if self._fits(site):
                return site
            if not name:
                why = self._unfit.get(id(site.module)) or site.obstacle or "it cannot be run one sample at a time"
                return f"{type(site.module).__name__}: {why}"
            name = common([own.rpartition(".")[0] for own in site.names])

    def _fits(self, site: Site) -> bool:
        module = site.module
        return not (
            isinstance(module, (*_CONTAINERS, torch.jit.ScriptModule))
            or id(module) in self._unfit
            or site.functional
            or "forward" in module.__dict__
            or type(module).forward is nn.Module.forward
            # They make the weight before the forward begins, of the parameters as they are.
            or any(isinstance(hook, WeightNorm | SpectralNorm) for hook in module._forward_pre_hooks.values())
            or bool(layers.base.shadowed(module, OneByOneLayer))
            or (self._called is not None and id(module) not in self._called)
            or common(site.names) not in site.names  # used in several places: the one around them all
        )

    def take(self, site: Site) -> None:
        self._chosen[id(site)] = site

    def outermost(self) -> list[Site]:
        """The chosen ones, without those that lie inside another."""
        chosen = list(self._chosen.values())
        return [site for site in chosen if not any(site is not other and inside(site, other) for other in chosen)]


def common(names: Sequence[str]) -> str:
    """The innermost module that contains all of these, or is the only one."""
    if len(set(names)) == 1:
        return names[0]
    columns = zip(*(name.split(".") if name else [] for name in names), strict=False)
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return ".".join(column[0] for column in shared)


def inside(site: Site, host: Site) -> bool:
    """Whether every name of the module lies at or below the host."""
    return all(below(name, host) for name in site.names)


def below(name: str, host: Site) -> bool:
    """Whether a module or parameter of this name lies at or below the host."""
    return any(within(name, outer) for outer in host.names)


def within(name: str, outer: str) -> bool:
    """Whether a name is the outer one or lies below it."""
    return not outer or name == outer or name.startswith(outer + ".")


def relative(name: str, host: Site) -> str:
    """A parameter's name as the host knows it."""
    outer = next(outer for outer in host.names if within(name, outer))
    return name[len(outer) + 1 :] if outer else name
