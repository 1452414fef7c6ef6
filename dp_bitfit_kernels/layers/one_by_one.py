"""Any module, run on each sample by itself, with the sample's own copy of the parameters that are trained.

For what no rule of a layer covers: biases that a forward adds itself, recurrent layers, tables that all samples share,
tokens routed by index. The copies are views and cost no memory; autograd gives each its own gradient, which is the
per-sample gradient whatever the module does with the parameter. This is exact as long as the module treats samples
independently, which the proof of the layout asks. Where the proof saw that ``torch.func.vmap`` can run the module, all
samples go through one forward; else (tokens routed by index, recurrent kernels) there are as many as samples: slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._nested import form, map_tensors, strangers, tensors_in
from .._validate import BatchLayoutError
from ..arrangement import Arrangement
from ..functional import SpreadFunction, apply
from .base import LayerKind
from .below import LayerWithBelow
from .standing_in import standing_in


@dataclass(frozen=True)
class Call:
    """Where the tensors of one way of calling a module hold the samples, sample-major.

    form: what tells it from other ways.
    inputs: of each tensor the dimension; None: shared by all samples.
    at_once: whether ``torch.func.vmap`` runs the module for all samples; not part of what is proven.
    """

    form: tuple[Any, ...]
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    input_folds: tuple[Arrangement, ...]
    output_folds: tuple[Arrangement, ...]
    at_once: bool = field(default=False, compare=False)


class EscapedError(RuntimeError):
    """A module kept a tensor that exists under vmap only."""


class OneByOneLayer(LayerWithBelow):
    """Mixin in front of any class.

    Attributes:
        calls: ways of calling it that the proof of the layout saw.
    """

    keeps_name = True
    calls: tuple[Call, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.attachment is None or not self.recording():
            return self.whole(*args, **kwargs)
        call = self.call_of((args, kwargs))
        batch = next(iter(self.leaves.values())).shape[0]
        copies = {
            name: apply(SpreadFunction, self.get_parameter(name).detach(), leaf) for name, leaf in self.leaves.items()
        }
        if call.at_once and not torch.compiler.is_compiling():
            try:
                return self.mapped(call, (args, kwargs), batch, copies)
            except RuntimeError:  # what this batch holds leads where vmap cannot go
                self.__dict__["calls"] = tuple(replace(c, at_once=c.at_once and c is not call) for c in self.calls)
        return self.sliced(call, (args, kwargs), batch, copies)

    def sliced(self, call: Call, arguments: Any, batch: int, copies: Mapping[str, Tensor]) -> Any:
        """The outputs of ``batch`` runs of one sample each, with the sample's own copies of parameters, as one.

        copies: name -> [B, *shape].
        """
        own = {name: copy.unbind(0) for name, copy in copies.items()}
        slices = [
            [tensor] * batch if axis is None else [tensor.narrow(axis, i * k, k) for i in range(batch)]
            for tensor, axis, k in self.cuts(call, arguments, batch)
        ]  # not split: its views take no change in place
        outputs = []
        for i in range(batch):
            with self.counted_once(last=i == batch - 1):
                arguments_i = replaced(arguments, [parts[i] for parts in slices])
                outputs.append(self.run_one(arguments_i, {name: own[name][i] for name in own}))
        return self.checked(joined(outputs, call.outputs), call, batch)

    def mapped(self, call: Call, arguments: Any, batch: int, copies: Mapping[str, Tensor]) -> Any:
        """The same by one forward for all samples, each with its own random masks."""
        cuts = self.cuts(call, arguments, batch)
        given = [t if axis is None else t.unflatten(axis, (batch, k)) for t, axis, k in cuts]
        structure: Any = None

        def one(tensors: list[Tensor], own: dict[str, Tensor]) -> list[Tensor]:
            nonlocal structure
            structure = self.run_one(replaced(arguments, tensors), own)
            return list(tensors_in(structure))

        dims = ([axis for _, axis, _ in cuts], dict.fromkeys(copies, 0))
        with self.nothing_escapes():
            outputs = torch.func.vmap(one, in_dims=dims, randomness="different")(given, dict(copies))
        whole = [t.movedim(0, axis).flatten(axis, axis + 1) for t, axis in zip(outputs, call.outputs, strict=True)]
        return self.checked(replaced(structure, whole), call, batch)

    @contextmanager
    def counted_once(self, last: bool) -> Iterator[None]:
        """Put buffers back that a run writes (it counts batches, say), but for the last of them.

        Which these are is known from the run before: the proof of the layout, for the first.
        """
        known = self.__dict__.setdefault("written", set())
        held = [(module, name, b) for module in self.modules() for name, b in module._buffers.items() if b is not None]
        versions = [buffer._version for _, _, buffer in held]
        before = [b.clone() if (id(module), name) in known and not last else None for module, name, b in held]
        yield
        for (module, name, buffer), version, value in zip(held, versions, before, strict=True):
            if buffer._version != version:
                known.add((id(module), name))
                if value is not None:
                    with torch.no_grad():
                        buffer.copy_(value)

    @contextmanager
    def nothing_escapes(self) -> Iterator[None]:
        """Refuse to keep what exists under vmap only, in buffers, attributes and in lists and dicts that are some."""
        owners = [vars(module) for module in self.modules()] + [module._buffers for module in self.modules()]
        before = [dict(owner) for owner in owners]
        escaped = False
        try:
            yield
        finally:
            for owner, held in zip(owners, before, strict=True):
                for name in [name for name, value in owner.items() if isinstance(value, Tensor) and is_wrapped(value)]:
                    escaped = True
                    if name in held:  # in its place: the order of buffers is that of the state_dict
                        owner[name] = held[name]
                    else:
                        del owner[name]
                for name, value in owner.items():
                    if name in _OWN_DICTS:
                        continue
                    if isinstance(value, dict):
                        gone = [key for key, item in value.items() if any(is_wrapped(t) for t in tensors_in(item))]
                        for key in gone:
                            del value[key]
                    elif isinstance(value, list):
                        gone = [n for n, item in enumerate(value) if any(is_wrapped(t) for t in tensors_in(item))]
                        for n in reversed(gone):
                            del value[n]
                    else:
                        continue
                    escaped |= bool(gone)
        if escaped:
            raise EscapedError(f"layer {self.layer_name!r} keeps a tensor that exists under vmap only")

    def run_one(self, arguments: Any, own: Mapping[str, Tensor]) -> Any:
        """The class's own forward with these tensors in the places of parameters."""
        args, kwargs = arguments
        with standing_in([(self.places(name), tensor) for name, tensor in own.items()]):
            return self.whole(*args, **kwargs)

    def checked(self, whole: Any, call: Call, batch: int) -> Any:
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
        """The class's own forward; of BatchNorm and its kin as in evaluation, since statistics of a private batch are
        neither taken nor kept."""
        if not (self.training and isinstance(self, nn.modules.batchnorm._NormBase)):
            return super().forward(*args, **kwargs)
        try:
            self.training = False
            return super().forward(*args, **kwargs)
        finally:
            self.training = True

    def call_of(self, arguments: Any) -> Call:
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
            f"called in this way, with {sum(1 for _ in tensors_in(arguments))} tensors: which of them hold samples is "
            f"not known. {UNPROVEN}"
        )

    def cuts(self, call: Call, arguments: Any, batch: int) -> list[tuple[Tensor, int | None, int]]:
        """Each tensor of the arguments, the dimension that holds the samples, and how much of it a sample has."""
        found = []
        for tensor, axis, proven in zip(tensors_in(arguments), call.inputs, call.input_folds, strict=True):
            if axis is not None and (axis >= tensor.dim() or not self.folds_like(proven, tensor.shape[axis], batch)):
                raise BatchLayoutError(
                    f"layer {self.layer_name!r}: an input of shape {tuple(tensor.shape)} does not hold {batch} samples "
                    f"in dimension {axis}, as it did when the layout was proven"
                )
            found.append((tensor, axis, 0 if axis is None else tensor.shape[axis] // batch))
        return found


_OWN_DICTS = ("_parameters", "_buffers", "_modules")


def is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


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
