"""Any module, run on one sample after another, each with its own copy of the parameters that are trained.

For what no rule of a layer covers: biases that a forward adds itself, recurrent layers, tables that all samples share,
tokens routed by index. The copies are views and cost no memory; autograd gives each its own gradient, which is the
per-sample gradient whatever the module does with the parameter. As many forwards as samples: slow, and exact as long as
the module treats samples independently, which the proof of the layout asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._nested import form, map_tensors, strangers, tensors_in
from .._validate import BatchLayoutError
from ..functional import SpreadFunction, apply
from .base import BiasLayer, LayerKind
from .standing_in import Places, standing_in


@dataclass(frozen=True)
class Call:
    """Where the tensors of one way of calling a module hold the samples, sample-major.

    form: what tells it from other ways.
    inputs: of each tensor the dimension; None: shared by all samples.
    """

    form: tuple[Any, ...]
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]


class OneByOneLayer(BiasLayer):
    """Mixin in front of any class.

    Attributes:
        trained: names, relative to this module, of the parameters that it gives per-sample gradients of.
        leaves: name -> leaf [B, p] of the open batch.
        calls: ways of calling it that the proof of the layout saw.
    """

    leaves: dict[str, Tensor]
    calls: tuple[Call, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.attachment is None or not self.recording():
            return super().forward(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        call = self.call_of(given, (args, kwargs))
        batch = next(iter(self.leaves.values())).shape[0]
        slices = [self.by_sample(tensor, axis, batch) for tensor, axis in zip(given, call.inputs, strict=True)]
        copies = {
            name: apply(SpreadFunction, self.get_parameter(name).detach(), leaf).unbind(0)
            for name, leaf in self.leaves.items()
        }
        places = {name: self.places(name) for name in copies}
        outputs = []
        for i in range(batch):
            args_i, kwargs_i = replaced((args, kwargs), [parts[i] for parts in slices])
            with standing_in([(places[name], copy[i]) for name, copy in copies.items()]):
                outputs.append(super().forward(*args_i, **kwargs_i))
        return joined(outputs, call.outputs)

    def has_leaves(self) -> bool:
        return bool(self.__dict__.get("leaves"))

    def set_leaf(self, name: str, leaf: Tensor) -> None:
        self.__dict__.setdefault("leaves", {})[name] = leaf

    def drop_leaves(self) -> None:
        self.__dict__.pop("leaves", None)

    def trained_parameter(self, name: str) -> nn.Parameter | None:
        owner, _, own = name.rpartition(".")
        return self.get_submodule(owner)._parameters.get(own)

    def places(self, name: str) -> Places:
        """Every place below this module that holds the parameter."""
        parameter = self.trained_parameter(name)
        return [(m, own) for m in self.modules() for own, held in m._parameters.items() if held is parameter]

    def call_of(self, given: list[Tensor], arguments: Any) -> Call:
        for what in strangers(arguments):
            raise BatchLayoutError(
                f"layer {self.layer_name!r} is run one sample at a time, but is given a {what}, which cannot be cut "
                "into samples (a cache? call the model with use_cache=False)"
            )
        asked = form(arguments)
        for call in self.calls:
            if call.form == asked:
                return call
        raise BatchLayoutError(
            f"layer {self.layer_name!r} is run one sample at a time, and the proof of the layout has not seen it "
            f"called in this way, with {len(given)} tensors: which of them hold samples is not known. {UNPROVEN}"
        )

    def by_sample(self, tensor: Tensor, axis: int | None, batch: int) -> Sequence[Tensor]:
        if axis is None:
            return [tensor] * batch
        if axis >= tensor.dim() or tensor.shape[axis] % batch:
            raise BatchLayoutError(
                f"layer {self.layer_name!r}: an input of shape {tuple(tensor.shape)} does not hold {batch} samples in "
                f"dimension {axis}, as it did when the layout was proven"
            )
        return torch.split(tensor, tensor.shape[axis] // batch, axis)


def joined(outputs: list[Any], axes: tuple[int, ...]) -> Any:
    """The outputs of single samples as one of the batch."""
    flat = [list(tensors_in(output)) for output in outputs]
    whole = [torch.cat(parts, axis) for axis, parts in zip(axes, zip(*flat, strict=True), strict=True)]
    return replaced(outputs[0], whole)


def replaced(value: Any, tensors: Sequence[Tensor]) -> Any:
    """``value`` with its tensors replaced, in the order of ``tensors_in``."""
    rest = iter(tensors)
    return map_tensors(value, lambda _: next(rest))


UNPROVEN = "Call the model once in eager mode on a batch that shows its samples in its inputs' leading dimension"


ONE_BY_ONE = LayerKind("one by one", nn.Module, OneByOneLayer, bias_names=(), whole_names=())
