"""What other packages make of a model that decides what can be trained: integer weights, and copies put aside."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ._survey import Site

PUT_ASIDE = "peft keeps it as it was: the copy in modules_to_save is what runs"

_WEIGHT = re.compile(r".*weight.*|W_q")  # not indices and counters; bitsandbytes, GPTQ, AWQ and HQQ name them so


def integer_weights(module: nn.Module) -> list[tuple[str, str]]:
    """(own name, what it is) of the module's own quantised weights: parameters, buffers, packed ones of torch.ao."""
    found = [(own, _integers(p)) for own, p in module._parameters.items() if p is not None]
    found += [(own, _integers(b)) for own, b in module._buffers.items() if b is not None and _WEIGHT.fullmatch(own)]
    if "_packed_params" in vars(module):
        found.append(("_packed_params", "weights packed by torch.ao"))
    return [(own, what) for own, what in found if what]


def _integers(tensor: Any) -> str:
    """The dtype of integers that stand for numbers, also inside a tensor subclass (torchao); empty where none do."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner = (_integers(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return next((f"{type(tensor).__name__} of {what}" for what in inner if what), "")
    exact = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    return "" if exact else str(tensor.dtype)


def kept_aside(sites: Sequence[Site]) -> set[int]:
    """ids of the sites that lie in what peft put a trained copy in the place of, and nowhere else."""
    wrapper = getattr(sys.modules.get("peft.utils.other"), "ModulesToSaveWrapper", None)
    if wrapper is None:
        return set()
    around = tuple(
        f"{name}.original_module"
        for site in sites
        if isinstance(site.module, wrapper) and _runs_a_copy(site.module)
        for name in site.names
    )
    return {
        id(site) for site in sites if all(any(f"{name}.".startswith(f"{a}.") for a in around) for name in site.names)
    }


def _runs_a_copy(wrapper: Any) -> bool:
    return not wrapper.disable_adapters and any(name in wrapper.modules_to_save for name in wrapper.active_adapters)
