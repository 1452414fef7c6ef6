"""Runs of a model on one sample more, and what they show."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _slices, evidence
from ._nested import form, map_tensors, tensors_in
from ._validate import BatchLayoutError
from .layers import BiasLayer
from .layers.one_by_one import Call, OneByOneLayer
from .layers.own_forward import OwnForwardLayer
from .layers.spread import Copies

Calls = dict[OneByOneLayer, tuple[Call, ...]]
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError)


@dataclasses.dataclass
class Run:
    """What one run of the model showed."""

    output: Any
    seen: list[evidence.Seen]  # one for each call of a converted layer
    called: list[evidence.Called]  # one for each call of a layer that is run one sample at a time
    buffers: dict[str, Tensor]  # after the run
    at_once: set[tuple[OneByOneLayer, tuple[Any, ...]]]  # forms of calls that vmap runs, of those that were tried


@contextlib.contextmanager
def python_generators_kept() -> Iterator[None]:
    """Python's and NumPy's generators, too: stochastic depth and layer drop use them in some models."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the one that models use
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


@dataclasses.dataclass
class Trial:
    """Runs the model on rows of its inputs; generators and buffers are as before afterwards."""

    model: nn.Module
    args: Any
    kwargs: Any
    batch: int
    layers: list[BiasLayer]
    spread: set[BiasLayer] = dataclasses.field(default_factory=set)  # what they share is copied for each sample

    def run(
        self,
        rows: list[int],
        first: bool = False,
        calls: Calls | None = None,
        instead: Calls | None = None,
        changed: tuple[bool, ...] = (),
    ) -> Run:
        """One run on these rows of the inputs.

        changed: of which samples the copies are other than what they are copies of.

        first: layers with a forward of their own are tried in it. calls: layers run one sample at a time are compared
        with themselves. instead: these are run so, and the model goes on with that.
        """
        run = Run(None, [], [], {}, set())
        at_once: dict[tuple[OneByOneLayer, tuple[Any, ...]], bool] = {}
        watches: dict[OneByOneLayer, tuple[evidence.Watch, Any]] = {}

        def look(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            if first and isinstance(layer, OwnForwardLayer) and not layer.adds_its_bias_last(args, kwargs):
                raise BatchLayoutError(
                    f"layer {layer.layer_name!r} has a forward of its own, and in this model its bias is not what it "
                    "adds last. Leave it frozen, or convert the model with sample_batch=, which runs the module around "
                    "it one sample at a time",
                    [layer],
                )
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor):
                run.seen.append(evidence.Seen.of(layer, (args, kwargs), output, len(rows)))

        def look_before(layer: Any, args: Any, kwargs: Any) -> None:
            given = map_tensors((args, kwargs), torch.clone) if calls or instead else None  # it may change them
            watches[layer] = evidence.Watch.of(layer, (args, kwargs)), given

        def look_around(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
            watch, given = watches.pop(layer)
            watch.check(layer, (args, kwargs))
            if instead is not None and layer.mixin is OneByOneLayer:
                own = form((args, kwargs))
                call = next((call for call in instead.get(layer, ()) if call.form == own), None)
                if call is not None:  # else evaluation calls it in another way
                    return (layer.mapped if call.at_once else layer.sliced)(call, given, len(rows), {})
            if calls is not None and layer.mixin is OneByOneLayer:
                own = form((args, kwargs))
                call = next(call for call in calls[layer] if call.form == own)
                _slices.require_same(layer, call, given, len(rows))
                tried = _slices.works_at_once(layer, call, given, len(rows))
                at_once[layer, own] = at_once.get((layer, own), True) and tried
            run.called.append(evidence.Called.of(layer, (args, kwargs), output, len(rows)))
            return None

        handles = [
            layer.register_forward_hook(look_around, with_kwargs=True)
            if isinstance(layer, OneByOneLayer)
            else layer.register_forward_hook(look, with_kwargs=True)
            for layer in self.layers
            if layer.trained and layer.holds_samples
        ]
        handles += [
            layer.register_forward_pre_hook(look_before, with_kwargs=True)
            for layer in self.layers
            if layer.trained and isinstance(layer, OneByOneLayer)
        ]
        devices = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
        owned = [
            (module, name, own, buffer, buffer.clone())
            for name, module in self.model.named_modules()
            for own, buffer in module._buffers.items()
            if buffer is not None
        ]
        for layer in self.spread:
            layer.__dict__["trial_copies"] = Copies(len(rows), changed or (False,) * len(rows))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices), python_generators_kept():
                chosen = map_tensors((self.args, self.kwargs), partial(_take, batch=self.batch, rows=rows))
                run.output = self.model(*chosen[0], **chosen[1])
            for module, name, own, _, _ in owned:
                value = module._buffers[own]
                if value is not None:
                    run.buffers[f"{name}.{own}" if name else own] = value.clone()
            run.at_once.update(key for key, works in at_once.items() if works)
        finally:
            for layer in self.spread:
                layer.__dict__.pop("trial_copies", None)
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for module, _, own, buffer, before in owned:
                    module._buffers[own] = buffer.copy_(before)  # also where the model put another tensor there
        return run


def _take(tensor: Tensor, batch: int, rows: list[int]) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[0] != batch:
        return tensor
    taken = tensor[torch.tensor([max(row, 0) for row in rows], device=tensor.device)]
    if -1 in rows:
        taken[torch.tensor([row == -1 for row in rows], device=tensor.device)] = _changed(tensor[0])
    if MIXED in rows:
        unlike = (tensor != tensor[:1]).flatten(1).any(1) if tensor.dim() > 1 else tensor != tensor[0]
        # The last that differs: the other added row is the first.
        taken[rows.index(MIXED)] = tensor[batch - 1 - int(unlike.flip(0).int().argmax())] if unlike.any() else tensor[0]
    return taken


MIXED = -2  # of each input another row than the first


def _changed(row: Tensor) -> Tensor:
    """Another valid content for a row: signs turned, or the same numbers in another order, or one less."""
    if row.dtype == torch.bool:
        return row
    if row.is_floating_point() or row.is_complex():
        return 1 - row
    return row.flip(-1) if row.dim() and not bool((row == row.flip(-1)).all()) else (row - 1).clamp(min=0)


def another_row(args: Any, kwargs: Any, batch: int) -> int | None:
    """A row whose content differs from row 0 in some input; where all are alike, -1: row 0 changed; None: neither."""
    for tensor in tensors_in((args, kwargs)):
        if batch > 1 and tensor.dim() > 0 and tensor.shape[0] == batch:
            different = (tensor[1:] != tensor[:1]).flatten(1).any(1) if tensor.dim() > 1 else tensor[1:] != tensor[0]
            if bool(different.any()):
                return 1 + int(different.int().argmax())
    changeable = (t[0] for t in tensors_in((args, kwargs)) if t.dim() > 0 and t.shape[0] == batch)
    return -1 if any(not torch.equal(row, _changed(row)) for row in changeable) else None
