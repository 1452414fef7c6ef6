"""Any module, run on one sample after another, each with its own copy of the parameters that are trained.

For what no rule of a layer covers: biases that a forward adds itself, recurrent layers, tables that all samples share,
tokens routed by index. The copies are views and cost no memory; autograd gives each its own gradient, which is the
per-sample gradient whatever the module does with the parameter. As many forwards as samples: slow, and exact as long as
the module treats samples independently, which the proof of the layout asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._nested import form, map_tensors, strangers, tensors_in
from .._validate import BatchLayoutError
from ..arrangement import Arrangement
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
    input_folds: tuple[Arrangement, ...]
    output_folds: tuple[Arrangement, ...]

    @property
    def cuts(self) -> tuple[tuple[int | None, ...], tuple[Arrangement, ...]]:
        return self.inputs, self.input_folds


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
        copies = {
            name: apply(SpreadFunction, self.get_parameter(name).detach(), leaf).unbind(0)
            for name, leaf in self.leaves.items()
        }
        return self.sliced(call, given, args, kwargs, batch, copies)

    def sliced(
        self,
        call: Call,
        given: list[Tensor],
        args: Any,
        kwargs: Any,
        batch: int,
        copies: Mapping[str, Sequence[Tensor]],
    ) -> Any:
        """The outputs of ``batch`` runs of one sample each, with the sample's own copies of parameters, as one."""
        slices = [self.by_sample(tensor, axis, batch, k) for tensor, axis, k in zip(given, *call.cuts, strict=True)]
        places = {name: self.places(name) for name in copies}
        outputs = []
        for i in range(batch):
            args_i, kwargs_i = replaced((args, kwargs), [parts[i] for parts in slices])
            with standing_in([(places[name], copy[i]) for name, copy in copies.items()]):
                outputs.append(super().forward(*args_i, **kwargs_i))
        whole = joined(outputs, call.outputs)
        for tensor, axis, k in zip(tensors_in(whole), call.outputs, call.output_folds, strict=True):
            if axis >= tensor.dim() or not self.folds_like(k, tensor.shape[axis], batch):
                raise BatchLayoutError(
                    f"layer {self.layer_name!r}, run one sample at a time, gives shape {tuple(tensor.shape)} for "
                    f"{batch} samples: it knows of the batch by other means than its arguments",
                    [self],
                )
        return whole

    def folds_like(self, proven: Arrangement, size: int, batch: int) -> bool:
        """Whether a dimension of this size holds ``batch`` samples in the way that was proven."""
        shapes = [] if self.attachment is None else self.attachment.shapes
        return proven.holds((size, 1), batch, shapes)

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward, of the batch."""
        return super().forward(*args, **kwargs)

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

    def by_sample(self, tensor: Tensor, axis: int | None, batch: int, proven: Arrangement) -> Sequence[Tensor]:
        if axis is None:
            return [tensor] * batch
        if axis >= tensor.dim() or not self.folds_like(proven, tensor.shape[axis], batch):
            raise BatchLayoutError(
                f"layer {self.layer_name!r}: an input of shape {tuple(tensor.shape)} does not hold {batch} samples in "
                f"dimension {axis}, as it did when the layout was proven"
            )
        k = tensor.shape[axis] // batch
        return [tensor.narrow(axis, i * k, k) for i in range(batch)]  # not split: its views take no change in place


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
