"""Which rows of a tensor are the samples: found from the model's inputs, proven by one more sample.

A leading dimension that equals the batch size proves nothing (a sequence-first tensor with T = B has it, too, and so
has a table with B rows). It must also follow when the batch grows: so the model is run on its own inputs and one more
row, without gradients; each converted layer's output must then have B + 1 rows, and what the added row holds must not
show in the others' outputs, nor in a buffer. A loss that the model itself returns must be a sum or mean over samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._validate import BatchLayoutError
from .layers import BiasLayer


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module once, breadth first: what ``model.modules()`` gives, in a third of the time. Asked twice a step."""
    found, seen = [model], {model}
    for module in found:  # grows while it is read
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from tensors_in(getattr(value, f.name))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return (
            type(value)({k: map_tensors(v, change) for k, v in value.items()})
            if type(value) is dict
            else _mapping(value, change)
        )
    if isinstance(value, Mapping):
        return _mapping(value, change)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, change) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, change) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def _mapping(value: Mapping[Any, Any], change: Callable[[Tensor], Tensor]) -> Any:
    # Mapping classes of other libraries take a plain dict: a batch encoding, an ordered dict.
    return type(value)({k: map_tensors(v, change) for k, v in value.items()})  # type: ignore[call-arg]


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


def prove(model: nn.Module, args: Any, kwargs: Any, batch: int, layers: list[BiasLayer]) -> bool:
    """Run ``model`` four times on B + 1 rows, without gradients, and require what a batch-first model does.

    A row is added behind the samples, and ahead of them (a model may mix forward only, as a causal one does along its
    time); it repeats the first sample in one run and is another in the other. In all, every converted layer must give
    B + 1 rows; and neither the outputs of the B samples, of the layers or of the model, nor a buffer may notice what
    the added row holds. A loss that the model returns must be a sum or a mean over samples.
    The generators' state and the buffers are as before afterwards.

    Returns:
        False where all samples are alike and cannot be changed, so that the second question could not be asked.

    Raises:
        BatchLayoutError: naming the layer whose leading dimension does not follow the batch or whose rows are not the
            samples, or saying that the model mixes samples, or that it cannot be run with one more row.
    """
    trial = _Trial(model, args, kwargs, batch, layers)
    other = _another_row(args, kwargs, batch)
    added = (0,) if other is None else (0, other)
    samples = range(batch)
    try:
        behind = [trial.run([*samples, row]) for row in added]
        ahead = [trial.run([row, *samples], ahead=True) for row in added] if other is not None else []
    except _FAILURES as error:
        raise BatchLayoutError(
            f"the batch layout cannot be proven: the model fails on {batch + 1} samples, given {batch} ({error})"
        ) from error
    faults = [fault for run in behind + ahead for fault in run.faults]
    if faults:
        raise BatchLayoutError(
            "the leading dimension does not follow the batch size in layer "
            + "; layer ".join(dict.fromkeys(faults))
            + ". Sequence-first inputs, tables without a batch dimension and folded or flattened batches give wrong "
            "per-sample gradients; make the layer's input batch-first, or leave its bias frozen"
        )
    for runs, kept in ((behind, slice(0, batch)), (ahead, slice(1, batch + 1))):
        if runs:
            _require_alike(runs[0], runs[-1], kept, batch)
    if other is not None and other >= 0 and loss_in(behind[0].output) is not None:
        _require_loss_of_samples(trial)
    return other is not None


def _require_alike(first: _Run, last: _Run, kept: slice, batch: int) -> None:
    """Two runs that differ in the added row must not differ in the samples: rows ``kept`` of what the model gives."""
    _require_apart(list(tensors_in(first.output)), list(tensors_in(last.output)), kept, batch)
    for (name, a), (_, b) in zip(first.digests, last.digests, strict=False):
        if not _same(a, b, 1e-6):
            raise BatchLayoutError(
                f"layer {name!r}: the row of a sample changes with another of the batch: the model mixes samples or "
                "reorders them before this layer, so that its rows are not the samples"
            )
    for name, value in first.buffers.items():
        if not _same(value, last.buffers[name], 0.0):
            raise BatchLayoutError(
                f"buffer {name!r} is written from the batch: it would hold private data without noise. Stop the model "
                "from writing it (eval() of its module does so in most)"
            )


_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError)


@dataclasses.dataclass
class _Run:
    """What one run of the model showed."""

    output: Any
    digests: list[tuple[str, Tensor]]  # of each call of a converted layer: its name, [B] float64
    buffers: dict[str, Tensor]  # after the run
    faults: list[str]


@contextlib.contextmanager
def _python_generators_kept() -> Iterator[None]:
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

    def run(self, rows: list[int], ahead: bool = False) -> _Run:
        """One run on these rows of the inputs, the last of which, or the first where ``ahead``, is the added one."""
        run = _Run(None, [], {}, [])
        batch = len(rows) - 1
        kept = slice(1, batch + 1) if ahead else slice(0, batch)

        def look(module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if output.dim() < 2 or output.shape[0] != batch + 1:
                run.faults.append(f"{module.layer_name!r} gives shape {tuple(output.shape)} for {len(rows)} samples")
            else:
                name = str(module.layer_name)
                run.digests.append((name, output[kept].flatten(1).abs().sum(1, dtype=torch.float64)))

        handles = [layer.register_forward_hook(look) for layer in self.layers if layer.trained]
        devices = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
        owned = [
            (module, name, own, buffer, buffer.clone())
            for name, module in self.model.named_modules()
            for own, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices), _python_generators_kept():
                chosen = map_tensors((self.args, self.kwargs), partial(_take, batch=self.batch, rows=rows))
                run.output = self.model(*chosen[0], **chosen[1])
            for module, name, own, _, _ in owned:
                value = module._buffers[own]
                if value is not None:
                    run.buffers[f"{name}.{own}" if name else own] = value.clone()
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


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal shapes, and values equal up to ``tolerance`` of the largest, where both are finite."""
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return bool(torch.equal(a, b))
    both = a.isfinite() & b.isfinite()
    if not bool(both.any()):
        return True
    return bool(((a - b).abs()[both] <= tolerance * a.abs()[both].max()).all())


def _take(tensor: Tensor, batch: int, rows: list[int]) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[0] != batch:
        return tensor
    taken = tensor[torch.tensor([max(row, 0) for row in rows], device=tensor.device)]
    if -1 in rows:
        taken[rows.index(-1)] = _changed(tensor[0])
    return taken


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
