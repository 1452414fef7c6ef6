"""The modules and parameters of a model, each object once with all its names, and which of them a batch uses."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from . import layers
from ._nested import tensors_in
from ._selection import what_is
from .layers import norm_then, own_forward, spread

# These read their children's parameters themselves, so the children's forward, and with it ours, never runs.
_USES_CHILDREN_AS_FUNCTIONS = (nn.MultiheadAttention,)


@dataclasses.dataclass
class Site:
    """One module object under all its names."""

    module: nn.Module
    names: list[str]
    kind: layers.LayerKind | None
    obstacle: str  # why it cannot be converted; empty if it can
    functional: bool = False  # another module reads its parameters and never calls it

    def gives(self, own: str, whole: bool = False) -> bool:
        if self.kind is None or self.obstacle:
            return False
        return own in (self.kind.whole_names if whole else (*self.kind.bias_names, *self.kind.whole_names))

    @property
    def taken(self) -> list[str]:
        """Attributes of its own that have names which conversion uses."""
        converted = self.kind is None or layers.is_converted(self.module)
        return [] if converted else layers.base.shadowed(self.module, self.kind.mixin)  # type: ignore[union-attr]

    @property
    def biased(self) -> bool:
        """True if it owns a bias that it can train."""
        return any(self.module._parameters.get(own) is not None and self.gives(own) for own in self.bias_names)

    def keeps_less_in(self, memory: str) -> bool:
        """True if it is swapped for what it keeps for backward alone; hooks may rely on what a module is."""
        m = self.module
        hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        return self.kind is not None and not self.obstacle and memory in self.kind.keeps_less and not hooked

    @property
    def bias_names(self) -> tuple[str, ...]:
        return self.kind.bias_names if self.kind is not None else ()


@dataclasses.dataclass
class Slot:
    """One parameter object under all its names, in the order of named_parameters."""

    parameter: nn.Parameter
    names: list[str]
    owners: list[tuple[Site, str]]  # (owner, own name); each owner once

    @property
    def not_bias(self) -> str | None:
        """None if it is a bias, else why not."""
        return what_is([(site.module, own) for site, own in self.owners])


def survey(model: nn.Module) -> tuple[list[Site], list[Slot]]:
    """All modules and all parameters, each object once, with all names."""
    sites: dict[int, Site] = {}
    tensors: dict[int, Slot] = {}
    functional = {
        id(child)
        for parent in model.modules()
        if isinstance(parent, _USES_CHILDREN_AS_FUNCTIONS)
        for child in parent.modules()
        if child is not parent
    }
    for module_name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in sites:
            kind = layers.lookup(module)
            own = not isinstance(module, (layers.ConvertedLayer, torch.jit.ScriptModule))
            if kind is None and own and "forward" not in module.__dict__:
                kind = norm_then.find(module) or own_forward.find(module) or spread.find(module)
            used = id(module) in functional
            sites[id(module)] = Site(module, [], kind, _obstacle(module, kind, used), used)
        site = sites[id(module)]
        site.names.append(module_name)
        for own, parameter in module._parameters.items():
            if parameter is None:
                continue
            tensor = tensors.setdefault(id(parameter), Slot(parameter, [], []))
            tensor.names.append(f"{module_name}.{own}" if module_name else own)
            if not any(owner is site and name == own for owner, name in tensor.owners):
                tensor.owners.append((site, own))
    return list(sites.values()), list(tensors.values())


def classes_of(sites: list[Site]) -> dict[str, type[nn.Module]]:
    """Name -> class of every module, under all names; those around a module come first."""
    named = {name: type(site.module) for site in sites for name in site.names}
    return dict(sorted(named.items(), key=lambda item: item[0].count(".") + bool(item[0])))


def _obstacle(module: nn.Module, kind: layers.LayerKind | None, functional: bool) -> str:
    if _is_global(module):
        return "one object of transformers that all models share"
    if functional:
        return "its parameters are used by the MultiheadAttention around it, which never calls it"
    if nn.utils.parametrize.is_parametrized(module) and (
        kind is None or any(nn.utils.parametrize.is_parametrized(module, own) for own in kind.bias_names)
    ):
        return "it is parametrized: torch.nn.utils.parametrize.remove_parametrizations first"
    taken = []
    if kind is not None and not layers.is_converted(module):
        taken = layers.base.shadowed(module, kind.mixin)
    if kind is not None and taken:
        return f"it has attributes of its own that conversion needs: {', '.join(taken)}"
    if kind is not None:
        return kind.problem(module) or ""
    for base in type(module).__mro__[1:]:
        if layers.base.kind_of_class(base) is not None:
            return f"a subclass of {base.__name__} with its own forward"
    return "no per-sample gradient is known for this class"


def _is_global(module: nn.Module) -> bool:
    """transformers.activations holds modules (``gelu``, ...) that models of every kind take as they are."""
    activations = sys.modules.get("transformers.activations")
    return activations is not None and any(held is module for held in vars(activations).values())


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one forward of a sample batch uses: ids of the modules that it calls, of the parameters it depends on.

    A graph hides what lies in a reentrant checkpoint, and a module called may not use all its parameters: either is
    enough to take a parameter for used.
    """

    called: set[int]
    reached: set[int]

    def uses(self, tensor: Slot) -> bool:
        called = any(id(site.module) in self.called for site, _ in tensor.owners)
        return called or id(tensor.parameter) in self.reached


def usage(model: nn.Module, sample_batch: Any, sites: list[Site], tensors: list[Slot]) -> Usage:
    """Run the model once in evaluation mode; flags, modes, buffers and generators are afterwards as they were.

    The gradients that are asked for also keep TransformerEncoderLayer off its fused path, which calls no child.
    """
    called: set[int] = set()

    def seen(module: nn.Module, inputs: Any) -> None:
        called.add(id(module))

    parameters = [t.parameter for t in tensors if t.parameter.is_floating_point() and not t.parameter.is_inference()]
    wanted = [parameter.requires_grad for parameter in parameters]
    hooks = [site.module.register_forward_pre_hook(seen) for site in sites]
    try:
        with torch.enable_grad(), undisturbed(model):
            for parameter in parameters:
                parameter.requires_grad_(True)
            evaluate(model)
            reached = _leaves_under(list(tensors_in(call(model, sample_batch))))
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)
    return Usage(called, reached)


def _leaves_under(outputs: list[torch.Tensor]) -> set[int]:
    """ids of the leaves that the outputs depend on."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen, leaves = set(waiting), set()
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
    return leaves


def arguments(sample_batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple of positional or a mapping of keyword arguments, as the model takes it."""
    if isinstance(sample_batch, Mapping):
        return (), dict(sample_batch)
    return (tuple(sample_batch) if isinstance(sample_batch, (tuple, list)) else (sample_batch,)), {}


def call(model: nn.Module, sample_batch: Any) -> Any:
    args, kwargs = arguments(sample_batch)
    return model(*args, **kwargs)


def evaluate(model: nn.Module) -> None:
    """Set the modes and nothing else: what a class does in a ``train`` of its own (merge weights) stays undone."""
    for module in model.modules():
        module.training = False


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Modes are afterwards as they were."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        evaluate(model)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Modes, buffers and torch's random state are afterwards as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    # An embedding with max_norm rescales its weight in each forward.
    normed = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.max_norm is not None]
    weights = [weight.detach().clone() for weight in normed]
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)
            for weight, kept in zip(normed, weights, strict=True):
                weight.copy_(kept)
