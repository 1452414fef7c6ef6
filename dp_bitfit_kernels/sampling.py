"""Poisson sampling: which records a step sees, and the loader that hands them over.

Guarantees (one test per sentence in python_tests/test_sampling.py):

* Every record is included in a draw independently of all others and of all other draws, with probability
  ``floor(q * 2^64) / 2^64``, which never exceeds q; q = 1 includes every record.
* The number of draws of an epoch is fixed before the first one: nothing about the data lengthens or shortens it.
* A draw is never truncated: one that exceeds a physical batch is split over several.
* An empty draw is still handed over, as one fully masked batch, so that it is released and charged like any other.
* Rows that pad a physical batch, or stand in for an empty draw, are False in the ticket's mask.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler

from ._validate import SamplingError

# words(step, first, count): `count` uniform 64-bit words of draw `step`, from index `first`, as int64 bit patterns.
Words = Callable[[int, int, int], Tensor]

_CHUNK = 1 << 20  # words asked for at once; a multiple of the eight words of a cipher block


@dataclass(frozen=True, eq=False)
class Ticket:
    """What the engine must know of a physical batch, beside its tensors."""

    draw: int  # number of the Poisson draw
    part: int  # this physical batch is part `part` of `parts` of the draw
    parts: int
    size: int  # physical rows, masked ones included
    mask: Tensor | None = None  # bool [size], False: the row must not count; None: all rows count

    @property
    def final(self) -> bool:
        """True where no other physical batch of this draw follows."""
        return self.part == self.parts - 1


class SupportsNext(Protocol):
    """A counter of draws."""

    def next(self) -> int: ...


class DrawCounter:
    """Number of the next draw. It only grows, so that no word of the sampler's stream is used twice."""

    def __init__(self, value: int = 0) -> None:
        self._value = value

    @property
    def value(self) -> int:
        """The number that the next draw will get."""
        return self._value

    def next(self) -> int:
        value = self._value
        self._value += 1
        return value

    def advance_to(self, value: int) -> None:
        """Continue at `value`, or where the counter already is, whichever is later."""
        self._value = max(self._value, value)


@dataclass(frozen=True)
class LoaderFacts:
    """The public facts of a user's loader from which the mechanism is planned."""

    n: int
    batch_size: int
    steps: int  # len(loader): releases per epoch

    @property
    def sample_rate(self) -> float:
        return min(1.0, self.batch_size / self.n)


def loader_facts(loader: DataLoader[Any]) -> LoaderFacts:
    """Length, batch size and steps per epoch of `loader`, or a SamplingError that says what is missing."""
    if not isinstance(loader, DataLoader):
        raise SamplingError(f"data_loader must be a torch.utils.data.DataLoader, got {type(loader).__name__}")
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise SamplingError(
            "data_loader: an IterableDataset cannot be Poisson sampled, for its records have no index; "
            "use a dataset with __len__ and __getitem__, or poisson_sampling=False"
        )
    n = _length(dataset, "data_loader.dataset")
    if n == 0:
        raise SamplingError("data_loader.dataset is empty: there is nothing to sample")
    batch_size = _batch_size(loader)
    _check_sampler(loader.sampler, n, "data_loader.sampler")
    inner = getattr(loader.batch_sampler, "sampler", None)
    if inner is not None and inner is not loader.sampler:
        _check_sampler(inner, n, "data_loader.batch_sampler.sampler")
    steps = _length(loader, "data_loader")
    if steps == 0:
        raise SamplingError(f"data_loader yields no batch: drop_last with {n} records and batch_size {batch_size}")
    return LoaderFacts(n=n, batch_size=batch_size, steps=steps)


def _length(thing: object, name: str) -> int:
    try:
        return len(cast(Sized, thing))
    except (TypeError, NotImplementedError) as error:
        raise SamplingError(f"{name} has no length; the sample rate and the steps of an epoch need one") from error


def _batch_size(loader: DataLoader[Any]) -> int:
    size: object = loader.batch_size
    if size is None:
        if loader.batch_sampler is None:
            raise SamplingError("data_loader has batch_size=None; give the expected size of a batch")
        size = getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        kind = type(loader.batch_sampler).__name__
        raise SamplingError(
            f"data_loader.batch_sampler ({kind}) has no integer batch_size; give the loader a batch_size"
        )
    return size


def _check_sampler(sampler: object, n: int, name: str) -> None:
    """Refuse a sampler whose choice of records the Poisson sampler would silently undo."""
    kind = type(sampler).__name__
    if isinstance(sampler, WeightedRandomSampler) or (isinstance(sampler, RandomSampler) and sampler.replacement):
        raise SamplingError(
            f"{name} ({kind}) draws with weights or with replacement; Poisson sampling would replace it by one equal "
            "sample rate. Use shuffle=True"
        )
    if _length(sampler, name) != n:
        raise SamplingError(
            f"{name} ({kind}) visits {len(cast(Sized, sampler))} of {n} records, but Poisson sampling would draw from "
            "all; put torch.utils.data.Subset around the dataset instead"
        )


def threshold(q: float | Fraction) -> int:
    """floor(q * 2^64), exactly; a uniform 64-bit word is below it with probability <= q."""
    if not (isinstance(q, (int, float, Fraction)) and math.isfinite(q) and 0 < q <= 1):
        raise SamplingError(f"sample_rate must lie in (0, 1], got {q!r}")
    result = math.floor(Fraction(q) * 2**64)
    if result == 0:
        raise SamplingError(f"sample_rate {q!r} is below 2^-64: no record would ever be drawn")
    return result


def inclusion(words: Words, n: int, q: float | Fraction, draw: int) -> Tensor:
    """Ascending indices (int64, [k]) of the records that draw number `draw` includes, of n records.

    Record i is included iff the i-th unsigned 64-bit word of the draw is below floor(q * 2^64). q = 1 includes all.
    """
    limit = threshold(q)
    if limit == 2**64:
        return torch.arange(n, dtype=torch.int64)
    found = []
    for first in range(0, n, _CHUNK):
        chunk = words(draw, first, min(_CHUNK, n - first))
        unsigned = chunk.cpu().contiguous().numpy().view(np.uint64)
        found.append(np.flatnonzero(unsigned < np.uint64(limit)) + first)
    return torch.from_numpy(np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64))


def split(indices: list[int], draw: int, limit: int | None, pad: bool) -> list[tuple[list[int], Ticket]]:
    """Physical batches of one draw: each record of `indices` in exactly one of them, none larger than `limit`."""
    if limit is None:
        limit = max(1, len(indices))
    parts = max(1, -(-len(indices) // limit))
    if pad:
        chunks = [indices[k * limit : (k + 1) * limit] for k in range(parts)]
    else:  # balanced, so that no part is much smaller than the others
        edges = [len(indices) * k // parts for k in range(parts + 1)]
        chunks = [indices[a:b] for a, b in pairwise(edges)]
    batches = []
    for part, chunk in enumerate(chunks):
        size = limit if pad else max(1, len(chunk))
        filler = chunk[0] if chunk else 0  # a valid record, so that no denominator or kernel sees an odd value
        mask = torch.arange(size) < len(chunk) if pad or not chunk else None
        batches.append((chunk + [filler] * (size - len(chunk)), Ticket(draw, part, parts, size, mask)))
    return batches


class _DrawSampler(Sampler[list[int]]):
    """Batch sampler of one PrivateDataLoader. Each iteration leaves its tickets, in order, in a queue of its own."""

    def __init__(self, loader: PrivateDataLoader) -> None:
        self.loader = loader
        self.draws = 0
        self.tickets: deque[Ticket] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        # Not a generator itself: the queue and the number of draws are bound now, not at the first batch.
        return self._batches(self.draws, self.tickets)

    def _batches(self, draws: int, tickets: deque[Ticket]) -> Iterator[list[int]]:
        for _ in range(draws):
            for indices, ticket in self.loader.draw():
                tickets.append(ticket)
                yield indices


class PrivateDataLoader:
    """The user's loader with its batches replaced by Poisson draws.

    An iteration runs `steps_per_epoch` draws, whatever the data; each is handed over as one or more physical batches.
    Just before a physical batch is returned, `on_ticket` gets its ticket. Dataset, collate function and worker
    settings are the user's; shuffle, sampler and drop_last no longer apply. `len()` counts draws (releases).
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        sample_rate: float,
        steps_per_epoch: int,
        max_physical_batch_size: int | None = None,
        pad_physical_batches: bool = False,
        words: Words,
        on_ticket: Callable[[Ticket], None],
        draw_counter: SupportsNext,
    ) -> None:
        threshold(sample_rate)
        facts = loader_facts(loader)
        if steps_per_epoch < 1:
            raise SamplingError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        if max_physical_batch_size is not None and (
            not isinstance(max_physical_batch_size, int) or max_physical_batch_size < 1
        ):
            raise SamplingError(f"max_physical_batch_size must be a whole number >= 1, got {max_physical_batch_size!r}")
        if pad_physical_batches and max_physical_batch_size is None:
            raise SamplingError("pad_physical_batches needs max_physical_batch_size, the size to pad to")
        self.dataset = loader.dataset
        self.batch_size = facts.batch_size
        self.sample_rate = sample_rate
        self.steps_per_epoch = steps_per_epoch
        self.max_physical_batch_size = max_physical_batch_size
        self.pad_physical_batches = pad_physical_batches
        self.skip_draws = 0  # the next iteration runs so many draws fewer (resume inside an epoch)
        self.collate_fn = loader.collate_fn
        self.num_workers = loader.num_workers
        self.pin_memory = loader.pin_memory
        self._n = facts.n
        self._words = words
        self._on_ticket = on_ticket
        self._counter = draw_counter
        self._sampler = _DrawSampler(self)
        self._inner: DataLoader[Any] = DataLoader(loader.dataset, batch_sampler=self._sampler, **_settings(loader))

    def draw(self) -> list[tuple[list[int], Ticket]]:
        """Take the next draw: its physical batches as (indices, ticket)."""
        number = self._counter.next()
        indices = inclusion(self._words, self._n, self.sample_rate, number).tolist()
        return split(indices, number, self.max_physical_batch_size, self.pad_physical_batches)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        # Bound here, not at the first next(): a second iteration gets its own queue.
        tickets: deque[Ticket] = deque()
        self._sampler.draws = max(0, self.steps_per_epoch - self.skip_draws)
        self._sampler.tickets = tickets
        self.skip_draws = 0
        return self._hand_over(iter(self._inner), tickets)

    def _hand_over(self, batches: Iterator[Any], tickets: deque[Ticket]) -> Iterator[Any]:
        for batch in batches:
            self._on_ticket(tickets.popleft())
            yield batch


def _settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """What a new loader must be given to load as the user's one does."""
    settings: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "generator": loader.generator,
        "persistent_workers": loader.persistent_workers,
    }
    if loader.num_workers > 0:  # torch refuses these without workers, even at their defaults
        settings["multiprocessing_context"] = loader.multiprocessing_context
        settings["prefetch_factor"] = loader.prefetch_factor
    device = getattr(loader, "pin_memory_device", "")
    if device:
        settings["pin_memory_device"] = device
    return settings
