"""What a model gives for a sample is its own: asked of every tensor in its outputs.

A tensor of them holds the samples in one of the ways of ``arrangement``, and the part of a sample does not notice what
another holds, or how many there are; or it is one number, a sum or a mean over samples, as a loss is. Longer sums over
samples are refused: who takes a loss of them may do so in a way that is no sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _slices, evidence
from ._nested import Place, held_in
from ._same_draws import SameDraws
from ._survey import evaluating
from ._trial import FAILURES, Run, Trial
from ._validate import BatchLayoutError
from .arrangement import by_sample, candidates

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


def require_own(trial: Trial, pairs: Sequence[tuple[Run, Run, slice]], other: int | None) -> None:
    """Every output is each sample's own, or a total of them.

    Args:
        pairs: runs on B + 1 rows that differ in the added one, and the rows of the samples.
        other: a row unlike the first, or -1 for a changed one; None: there is none, so that nothing shows.

    Raises:
        BatchLayoutError: saying which output is neither.
    """
    count = trial.batch + 1
    named = [(_held_by(a), _held_by(b), kept) for a, b, kept in pairs]
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
            raise _mixing(place, shape)
    if singles and other is not None:
        _require_totals(trial, other, singles)


def _held_by(run: Run) -> _Held:
    """The outputs that a gradient can come from."""
    return {place: tensor for place, tensor in held_in(run.output) if tensor.is_floating_point() or tensor.is_complex()}


def _is_own(place: Place, own: Sequence[tuple[Tensor, Tensor, slice]], count: int) -> bool:
    shape = own[0][0].shape
    if any(tensor.shape != shape for a, b, _ in own for tensor in (a, b)):
        return False
    for kind, _ in _ways(shape, count):
        parts = [(_parts(a, kind, count)[kept], _parts(b, kind, count)[kept]) for a, b, kept in own]
        if all(evidence.same(x, y, 1e-4) for pair in parts for x, y in evidence.at_each_size(pair)):
            return True
    return all(
        _of_added(place, count, kept)
        or all(evidence.same(x, y, 1e-4) for x, y in evidence.at_each_size((_numbers(a), _numbers(b))))
        for a, b, kept in own
    )


def _of_added(place: Place, count: int, kept: slice) -> bool:
    """Whether it is in a list that has an entry for each sample, in that of the added row."""
    return any(n == count and isinstance(key, int) and key not in range(count)[kept] for key, n in place)


def _ways(shape: Sequence[int], count: int) -> Iterator[tuple[str, int]]:
    return candidates((*shape, 1) if len(shape) == 1 else tuple(shape), count, channels_first=False)


def _parts(output: Tensor, kind: str, count: int) -> Tensor:
    """[B, ...]: the part of each sample."""
    numbers = _numbers(output)
    return by_sample(numbers[:, None] if numbers.dim() == 1 else numbers, kind, count)


def _numbers(output: Tensor) -> Tensor:
    """As real numbers of at least float32."""
    output = torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def _require_totals(trial: Trial, other: int, singles: dict[Place, bool]) -> None:
    """Of a sum or a mean over samples F, F(0, 0) + F(k, k) = F(0, k) + F(k, 0) on batches of two.

    The same samples stand at the same places on both sides, so that random masks cancel.

    singles: places of single numbers -> whether that is all the same, or each sample's own.
    """
    batch = trial.batch
    others = sorted({1, batch // 3, 2 * batch // 3, batch - 1} - {0}) if other > 0 else [-1]
    for k in others:
        try:
            found = [_held_by(trial.run([a, b])) for a in (0, k) for b in (0, k)]
            if batch == 1:  # two are as many as the one and the added: does a list follow?
                found.append(_held_by(trial.run([0, 0, 0])))
        except FAILURES:  # a model that cannot run on two samples is not asked
            return
        for place, own in singles.items():
            values = [run[place] for run in found if place in run]
            if len(values) == len(found):
                _require_total(place, values[:4])
            elif not own:  # else in a list of one for each sample
                raise _mixing(place, torch.Size())


def _require_total(place: Place, values: list[Tensor]) -> None:
    losses = torch.stack([_numbers(value).double() for value in values])
    if not bool(losses[1:3].isfinite().all()):
        return
    size = 32 * torch.finfo(values[0].dtype).eps * losses.abs().amax()
    # Also where a sample has no loss of its own (no token that counts), but has one beside another.
    if not bool(((losses[0] + losses[3] - losses[1] - losses[2]).abs() <= size).all()):
        raise BatchLayoutError(
            f"the loss {_called(place)} that the model returns is not a mean or sum over samples: what one sample adds "
            "depends on the others (a mean over tokens that are not padding, class weights, in-batch negatives). "
            "Clipping cannot bound a sample's influence on such a loss: take the loss of each sample, then their mean"
        )


def _mixing(place: Place, shape: torch.Size) -> BatchLayoutError:
    return BatchLayoutError(
        f"the output for a sample changes with another of the batch in {_called(place)}, of shape {tuple(shape)} for "
        "one sample more: the inputs are sequence-first, or it is packed by what samples hold, or the model mixes "
        "samples (batch statistics, attention, a sum or a loss across it). Per-sample gradients do not exist for such "
        "a model"
    )


def _called(place: Place) -> str:
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
            right = not _same_for_repeats(trial) or _same_for_more(trial)
    if not right:
        raise BatchLayoutError(
            "what the model gives for a sample changes with the number of samples in the batch, or with the others "
            "(does it divide by their number, or scale by the largest?). One sample more would change the gradients of "
            "all others: per-sample gradients do not exist for such a model"
        )


def _same_for_repeats(trial: Trial) -> bool:
    """Whether the model gives one sample's repeats the same: else random numbers still tell them apart."""
    count = min(max(trial.batch, 4), 8)
    found = _output_of(trial, [0] * count)
    if found is None:
        return False
    return all(_slices.alike(t, t[:1].expand_as(t)) for t in found.values() if t.dim() > 0 and len(t) == count)


def _same_for_more(trial: Trial) -> bool:
    """One sample more, and each half of the samples alone: what depends on the largest or the least of a batch does not
    notice another copy of one. Of repeats of one sample a mean is the same however many, a sum is as many times that.
    """
    samples, half = [*range(trial.batch)], trial.batch // 2
    whole = _output_of(trial, samples)
    if whole is None:  # its evaluation is another thing (decoding)
        return True
    more = _output_of(trial, [*samples, 0])
    right = more is None or _agree(whole, trial.batch, more, trial.batch + 1, 0)
    for rows in (samples[:half], samples[half:]) if half else ():
        part = _output_of(trial, rows)
        right = right and (part is None or _agree(part, len(rows), whole, trial.batch, rows[0]))
    if right and any(tensor.numel() == 1 for tensor in whole.values()):
        two, four = _output_of(trial, [0] * 2), _output_of(trial, [0] * 4)
        right = two is None or four is None or _totals_agree(two, four)
    return right


def _output_of(trial: Trial, rows: list[int]) -> _Held | None:
    try:
        with SameDraws():
            return _held_by(trial.run(rows))
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
        ways = [kind for kind, k in _ways(a.shape, count) if (kind, k) in known]
        pairs = [(_parts(a, kind, count), _parts(b, kind, among)[first : first + count]) for kind in ways]
        pairs = [(own, other) for own, other in pairs if own.shape == other.shape]
        if pairs and not any(
            all(_slices.alike(own, other) for own, other in evidence.at_each_size(pair)) for pair in pairs
        ):
            return False
    return True


def _totals_agree(two: _Held, four: _Held) -> bool:
    """Totals of two and of four copies of one sample."""
    for place in two.keys() & four.keys():
        a, b = two[place], four[place]
        if a.numel() == b.numel() == 1 and bool(a.isfinite().all()):
            a, b = _numbers(a).flatten(), _numbers(b).flatten()
            if not _slices.alike(a, b) and not _slices.alike(2 * a, b):
                return False
    return True
