"""Poisson sampling: what is drawn, with which probability, and how a draw reaches the user's loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dp_bitfit_kernels._validate import SamplingError
from dp_bitfit_kernels.reference import random_words
from dp_bitfit_kernels.sampling import (
    DrawCounter,
    PrivateDataLoader,
    Ticket,
    inclusion,
    loader_facts,
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


class Numbers(Dataset[Tensor]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor([i, torch.utils.data.get_worker_info() is not None])


def private(
    loader: DataLoader[Any],
    tickets: list[Ticket] | None = None,
    words: Callable[..., Tensor] = numpy_words,
    **kwargs: Any,
) -> PrivateDataLoader:
    facts = loader_facts(loader)
    kwargs = {"sample_rate": facts.sample_rate, "steps_per_epoch": facts.steps, "draw_counter": DrawCounter()} | kwargs
    on_ticket = (lambda ticket: None) if tickets is None else tickets.append
    return PrivateDataLoader(loader, words=words, on_ticket=on_ticket, **kwargs)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_comes_with_its_own_ticket(workers: int) -> None:
    loader = DataLoader(Numbers(60), batch_size=12, shuffle=True, num_workers=workers)
    tickets: list[Ticket] = []
    dp = private(loader, tickets, max_physical_batch_size=4, pad_physical_batches=True, steps_per_epoch=12)
    seen: dict[int, list[int]] = {}
    for number, batch in enumerate(dp, start=1):
        assert len(tickets) == number  # handed over just before the batch, never ahead of it
        ticket = tickets[-1]
        assert ticket.size == len(batch) == 4
        assert ticket.mask is not None
        assert bool(batch[:, 1].all()) == bool(workers)
        seen.setdefault(ticket.draw, []).extend(batch[ticket.mask, 0].tolist())
    assert list(seen) == list(range(12))
    for draw, indices in seen.items():
        assert indices == inclusion(numpy_words, 60, 0.2, draw).tolist()
    assert sum(t.final for t in tickets) == 12 == len(dp)


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_draws_never_repeat_even_after_a_break(workers: int, persistent: bool) -> None:
    tickets: list[Ticket] = []
    counter = DrawCounter()
    loader = DataLoader(Numbers(40), batch_size=10, num_workers=workers, persistent_workers=persistent)
    dp = private(loader, tickets, draw_counter=counter)
    for epoch in range(3):
        for number, batch in enumerate(dp):
            ticket = tickets[-1]
            expected = inclusion(numpy_words, 40, 0.25, ticket.draw).tolist()
            assert batch[:, 0].tolist() == (expected or [0])
            if epoch == 0 and number == 1:
                break
    draws = [t.draw for t in tickets]
    assert draws == sorted(set(draws))
    assert len(draws) == 2 + 4 + 4
    assert counter.value > max(draws)


def test_nested_iterations_keep_their_tickets_apart() -> None:
    tickets: list[Ticket] = []
    dp = private(DataLoader(Numbers(40), batch_size=10), tickets)
    outer, inner = iter(dp), iter(dp)
    for iterator in (outer, inner, outer, inner):
        batch = next(iterator)
        assert batch[:, 0].tolist() == (inclusion(numpy_words, 40, 0.25, tickets[-1].draw).tolist() or [0])
    assert len({t.draw for t in tickets}) == 4


def test_empty_draws_reach_the_loop() -> None:
    tickets: list[Ticket] = []
    dp = private(DataLoader(Numbers(50), batch_size=5), tickets, sample_rate=1e-7, steps_per_epoch=20)
    batches = list(dp)
    assert len(batches) == len(tickets) == 20
    for batch, ticket in zip(batches, tickets, strict=True):
        assert len(batch) == 1
        assert ticket.mask is not None
        assert not ticket.mask.any()


def test_length_counts_releases_and_skipped_draws_apply_once() -> None:
    tickets: list[Ticket] = []
    dp = private(DataLoader(Numbers(60), batch_size=12), tickets, max_physical_batch_size=2)
    dp.skip_draws = 3
    for _ in dp:
        pass
    assert sum(t.final for t in tickets) == len(dp) - 3 == 2
    assert len(tickets) > 2
    tickets.clear()
    for _ in dp:
        pass
    assert sum(t.final for t in tickets) == len(dp) == 5


@settings(max_examples=40, deadline=None)
@example(75, 1, 3, False)
@example(49, 1, 2, False)
@example(10, 3, 2, False)
@example(10, 3, 2, True)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 3), st.booleans())
def test_executed_steps_equal_calibrated_steps(n: int, batch_size: int, epochs: int, drop_last: bool) -> None:
    loader = DataLoader(TensorDataset(torch.arange(n)), batch_size=batch_size, drop_last=drop_last)
    if len(loader) == 0:
        with pytest.raises(SamplingError, match="drop_last"):
            loader_facts(loader)
        return
    calibrated = epochs * loader_facts(loader).steps
    tickets: list[Ticket] = []
    dp = private(loader, tickets)
    for _ in range(epochs):
        for _ in dp:
            pass
    assert sum(t.final for t in tickets) == calibrated == epochs * len(loader)


def test_the_users_loading_settings_are_kept() -> None:
    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        return {"rows": torch.stack(rows)}

    def init(worker: int) -> None: ...

    generator = torch.Generator()
    loader = DataLoader(
        Numbers(20),
        batch_size=5,
        num_workers=1,
        collate_fn=collate,
        worker_init_fn=init,
        timeout=30,
        prefetch_factor=3,
        persistent_workers=True,
        multiprocessing_context="fork",
        generator=generator,
        pin_memory=True,
    )
    dp = private(loader)
    for name in (
        *("num_workers", "collate_fn", "worker_init_fn", "timeout", "prefetch_factor", "persistent_workers"),
        *("multiprocessing_context", "generator", "pin_memory", "dataset"),
    ):
        assert getattr(dp._inner, name) is getattr(loader, name) or getattr(dp._inner, name) == getattr(loader, name)
    assert (dp.dataset, dp.batch_size, dp.sample_rate) == (loader.dataset, 5, 0.25)


def test_an_unordered_loader_is_read_in_order() -> None:
    """in_order=False would hand batches over under another batch's ticket."""
    loader = DataLoader(Numbers(20), batch_size=5, num_workers=2, in_order=False)
    assert private(loader)._inner.in_order


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(10))


class Endless(Dataset[int]):
    def __getitem__(self, i: int) -> int:
        return i


class Unsized:
    """A batch sampler that does not say how large a batch is."""

    def __iter__(self) -> Any:
        return iter([[0, 1], [2]])

    def __len__(self) -> int:
        return 2


def numbers(n: int = 10, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(n), **kwargs)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DataLoader(Stream(), batch_size=2), "IterableDataset"),
        (lambda: DataLoader(Endless(), batch_size=2, sampler=range(5)), "no length"),
        (lambda: numbers(batch_size=None), "batch_size=None"),
        (lambda: numbers(batch_sampler=Unsized()), "batch_sampler.*batch_size"),
        (lambda: numbers(batch_size=2, sampler=SubsetRandomSampler(range(5))), "Subset"),
        (lambda: numbers(batch_size=2, sampler=DistributedSampler(Numbers(10), 2, 0)), "visits 5 of 10"),
        (lambda: numbers(batch_size=2, sampler=WeightedRandomSampler([1.0] * 10, 10)), "weights"),
        (lambda: numbers(batch_size=2, sampler=RandomSampler(range(10), replacement=True)), "replacement"),
        (lambda: numbers(batch_size=20, drop_last=True), "drop_last"),
        (lambda: numbers(n=0, batch_size=2), "empty"),
        (lambda: [1, 2, 3], "DataLoader"),
    ],
)
def test_loaders_that_cannot_be_sampled_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(SamplingError, match=match):
        private(make())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sample_rate": 0.0},
        {"sample_rate": 1.5},
        {"steps_per_epoch": 0},
        {"max_physical_batch_size": 0},
        {"pad_physical_batches": True},
    ],
)
def test_impossible_settings_are_refused_by_name(kwargs: dict[str, Any]) -> None:
    with pytest.raises(SamplingError, match=next(iter(kwargs))):
        private(numbers(batch_size=2), **kwargs)


def test_counter_only_grows() -> None:
    counter = DrawCounter(5)
    assert [counter.next(), counter.next()] == [5, 6]
    counter.advance_to(3)
    assert counter.value == 7
    counter.advance_to(9)
    assert counter.next() == 9
