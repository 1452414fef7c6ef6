"""Poisson sampling: what is drawn, with which probability, and how a draw reaches the user's loop."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dp_bitfit_kernels._validate import SamplingError
from dp_bitfit_kernels.reference import random_words
from dp_bitfit_kernels.sampling import (
    inclusion,
    split,
    threshold,
)

KEY = torch.arange(1, 9, dtype=torch.int32) * 0x01234567
Q, N, DRAWS = 0.1, 1500, 400


def chacha(step: int, first: int, count: int) -> Tensor:
    return random_words(KEY, torch.tensor([step]), 1, first, count)


def numpy_words(step: int, first: int, count: int) -> Tensor:
    """Cheap words for tests that are not about randomness."""
    words = np.random.default_rng([7, step, first]).integers(-(2**63), 2**63, count, dtype=np.int64)
    return torch.from_numpy(words)


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    """[DRAWS, N] bool: who is in which draw, from the cipher's own words."""
    rows = np.zeros((DRAWS, N), dtype=bool)
    for draw in range(DRAWS):
        rows[draw, inclusion(chacha, N, Q, draw).numpy()] = True
    return rows


def variance_z(counts: np.ndarray, expected: float) -> float:
    """How many standard errors the sample variance of near-normal counts lies from `expected`."""
    return float((counts.var(ddof=1) / expected - 1) / math.sqrt(2 / (len(counts) - 1)))


def correlation(rows: np.ndarray) -> tuple[float, float]:
    """(z of the mean square, greatest absolute value) of the columns' correlations, each scaled to about N(0, 1)."""
    pairs = np.corrcoef(rows.T)[np.triu_indices(rows.shape[1], 1)] * math.sqrt(len(rows) - 1)
    return float((np.mean(pairs**2) - 1) / math.sqrt(2 / len(pairs))), float(np.abs(pairs).max())


def shuffled(draws: int) -> np.ndarray:
    """The sampler that DP-SGD code often has instead: an epoch's permutation cut into fixed batches."""
    rng = np.random.default_rng(0)
    rows = np.zeros((draws, N), dtype=bool)
    size = int(Q * N)
    for start in range(0, draws, N // size):
        order = rng.permutation(N)
        for k in range(min(N // size, draws - start)):
            rows[start + k, order[k * size : (k + 1) * size]] = True
    return rows


def test_batch_sizes_are_binomial(matrix: np.ndarray) -> None:
    sizes = matrix.sum(1)
    assert abs(sizes.mean() - N * Q) < 4 * math.sqrt(N * Q * (1 - Q) / DRAWS)
    assert abs(variance_z(sizes, N * Q * (1 - Q))) < 4
    assert variance_z(shuffled(DRAWS).sum(1), N * Q * (1 - Q)) < -12


def test_participations_are_binomial(matrix: np.ndarray) -> None:
    assert abs(variance_z(matrix.sum(0), DRAWS * Q * (1 - Q))) < 4
    assert variance_z(shuffled(DRAWS).sum(0), DRAWS * Q * (1 - Q)) < -12


def test_records_are_included_independently(matrix: np.ndarray) -> None:
    z, largest = correlation(matrix)
    assert abs(z) < 5
    assert largest < 6.5
    twins = matrix.copy()
    twins[:, 1] = twins[:, 0]  # two records that share a word
    assert correlation(twins)[1] > 15


def test_draws_are_independent(matrix: np.ndarray) -> None:
    z, largest = correlation(matrix.T)
    assert abs(z) < 5
    assert largest < 6.5
    replayed = matrix.copy()
    replayed[1] = replayed[0]  # a draw number that was used twice
    assert correlation(replayed.T)[1] > 25


def test_equal_draw_numbers_repeat_and_others_do_not() -> None:
    first = inclusion(chacha, 5000, 0.01, 3)
    assert torch.equal(first, inclusion(chacha, 5000, 0.01, 3))
    assert not torch.equal(first, inclusion(chacha, 5000, 0.01, 4))


def test_inclusion_does_not_depend_on_the_other_records() -> None:
    """A record more changes nothing for those that were there: that is what add-or-remove-one compares."""
    small, large = inclusion(chacha, 999, 0.1, 0), inclusion(chacha, 1000, 0.1, 0)
    assert torch.equal(small, large[large < 999])


def test_long_draws_are_cut_into_chunks_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inclusion(chacha, 1000, 0.1, 5)
    monkeypatch.setattr("dp_bitfit_kernels.sampling._CHUNK", 64)
    assert torch.equal(whole, inclusion(chacha, 1000, 0.1, 5))
    assert torch.equal(whole, whole.sort().values)


@settings(deadline=None)
@example(1e-7)
@example(1000 / 67349)
@example(Fraction(1000, 67349))
@example(1e-8)
@example(float(np.nextafter(1.0, 0.0)))
@example(1 - Fraction(1, 10**25))
@given(st.one_of(st.floats(min_value=1e-15, max_value=1.0), st.fractions(Fraction(1, 10**15), 1)))
def test_realised_rate_never_exceeds_q(q: float | Fraction) -> None:
    limit = threshold(q)
    assert Fraction(limit, 2**64) <= Fraction(q) < Fraction(limit + 1, 2**64)
    if limit == 2**64:
        return
    words = [limit - 1, limit, min(limit + 1, 2**64 - 1), 0, 2**64 - 1, 2**63 - 1, 2**63]

    def fixed(step: int, first: int, count: int) -> Tensor:
        signed = [w - 2**64 if w >= 2**63 else w for w in words]
        return torch.tensor(signed[first : first + count], dtype=torch.int64)

    assert inclusion(fixed, len(words), q, 0).tolist() == [i for i, w in enumerate(words) if w < limit]


def test_a_rate_of_one_includes_every_record() -> None:
    def no_words(step: int, first: int, count: int) -> Tensor:
        return torch.full((count,), -1)  # the largest unsigned word: below no threshold

    assert inclusion(no_words, 17, 1.0, 0).tolist() == list(range(17))
    assert inclusion(no_words, 17, 1, 0).tolist() == list(range(17))
    assert inclusion(no_words, 17, float(np.nextafter(1.0, 0.0)), 0).tolist() == []


@pytest.mark.parametrize("q", [0, 0.0, -0.1, 1.0000001, math.nan, math.inf, "0.1", None, 1e-30])
def test_impossible_rates_are_refused(q: Any) -> None:
    with pytest.raises(SamplingError, match="sample_rate"):
        threshold(q)


@given(st.sets(st.integers(0, 300), max_size=120), st.one_of(st.none(), st.integers(1, 50)), st.booleans())
def test_splitting_neither_truncates_nor_repeats(chosen: set[int], limit: int | None, pad: bool) -> None:
    indices = sorted(chosen)
    pad = pad and limit is not None
    batches = split(indices, 9, limit, pad)
    counted: list[int] = []
    for part, (rows, ticket) in enumerate(batches):
        assert (ticket.draw, ticket.part, ticket.parts) == (9, part, len(batches))
        assert ticket.final == (part == len(batches) - 1)
        assert ticket.size == len(rows) >= 1
        assert limit is None or len(rows) <= limit
        assert not pad or len(rows) == limit
        mask = [True] * len(rows) if ticket.mask is None else ticket.mask.tolist()
        assert len(mask) == len(rows)
        real = list(itertools.compress(rows, mask))
        assert set(rows) <= set(real) or not real  # pads repeat a record of this batch
        counted += real
    assert counted == indices
    assert len(batches) == (1 if limit is None else max(1, math.ceil(len(indices) / limit)))


def test_an_empty_draw_is_one_fully_masked_batch() -> None:
    for limit, pad, size in ((None, False, 1), (4, False, 1), (4, True, 4)):
        ((rows, ticket),) = split([], 0, limit, pad)
        assert rows == [0] * size
        assert ticket.final
        assert ticket.mask is not None
        assert ticket.mask.tolist() == [False] * size
