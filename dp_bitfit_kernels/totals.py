"""A single number that a model returns, as a loss, is a sum or a mean over samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from ._nested import Place
from ._trial import FAILURES, Trial
from ._validate import BatchLayoutError
from .outputs import Singles, called, held_by, mixing, numbers, room

_ROWS = 10  # of a batch, whose losses are asked in pairs
_BESIDE = 28  # others beside them


def require_totals(trial: Trial, other: int, singles: Singles) -> None:
    """Of a sum or a mean over samples F, F(a, b) + F(c, d) = F(a, d) + F(c, b), alone and with others beside them.

    The same samples stand at the same places on both sides, so that random masks cancel. Asked of rows that differ in
    one input or another, in their labels first; of pairs, where a class that is rare weighs most; and among others, for
    what only more than two samples show (the hardest of a batch).

    Args:
        other: a row unlike the first, or -1 for a changed one.

    Raises:
        BatchLayoutError: naming the number, of losses; other numbers (a perplexity) are named in a warning.
    """
    rows = _rows(trial) if other > 0 else [0, -1]
    quadruples: list[tuple[int, int, int, int, tuple[int, ...]]] = [(0, row, 0, row, ()) for row in rows[1:]]
    if other > 0:
        quadruples += [(a, c, b, d, _beside(trial.batch, (a, b, c, d))) for a, c, b, d in _different(rows, trial.batch)]
    told: set[Place] = set()
    for a, c, b, d, beside in quadruples:
        try:
            found = _four(trial, (a, c), (b, d), beside, torch.float32)
            if len(beside) + 2 == trial.batch + 1:  # as many as the samples and the added: does a list follow?
                found.append(held_by(trial.run([0, 0, 0], exact=torch.float32)))
        except FAILURES:  # a model that cannot run on so many is not asked
            continue
        for place, own in singles.own.items():
            values = [run[place] for run in found if place in run]
            if len(values) == len(found):
                defect, allowed = _defect(values)
                if not defect <= allowed and _stays(trial, place, (a, c), (b, d), beside, defect):
                    told.add(place)
                    if place in singles.losses:
                        raise BatchLayoutError(_no_total(place))
            elif not own:  # else in a list of one for each sample
                raise mixing(place, torch.Size())

    for place in told:
        warnings.warn(f"{_no_total(place)}. As a metric it does no harm: keep it out of the loss", stacklevel=2)


def _rows(trial: Trial) -> list[int]:
    """The first row, one of each label, rows unlike the first in one input or another, and some from in between."""
    batch = trial.batch
    labels: list[int] = []
    unlike: list[int] = []
    for tensor in trial.of_samples():
        if tensor.dim() == 1 and not tensor.is_floating_point() and not tensor.is_complex():
            values, counts = tensor.unique(return_counts=True)
            rare = values[counts.argsort()][:_ROWS]
            labels += [int((tensor == value).int().argmax()) for value in rare]
        else:
            apart = (tensor != tensor[:1]).reshape(batch, -1).sum(1)
            unlike.append(int(apart.argmax()))
    between = [1, batch // 3, batch // 2, 2 * batch // 3, batch - 1]
    return list(dict.fromkeys([0, *labels[: _ROWS // 2], *unlike, *between, *labels]))[:_ROWS]


def _different(rows: list[int], batch: int) -> Iterator[tuple[int, int, int, int]]:
    """Some quadruples of different rows."""
    known = list(dict.fromkeys([*rows, *range(batch)]))[:8]
    for places in ((0, 1, 2, 3), (0, 2, 4, 5), (0, 3, 6, 7)):
        if len(known) > max(places):
            a, c, b, d = (known[place] for place in places)
            yield a, c, b, d


def _beside(batch: int, chosen: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(row for row in range(batch) if row not in chosen)[:_BESIDE]


def _four(
    trial: Trial, first: tuple[int, int], second: tuple[int, int], beside: tuple[int, ...], dtype: torch.dtype
) -> list[dict[Place, Tensor]]:
    return [held_by(trial.run([p, q, *beside], exact=dtype)) for p in first for q in second]


def _defect(values: list[Tensor]) -> tuple[float, float]:
    """|F(a, b) + F(c, d) - F(a, d) - F(c, b)|, and what rounding may make of it."""
    losses = torch.stack([numbers(value).double() for value in values[:4]])
    if not bool(losses[1:3].isfinite().all()):
        return 0.0, 0.0
    # Also where a sample has no loss of its own (no token that counts), but has one beside another.
    defect = (losses[0] + losses[3] - losses[1] - losses[2]).abs().amax()
    return float(defect), room(values[0]) * float(losses.abs().amax())


def _stays(
    trial: Trial,
    place: Place,
    first: tuple[int, int],
    second: tuple[int, int],
    beside: tuple[int, ...],
    defect: float,
) -> bool:
    """Whether float64 leaves the defect as large: a difference of large means is far below what they are rounded by."""
    try:
        values = [run[place] for run in _four(trial, first, second, beside, torch.float64) if place in run]
    except FAILURES:
        return True
    if len(values) < 4 or values[0].dtype != torch.float64:
        return True
    return not _defect(values)[0] <= 1e-4 * defect


def _no_total(place: Place) -> str:
    return (
        f"the number {called(place)} that the model returns is not a mean or sum over samples: what one sample adds "
        "depends on the others (a mean over tokens that are not padding, class weights, in-batch negatives, the "
        "hardest of a batch). Clipping cannot bound a sample's influence on such a loss: take the loss of each sample, "
        "then their mean"
    )
