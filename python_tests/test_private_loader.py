"""The private loader: tickets, empty draws, lengths, what it keeps of the user's loader, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
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
from dp_bitfit_kernels.sampling import (
    DrawCounter,
    PrivateDataLoader,
    Ticket,
    inclusion,
    loader_facts,
)


def numpy_words(step: int, first: int, count: int) -> Tensor:
    """Cheap words for tests that are not about randomness."""
    words = np.random.default_rng([7, step, first]).integers(-(2**63), 2**63, count, dtype=np.int64)
    return torch.from_numpy(words)


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
