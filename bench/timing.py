"""Interleaved timing: contenders take turns within one run, and medians of their ratios side by side are reported.

A time in milliseconds says as much about the hour as about the code: another process, a hotter core or a different
page cache moves it by tens of per cent. So every round lets every contender run once, in an order shuffled anew
(seeded) so that no contender always follows the same neighbour's cache and allocator state. The ratio of two
contenders is taken within each round, between samples drawn side by side, and the median over the rounds is reported:
what slows the machine down for longer than a round cancels, which it does not in a ratio of two medians.

The interval is a bootstrap over rounds: the 2.5 % and 97.5 % quantiles of the resampled median. An interval wider than
the effect means that the machine was not quiet: say so instead of quoting the ratio.

glibc gives large blocks back to the system as soon as they are free, and how often depends on what else lies on the
heap: the same step was seen with 0 and with 1,500 page faults, by its neighbours. `keep_freed_memory` turns that off
for the process, for every contender alike; it spares most to who allocates most, so it does not flatter the lean.

Beside wall time the process's CPU time is kept. With one thread it is nearly blind to other processes that take the
core away, so it tells whether a strange wall ratio is the code's doing; with several threads it also counts threads
that spin while they wait, and says less. Quoted is wall time.
"""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

WARM_UP = 1
BOOTSTRAP_DRAWS = 4000


@dataclass
class Samples:
    """Seconds of every contender by round; NaN where a contender sat the round out."""

    seconds: dict[str, np.ndarray]  # name -> wall time, float64 [rounds]
    cpu_seconds: dict[str, np.ndarray]  # name -> CPU time of all threads of the process, float64 [rounds]
    rounds: int
    order: list[list[str]] = field(default_factory=list, repr=False)

    def median(self, name: str) -> float:
        return float(np.nanmedian(self.seconds[name]))

    def spread(self, name: str) -> float:
        """Interquartile range over the median: how restless the machine was while this contender ran."""
        low, middle, high = np.nanpercentile(self.seconds[name], (25, 50, 75))
        return float((high - low) / middle)

    def ratio(self, name: str, baseline: str, *, cpu: bool = False) -> Ratio:
        """Median ratio over the rounds in which both ran, with its bootstrap interval (95 %)."""
        kept = self.cpu_seconds if cpu else self.seconds
        ratios = kept[name] / kept[baseline]
        ratios = ratios[~np.isnan(ratios)]
        picks = np.random.default_rng(0).integers(0, len(ratios), size=(BOOTSTRAP_DRAWS, len(ratios)))
        low, high = np.quantile(np.median(ratios[picks], axis=1), (0.025, 0.975))
        return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


@dataclass(frozen=True)
class Ratio:
    value: float
    low: float  # 2.5 % quantile of the bootstrap
    high: float  # 97.5 % quantile of the bootstrap
    rounds: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "rounds": self.rounds}


def keep_freed_memory() -> bool:
    """Let glibc's malloc reuse freed memory instead of unmapping it; False where there is no glibc."""
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    every: Mapping[str, int] | None = None,
    warm_up: int = WARM_UP,
    budget_s: float | None = None,
    seed: int = 0,
) -> Samples:
    """Time each contender once a round, in a freshly shuffled order.

    every: name -> n runs that contender in each n-th round only (a slow rival need not cost the precision of the pair
        that matters); its ratios then use those rounds.
    budget_s: stop before the round that would pass this many seconds of wall time, never before each had 2 samples.
    The garbage collector is run between rounds and held off inside them, as `timeit` does.
    """
    keep_freed_memory()
    period = {name: (every or {}).get(name, 1) for name in contenders}
    least = max(max(period.values()) + 1, 3)
    shuffle = random.Random(seed)
    for step in contenders.values():
        for _ in range(warm_up):
            step()

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    order: list[list[str]] = []
    begun = time.perf_counter()
    was_enabled = gc.isenabled()
    try:
        for turn in range(max(rounds, least)):
            elapsed = time.perf_counter() - begun
            if budget_s is not None and turn >= least and elapsed * (turn + 1) / turn > budget_s:
                break
            present = [name for name in contenders if turn % period[name] == 0]
            shuffle.shuffle(present)
            gc.collect()
            gc.disable()
            taken = {name: _seconds(contenders[name]) for name in present}
            for name in contenders:
                seconds[name].append(taken.get(name, (float("nan"), float("nan"))))
            order.append(present)
    finally:
        if was_enabled:
            gc.enable()
    columns = {name: np.asarray(values).T for name, values in seconds.items()}
    wall, cpu = ({name: column[i] for name, column in columns.items()} for i in (0, 1))
    return Samples(wall, cpu, len(order), order)


def _seconds(step: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds of one call."""
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    step()
    return (time.perf_counter_ns() - wall) * 1e-9, (time.process_time_ns() - cpu) * 1e-9
