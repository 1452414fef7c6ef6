"""What other packages make of a model that decides what can be trained: integer weights, and what peft puts aside."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ._nested import dense_in
from ._survey import Site, Slot

PUT_ASIDE = "peft does not run it: a copy stands in for it, or its adapter is not active"

_WEIGHT = re.compile(r".*weight.*|W_q")  # not indices and counters; bitsandbytes, GPTQ, AWQ and HQQ name them so


def integer_weights(module: nn.Module) -> list[tuple[str, str]]:
    """(own name, what it is) of the module's own quantised weights: parameters, buffers, packed ones of torch.ao."""
    found = [(own, _integers(p)) for own, p in module._parameters.items() if p is not None]
    buffers = [(own, b) for own, b in module._buffers.items() if b is not None and _WEIGHT.fullmatch(own)]
    found += [(own, _integers(buffer)) for own, buffer in buffers if buffer.dim() > 1]
    if "_packed_params" in vars(module):
        found.append(("_packed_params", "weights packed by torch.ao"))
    return [(own, what) for own, what in found if what]


def _integers(tensor: Any) -> str:
    """The dtype of integers that stand for numbers, also inside a tensor subclass (torchao); empty where none do."""
    for own in dense_in(tensor):
        numbers = own.is_floating_point() or own.is_complex() or own.dtype == torch.bool
        if not numbers or (own.is_floating_point() and own.dtype.itemsize == 1):  # float8
            return str(own.dtype) if own is tensor else f"{type(tensor).__name__} of {own.dtype}"
    return ""


def put_aside(sites: Sequence[Site], tensors: Sequence[Slot]) -> set[int]:
    """ids of the parameters that peft keeps and does not run, as its layers stand: what a copy was put in the place of,
    and adapters that are not active."""
    idle = tuple(f"{name}.{kept}." for site in sites for kept in _idle(site.module) for name in site.names)
    return {id(slot.parameter) for slot in tensors if idle and all(f"{n}.".startswith(idle) for n in slot.names)}


def _idle(module: nn.Module) -> list[str]:
    """What a layer of peft holds and does not call, by name."""
    wrapper = getattr(sys.modules.get("peft.utils.other"), "ModulesToSaveWrapper", ())
    tuner = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    norms = getattr(sys.modules.get("peft.tuners.ln_tuning.layer"), "LNTuningLayer", ())
    if not isinstance(module, (wrapper, tuner)):
        return []
    layer: Any = module
    held = ("modules_to_save",) if isinstance(module, wrapper) else layer.adapter_layer_names
    active = () if layer.disable_adapters else layer.active_adapters
    dicts = {own: getattr(layer, own, None) for own in held}
    kept = {own: list(d.keys()) for own, d in dicts.items() if isinstance(d, (nn.ModuleDict, nn.ParameterDict))}
    idle = [f"{own}.{name}" for own, names in kept.items() for name in names if name not in active]
    runs_a_copy = any(name in names for names in kept.values() for name in active)
    if runs_a_copy and isinstance(module, wrapper):
        idle.append("original_module")
    if runs_a_copy and isinstance(module, norms):
        idle.append("base_layer")
    return idle
