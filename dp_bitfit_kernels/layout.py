"""Which rows of a tensor are the samples: found from the model's inputs, proven by one more sample.

A leading dimension that equals the batch size proves nothing (a sequence-first tensor with T = B has it, too, and so
has a table with B rows). It must also follow when the batch grows: so the model is run on its own inputs and one more
row, without gradients. Each converted layer's output must then hold B + 1 samples in one of the ways of
``arrangement``, and what the added row holds must show in its own part alone, nor in a buffer. A loss that the model
itself returns must be a sum or mean over samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _slices, evidence
from ._nested import form, map_tensors, tensors_in
from ._validate import BatchLayoutError
from .arrangement import PLAIN, Arrangement
from .layers import BiasLayer
from .layers.one_by_one import Call, OneByOneLayer
from .layers.own_forward import OwnForwardLayer


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module once, breadth first: what ``model.modules()`` gives, in a third of the time. Asked twice a step."""
    found, seen = [model], {model}
    for module in found:  # grows while it is read
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def leading_sizes(args: Any, kwargs: Any) -> set[int]:
    """Leading sizes of all tensor inputs of at least one dimension."""
    return {t.shape[0] for t in tensors_in((args, kwargs)) if t.dim() > 0}


def batch_of(args: Any, kwargs: Any) -> int:
    """B: the one leading size that all tensor inputs share.

    Raises:
        BatchLayoutError: there is no tensor, or the leading sizes differ.
    """
    sizes = leading_sizes(args, kwargs)
    if len(sizes) != 1:
        found = "no tensor" if not sizes else f"leading sizes {sorted(sizes)}"
        raise BatchLayoutError(
            f"the batch size cannot be read off the model's inputs ({found}): wrap the step in `with engine.batch(B):`"
        )
    return sizes.pop()


@dataclasses.dataclass
class Proof:
    """What the runs of one batch proved.

    complete: False where all samples are alike and cannot be changed, so that not everything could be asked.
    """

    complete: bool
    arrangements: dict[BiasLayer, Arrangement]
    calls: dict[OneByOneLayer, tuple[Call, ...]]
    tried: list[OwnForwardLayer]

    def unlike_before(self) -> list[str]:
        """Names of layers that were taken for arranged in another way than is proven, or were not known."""
        arranged = [layer.layer_name for layer, found in self.arrangements.items() if layer.arrangement != found]
        return arranged + [alone.layer_name for alone, calls in self.calls.items() if alone.calls != calls]

    def apply(self) -> None:
        """Tell the layers."""
        for layer, arrangement in self.arrangements.items():
            if arrangement is PLAIN:  # as it is by itself: code that was compiled on that stays right
                layer.__dict__.pop("arrangement", None)
            else:
                layer.__dict__["arrangement"] = arrangement
        for alone, calls in self.calls.items():
            alone.__dict__["calls"] = calls
        for own in self.tried:
            own.__dict__["tried"] = True


def prove(model: nn.Module, args: Any, kwargs: Any, batch: int, layers: list[BiasLayer]) -> Proof:
    """Run ``model`` four times on B + 1 rows, without gradients, and see where each converted layer holds the samples.

    A row is added behind the samples, and ahead of them (a model may mix forward only, as a causal one does along its
    time); it repeats the first sample in one run and is another in the other. In all, every converted layer must hold
    B + 1 samples; and neither the outputs of the B samples, of the layers or of the model, nor a buffer may notice what
    the added row holds. A loss that the model returns must be a sum or a mean over samples. Where layers are run one
    sample at a time, a fifth run on the B samples tells which dimensions of their inputs and outputs follow.
    The generators' state and the buffers are as before afterwards.

    Raises:
        BatchLayoutError: naming the layer whose output does not follow the batch or whose rows are not the samples, or
            saying that the model mixes samples, or that it cannot be run with one more row.
    """
    trial = _Trial(model, args, kwargs, batch, layers)
    other = _another_row(args, kwargs, batch)
    added = (0,) if other is None else (0, other, _MIXED) if other >= 0 else (0, other)
    samples = range(batch)
    alone = any(isinstance(layer, OneByOneLayer) for layer in layers)
    try:
        behind = [trial.run([*samples, row], first=not n) for n, row in enumerate(added)]
        ahead = [trial.run([row, *samples]) for row in added[:2]] if other is not None else []
        same = trial.run([*samples]) if alone else None
    except _FAILURES as error:
        raise BatchLayoutError(
            f"the batch layout cannot be proven: the model fails on {batch + 1} samples, given {batch} ({error})"
        ) from error
    pairs = [(behind[0], last, slice(0, batch)) for last in behind[1:] or behind]
    pairs += [(a, ahead[-1], slice(1, batch + 1)) for a in ahead[:1]]
    shapes = [tuple(tensor.shape) for tensor in tensors_in((args, kwargs))]
    arrangements = evidence.arrangements([(a.seen, b.seen, kept) for a, b, kept in pairs], batch, shapes)
    called: list[evidence.Pair] = [(a.called, b.called, kept) for a, b, kept in pairs]
    calls = evidence.calls(called, same.called if same else [], batch, shapes)
    if calls:
        at_once = trial.run([*samples], calls=calls).at_once
        calls = {
            alone: tuple(dataclasses.replace(call, at_once=(alone, call.form) in at_once) for call in known)
            for alone, known in calls.items()
        }
    for first, last, kept in pairs:
        _require_apart(list(tensors_in(first.output)), list(tensors_in(last.output)), kept, batch)
        for name, value in first.buffers.items():
            if not evidence.same(value, last.buffers[name], 0.0):
                raise BatchLayoutError(
                    f"buffer {name!r} is written from the batch: it would hold private data without noise. Stop the "
                    "model from writing it (eval() of its module does so in most)"
                )
    if other is not None and other >= 0 and loss_in(behind[0].output) is not None:
        _require_loss_of_samples(trial)
    tried = [layer for layer in arrangements if isinstance(layer, OwnForwardLayer)]
    return Proof(other is not None, arrangements, calls, tried)


_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError)


@dataclasses.dataclass
class _Run:
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
class _Trial:
    """Runs the model on rows of its inputs; generators and buffers are as before afterwards."""

    model: nn.Module
    args: Any
    kwargs: Any
    batch: int
    layers: list[BiasLayer]

    def run(
        self, rows: list[int], first: bool = False, calls: dict[OneByOneLayer, tuple[Call, ...]] | None = None
    ) -> _Run:
        """One run on these rows of the inputs.

        first: layers with a forward of their own are tried in it. calls: layers run one sample at a time are compared
        with themselves.
        """
        run = _Run(None, [], [], {}, set())
        at_once: dict[tuple[OneByOneLayer, tuple[Any, ...]], bool] = {}
        watches: dict[OneByOneLayer, evidence.Watch] = {}

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
                run.seen.append(evidence.Seen.of(layer, output, len(rows)))

        def look_before(layer: Any, args: Any, kwargs: Any) -> None:
            watches[layer] = evidence.Watch.of(layer, (args, kwargs))

        def look_around(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            watches.pop(layer).check(layer, (args, kwargs))
            if calls is not None and layer.mixin is OneByOneLayer:
                own = form((args, kwargs))
                call = next(call for call in calls[layer] if call.form == own)
                _slices.require_same(layer, call, (args, kwargs), len(rows))
                tried = _slices.works_at_once(layer, call, (args, kwargs), len(rows))
                at_once[layer, own] = at_once.get((layer, own), True) and tried
            run.called.append(evidence.Called.of(layer, (args, kwargs), output, len(rows)))

        handles = [
            layer.register_forward_hook(look_around, with_kwargs=True)
            if isinstance(layer, OneByOneLayer)
            else layer.register_forward_hook(look, with_kwargs=True)
            for layer in self.layers
            if layer.trained
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
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for module, _, own, buffer, before in owned:
                    module._buffers[own] = buffer.copy_(before)  # also where the model put another tensor there
        return run


def loss_in(output: Any) -> Tensor | None:
    """The loss that a model itself returns: its output, the item ``loss`` of it, or the first of a tuple; else None."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, tuple) and output:
        output = output[0]
    elif dataclasses.is_dataclass(output):
        output = getattr(output, "loss", None)
    return output if isinstance(output, Tensor) and output.dim() == 0 and output.is_floating_point() else None


def _require_loss_of_samples(trial: _Trial) -> None:
    """Of a sum or a mean over samples F, F(0, 0) + F(k, k) = F(0, k) + F(k, 0) on batches of two.

    The same samples stand at the same places on both sides, so that random masks cancel.
    """
    batch = trial.batch
    for other in sorted({1, batch // 3, 2 * batch // 3, batch - 1} - {0}):
        try:
            found = [loss_in(trial.run([a, b]).output) for a in (0, other) for b in (0, other)]
        except _FAILURES:  # a model that cannot run on two samples is not asked
            return
        losses = torch.stack([loss.double() for loss in found if loss is not None])
        if losses.numel() < 4 or not bool(losses[1:3].isfinite().all()):
            continue
        size = 32 * max(torch.finfo(loss.dtype).eps for loss in found if loss is not None) * losses.abs().max()
        # Also where a sample has no loss of its own (no token that counts), but has one beside another.
        if not bool((losses[0] + losses[3] - losses[1] - losses[2]).abs() <= size):
            raise BatchLayoutError(
                "the loss that the model returns is not a mean or sum over samples: what one sample adds depends on "
                "the others (a mean over tokens that are not padding, class weights, in-batch negatives). Clipping "
                "cannot bound a sample's influence on such a loss: take the loss of each sample, then their mean"
            )


def _take(tensor: Tensor, batch: int, rows: list[int]) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[0] != batch:
        return tensor
    taken = tensor[torch.tensor([max(row, 0) for row in rows], device=tensor.device)]
    if -1 in rows:
        taken[rows.index(-1)] = _changed(tensor[0])
    if _MIXED in rows:
        unlike = (tensor != tensor[:1]).flatten(1).any(1) if tensor.dim() > 1 else tensor != tensor[0]
        # The last that differs: the other added row is the first.
        taken[rows.index(_MIXED)] = (
            tensor[batch - 1 - int(unlike.flip(0).int().argmax())] if unlike.any() else tensor[0]
        )
    return taken


_MIXED = -2  # of each input another row than the first


def _changed(row: Tensor) -> Tensor:
    """Another valid content for a row: signs turned, or the same numbers in another order, or one less."""
    if row.dtype == torch.bool:
        return row
    if row.is_floating_point() or row.is_complex():
        return 1 - row
    return row.flip(-1) if row.dim() and not bool((row == row.flip(-1)).all()) else (row - 1).clamp(min=0)


def _another_row(args: Any, kwargs: Any, batch: int) -> int | None:
    """A row whose content differs from row 0 in some input; where all are alike, -1: row 0 changed; None: neither."""
    for tensor in tensors_in((args, kwargs)):
        if batch > 1 and tensor.dim() > 0 and tensor.shape[0] == batch:
            different = (tensor[1:] != tensor[:1]).flatten(1).any(1) if tensor.dim() > 1 else tensor[1:] != tensor[0]
            if bool(different.any()):
                return 1 + int(different.int().argmax())
    changeable = (t[0] for t in tensors_in((args, kwargs)) if t.dim() > 0 and t.shape[0] == batch)
    return -1 if any(not torch.equal(row, _changed(row)) for row in changeable) else None


def _require_apart(first_output: list[Tensor], last_output: list[Tensor], kept: slice, batch: int) -> None:
    sizes = {t.shape[0] for t in first_output if t.dim() > 0}
    if batch in sizes and batch + 1 not in sizes:
        raise BatchLayoutError(
            f"the model's output has {batch} rows for {batch + 1} samples: its batch is not the leading dimension of "
            "its inputs (sequence-first inputs?); give it batch-first inputs"
        )
    for first, second in zip(first_output, last_output, strict=True):
        if first.dim() == 0 or first.shape[0] != batch + 1 or first.shape != second.shape:
            continue
        if not first.is_floating_point():
            continue
        a, b = first[kept].float(), second[kept].float()
        finite = a.isfinite() & b.isfinite()
        size = float(a[finite].abs().max()) if bool(finite.any()) else 0.0
        if bool(((a - b).abs()[finite] > 1e-4 * size).any()):
            raise BatchLayoutError(
                "the output for a sample changes with another of the batch: the inputs are sequence-first, or the "
                "model mixes samples (batch statistics, attention or a loss across the batch). Per-sample gradients "
                "do not exist for such a model"
            )
