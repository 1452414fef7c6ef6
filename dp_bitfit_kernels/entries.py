"""What is trained, and where in the flat vector of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from torch import nn

from . import clipping
from ._validate import ClippingError, UnsupportedModuleError
from .layers import BiasLayer

LARGEST_ROWS = 1 << 14  # elements of a weight that has rows in the ledger


@dataclass(frozen=True)
class Entry:
    """One trained parameter: columns ``start:stop`` of the ledger."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    layers: tuple[tuple[BiasLayer, str], ...]  # every layer that gives its gradient, and its name there
    place: int = 0  # among the trained parameters, in the order of ``named_parameters``
    dense: bool = True  # whether its rows are kept; else a sink takes its gradient

    @property
    def still(self) -> slice:
        """Columns that a release leaves as they are."""
        several = {layer.stays(own) for layer, own in self.layers}
        start, stop = several.pop() if len(several) == 1 else (0, 0)
        return slice(self.start + start, self.start + stop)


def has_rows(parameter: nn.Parameter, owners: Sequence[tuple[BiasLayer, str]], norm: str) -> bool:
    """Whether a parameter's rows are kept in the ledger; else its layers give its gradient to a sink.

    norm: ``per_sample_norm`` of ``make_private``.
    """
    if not all(own in layer.sinkable for layer, own in owners):
        return True
    if norm == "instantiate":  # convolutions and embeddings make and keep rows in their sinks, when they are needed
        return all(isinstance(layer, nn.Linear) for layer, _ in owners)
    return norm == "mixed" and parameter.numel() <= LARGEST_ROWS


def find_entries(model: nn.Module, norm: str = "mixed") -> list[Entry]:
    """The trained parameters of ``model``, tied ones once: those that have rows, then those that have sinks.

    Both in the order of ``named_parameters``. norm: ``per_sample_norm`` of ``make_private``.

    Raises:
        UnsupportedModuleError: a parameter with ``requires_grad`` is not trained by any converted layer.
    """
    owners: dict[int, list[tuple[BiasLayer, str]]] = {}
    for module in model.modules():
        if isinstance(module, BiasLayer):
            for own in sorted(module.trained):
                parameter = module.trained_parameter(own)
                if parameter is None:
                    raise UnsupportedModuleError(
                        f"parameter {own!r} of layer {module.layer_name!r} is no longer a parameter (pruned, "
                        "parametrized or removed after convert_model): change the model first, then convert it"
                    )
                if not parameter.requires_grad:
                    raise UnsupportedModuleError(
                        f"parameter {own!r} of layer {module.layer_name!r} was frozen after convert_model: "
                        "restore_model and leave it out by biases=('*', '!name'), or let it require a gradient again"
                    )
                owners.setdefault(id(parameter), []).append((module, own))
    found: list[Entry] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) not in owners:
            raise UnsupportedModuleError(
                f"parameter {name!r} requires a gradient but no converted layer gives its per-sample gradient: "
                "run convert_model first, and freeze what it does not train"
            )
        given = tuple(owners[id(parameter)])
        found.append(Entry(name, parameter, 0, parameter.numel(), given, len(found), has_rows(parameter, given, norm)))
    entries: list[Entry] = []
    start = 0
    for entry in sorted(found, key=lambda entry: not entry.dense):
        entries.append(replace(entry, start=start, stop=start + entry.stop))
        start = entries[-1].stop
    if not entries:
        raise UnsupportedModuleError("the model has no trained parameter: run convert_model first")
    devices = {e.parameter.device for e in entries}
    if len(devices) != 1:
        raise UnsupportedModuleError(f"trained parameters lie on several devices: {sorted(map(str, devices))}")
    return entries


def grouped(entries: Sequence[Entry], plan: clipping.ClipPlan) -> tuple[list[int], list[int]]:
    """The plan's groups: [L + 1] bounds of the columns that have rows, and the group of each entry that has a sink.

    The plan counts all elements in the order of ``named_parameters``.

    Raises:
        ClippingError: a group of the plan ends within a weight that has no rows.
    """
    if all(entry.dense for entry in entries):
        return plan.offsets, []
    ends = [0] * len(plan.bounds)  # of each group, how many of its elements have rows
    groups: dict[int, int] = {}
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.place):
        size = entry.stop - entry.start
        for group, (start, stop) in enumerate(pairwise(plan.offsets)):
            shared = min(stop, position + size) - max(start, position)
            if entry.dense and shared > 0:
                ends[group] += shared
            elif not entry.dense and shared == size:
                groups[entry.place] = group
        if not entry.dense and entry.place not in groups:
            raise ClippingError(f"a clipping group ends within {entry.name!r}, whose per-sample gradients have no rows")
        position += size
    return [0, *accumulate(ends)], [groups[entry.place] for entry in entries if not entry.dense]
