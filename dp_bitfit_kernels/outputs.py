"""What a model gives for a sample is its own: asked of every tensor in its outputs.

A tensor of them holds the samples in one of the ways of ``arrangement``, and the part of a sample does not notice what
another holds, or how many there are; or it is one number, a sum or a mean over samples, as a loss is. Longer sums over
samples are refused: who takes a loss of them may do so in a way that is no sum.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _slices, evidence
from ._attributes import differ
from ._nested import Place, held_in
from ._same_draws import SameDraws
from ._survey import evaluating
from ._trial import FAILURES, Run, Trial
from ._validate import BatchLayoutError
from ._widened import HALF
from .arrangement import INNER, MAJOR, by_sample

_Held = dict[Place, Tensor]


def loss_in(output: Any) -> Tensor | None:
    """The loss that a model itself returns: its output, the item ``loss`` of it, or the first of a tuple; else None."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, tuple) and output:
        output = output[0]
    elif dataclasses.is_dataclass(output):
        output = getattr(output, "loss", None)
    return output if isinstance(output, Tensor) and output.dim() == 0 and output.is_floating_point() else None


@dataclasses.dataclass
class Singles:
    """The single numbers that a model returns.

    own: place -> whether it is all the same, or each sample's own.
    losses: those that are called so, or come first, or alone; the others are metrics, as it seems.
    """

    own: dict[Place, bool]
    losses: set[Place]


def require_own(trial: Trial, pairs: Sequence[tuple[Run, Run, slice]]) -> Singles:
    """Every output is each sample's own, or a single number.

    Args:
        pairs: runs on B + 1 rows that differ in the added one, and the rows of the samples.

    Returns:
        single numbers.

    Raises:
        BatchLayoutError: saying which output is neither.
    """
    count = trial.batch + 1
    named = [(held_by(a), held_by(b), kept) for a, b, kept in pairs]
    places = named[0][0].keys()
    if any(found.keys() != places for a, b, _ in named for found in (a, b)):
        raise BatchLayoutError(
            "how many tensors the model returns changes with what the samples hold: which of them belong to a sample "
            "is not known. Return one for all, batch-first"
        )
    singles = {}
    for place in places:
        tensors = [(a[place], b[place], kept) for a, b, kept in named]
        own, shape = _is_own(place, tensors, count), tensors[0][0].shape
        if shape.numel() == 1:  # a loss: asked also where the added row was the same to it
            singles[place] = own
        elif not own:
            raise mixing(place, shape)
    named_so = {place for place in singles if any("loss" in str(key).lower() for key, _ in place)}
    alone = not named_so and len(singles) == len(places)
    losses = {place for place in singles if alone or place in named_so or place == next(iter(places))}
    return Singles(singles, losses)


def held_by(run: Run) -> _Held:
    """The outputs that a gradient can come from."""
    found = {}
    for place, tensor in held_in(run.output):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        wraps = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if tensor.is_nested or tensor.is_meta or tensor.is_quantized or wraps:
            raise BatchLayoutError(
                f"{called(place)} is a {type(tensor).__name__} that cannot be compared (nested, on meta, quantised): "
                "whose rows are whose is not known. Return a tensor padded to one size"
            )
        dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        found[place] = dense.float() if dense.dtype.itemsize == 1 else dense
    return found


def require_not_carried(trial: Trial, pairs: Sequence[tuple[Run, Run, slice]], added: Sequence[int]) -> None:
    """What modules keep of a batch as attributes does not show in the next one.

    Raises:
        BatchLayoutError: it does, naming the attributes.
    """
    written = sorted({name for first, last, _ in pairs for name in differ(first.attributes, last.attributes)})
    if not written:
        return
    listed, samples = ", ".join(written[:8]), [*range(trial.batch)]
    try:
        after = [held_by(trial.after([*samples, row], samples)) for row in added[:2]]
    except FAILURES as error:
        raise BatchLayoutError(
            f"the model keeps what a batch held in attributes ({listed}), and fails on the next one ({error})"
        ) from error
    if any(
        not evidence.same(numbers(own), numbers(after[-1][place]), 1e-6) if place in after[-1] else True
        for place, own in after[0].items()
    ):
        raise BatchLayoutError(
            f"the model keeps what a batch held in attributes ({listed}), and it shows in its outputs for the next: "
            "records would pass from step to step without clipping and noise"
        )
    warnings.warn(
        f"the model keeps what it made from the batch as attributes ({listed}): what reads them later, in the loss or "
        "in a later step, passes records on without clipping and noise",
        stacklevel=2,
    )


def _is_own(place: Place, own: Sequence[tuple[Tensor, Tensor, slice]], count: int) -> bool:
    shape = own[0][0].shape
    if all(tensor.shape == shape for a, b, _ in own for tensor in (a, b)):
        for way in _ways(shape, count):
            parts = [(_parts(a, way, count)[kept], _parts(b, way, count)[kept]) for a, b, kept in own]
            if all(_alike(*pair) for pair in parts):
                return True
    return all(
        _of_added(place, count, kept) or (a.shape == b.shape and _alike(numbers(a), numbers(b))) for a, b, kept in own
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    return all(evidence.same(x, y, 1e-4) for x, y in evidence.at_each_size((a, b)))


def _of_added(place: Place, count: int, kept: slice) -> bool:
    """Whether it is in a list that has an entry for each sample, in that of the added row."""
    return any(n == count and isinstance(key, int) and key not in range(count)[kept] for key, n in place)


_Way = tuple[int, str, int]  # dimension, kind, rows of a sample


def _ways(shape: Sequence[int], count: int) -> Iterator[_Way]:
    """The ways in which some dimension may hold the samples, the leading one first."""
    for axis, size in enumerate(shape):
        if size and size % count == 0:
            yield axis, MAJOR, size // count
            if size > count:
                yield axis, INNER, size // count


def _parts(output: Tensor, way: _Way, count: int) -> Tensor:
    """[B, ...]: the part of each sample."""
    axis, kind, _ = way
    return by_sample(numbers(output.movedim(axis, 0)), kind, count)


def numbers(output: Tensor) -> Tensor:
    """As real numbers of at least float32."""
    output = torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
    return output.float() if output.dtype in HALF else output


def room(output: Tensor) -> float:
    """Of the largest, what rounding may take from equal sums of it."""
    eps = torch.finfo(output.dtype).eps
    return 4 * eps if output.dtype in HALF else 32 * eps


def mixing(place: Place, shape: torch.Size) -> BatchLayoutError:
    return BatchLayoutError(
        f"the output for a sample changes with another of the batch in {called(place)}, of shape {tuple(shape)} for "
        "one sample more: the inputs are sequence-first, or it is packed by what samples hold, or the model mixes "
        "samples (batch statistics, attention, a sum or a loss across it). Per-sample gradients do not exist for such "
        "a model"
    )


def called(place: Place) -> str:
    return "output" + "".join(f"[{key!r}]" for key, _ in place)


def require_same_for_more(trial: Trial) -> None:
    """What the model gives for a sample does not depend on how many there are, or what the others hold: in evaluation
    mode, and in the present modes, where random numbers do not tell samples apart.

    Raises:
        BatchLayoutError: it does: one sample more would change the gradients of all others.
    """
    with evaluating(trial.model):
        right = _same_for_more(trial)
    if right and any(module.training for module in trial.model.modules()):
        with _slices.without_dropout(trial.model):
            right = _same_for_more(trial)
    if not right:
        raise BatchLayoutError(
            "what the model gives for a sample changes with the number of samples in the batch, or with the others "
            "(does it divide by their number, or scale by the largest?). One sample more would change the gradients of "
            "all others: per-sample gradients do not exist for such a model"
        )


_Draws = Callable[[], AbstractContextManager[Any]]


def _draws(trial: Trial) -> _Draws | None:
    """Random numbers that do not tell one sample's repeats apart; None: there are none, with a warning, or the model
    cannot be run on repeats. Of one that tells them apart without any, by their places, all are asked."""
    repeats = [0] * min(max(trial.batch, 4), 8)
    for draws in (SameDraws, partial(SameDraws, last_only=True)):
        found = _output_of(trial, repeats, draws)
        if found is None:
            return None
        each = [t for t in found.values() if t.dim() > 0 and len(t) == len(repeats)]
        if all(_slices.alike(t, t[:1].expand_as(t)) for t in each):
            return draws
    first, last = (_output_of(trial, repeats, partial(trial.seeded, seed)) for seed in (1, 2))
    if (
        first is None
        or last is None
        or all(_slices.alike(first[place], last[place]) for place in first.keys() & last.keys())
    ):
        return SameDraws
    warnings.warn(
        "whether what the model gives for a sample depends on the number of samples could not be asked: random numbers "
        "that differ from sample to sample (of NumPy, or sampled from scores) would hide it",
        stacklevel=2,
    )
    return None


def _same_for_more(trial: Trial) -> bool:
    """One sample more, and each half of the samples alone: what depends on the largest or the least of a batch does not
    notice another copy of one. Of repeats of one sample a mean is the same however many, and a sum grows evenly.
    """
    samples, half, draws = [*range(trial.batch)], trial.batch // 2, _draws(trial)
    whole = None if draws is None else _output_of(trial, samples, draws)
    if draws is None or whole is None:  # its evaluation is another thing (decoding)
        return True
    more = _output_of(trial, [*samples, 0], draws)
    right = more is None or _agree(whole, trial.batch, more, trial.batch + 1, 0)
    for rows in (samples[:half], samples[half:]) if half else ():
        part = _output_of(trial, rows, draws)
        right = right and (part is None or _agree(part, len(rows), whole, trial.batch, rows[0]))
    if right and any(tensor.numel() == 1 for tensor in whole.values()):
        # Once more in float64: a difference of large means may be far below what they are rounded by.
        right = _totals_agree(trial, draws, torch.float32, True) or _totals_agree(trial, draws, torch.float64, False)
    return right


def _output_of(trial: Trial, rows: list[int], draws: _Draws, dtype: torch.dtype = torch.float32) -> _Held | None:
    try:
        return held_by(trial.run(rows, exact=dtype, same_draws=draws))
    except FAILURES:
        return None


def _agree(few: _Held, count: int, many: _Held, among: int, first: int) -> bool:
    """Whether the outputs for ``count`` samples are those that they have ``among`` more, from ``first`` on, in a way
    that the shapes allow, where they allow one."""
    for place in few.keys() & many.keys():
        a, b = few[place], many[place]
        if a.dim() != b.dim():
            continue
        known = set(_ways(b.shape, among))
        ways = [way for way in _ways(a.shape, count) if way in known]
        pairs = [(_parts(a, way, count), _parts(b, way, among)[first : first + count]) for way in ways]
        pairs = [(own, other) for own, other in pairs if own.shape == other.shape]
        size = _slices.room(a.dtype)
        if pairs and not any(
            all(evidence.same(own, other, size) for own, other in evidence.at_each_size(pair)) for pair in pairs
        ):
            return False
    return True


def _totals_agree(trial: Trial, draws: _Draws, dtype: torch.dtype, otherwise: bool) -> bool:
    """Whether totals of two, of four and of six copies of one sample are all the same, or as much more each time.

    otherwise: what holds where the model cannot run on these.
    """
    two, four, six = (_output_of(trial, [0] * count, draws, dtype) for count in (2, 4, 6))
    if two is None or four is None or six is None:
        return otherwise
    for place in two.keys() & four.keys() & six.keys():
        values = [two[place], four[place], six[place]]
        if all(value.numel() == 1 and bool(value.isfinite().all()) for value in values):
            a, b, c = (numbers(value).double().flatten() for value in values)
            size = _slices.room(values[0].dtype) * torch.stack([b - a, c - b, 1e-2 * c]).abs().amax()
            if not bool(((c - b) - (b - a)).abs().amax() <= size):
                return False
    return True
