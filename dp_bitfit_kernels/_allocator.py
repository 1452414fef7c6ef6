"""Exact peak of tensor bytes on the CPU, from the allocator itself.

torch's CPU allocator reports every block that it hands out or takes back to the profiler (`profile_memory=True`), so
the running sum of those reports is the number of tensor bytes alive at each instant: parameters, buffers, optimizer
state, the batch, what autograd saved, gradients, and the temporaries inside an operator, which no hook at Python level
(saved-tensor hooks, dispatch modes, counting storages) can see. Nothing is sampled and nothing estimated; the process's
resident set, by contrast, also moves with allocator reuse and page faults and differs from run to run.

The profiler must be on when a block is allocated for its release to be counted, so the *whole life* of a contender is
recorded: it is built, warmed up and stepped under one profile, and only the last step is measured.

    peak        most bytes alive at any instant of the step, everything included
    resident    bytes alive when the step begins: parameters, state, batch, and what the last step left behind
    after       bytes alive when the step has ended and its result is still held: after a forward, what it keeps

Not seen: what is not a tensor, and scratch that a library takes from malloc directly (MKL packing buffers, the native
kernels' partial sums of a few KB a thread).
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "dp_bitfit_kernels.step"


@dataclass(frozen=True)
class Peak:
    peak: int  # bytes
    resident: int  # bytes
    after: int  # bytes
    holders: dict[str, int] = field(default_factory=dict, repr=False)  # op path -> bytes alive at the peak


def peak_bytes(build: Callable[[], Callable[[], object]], *, warm_up: int = 1) -> Peak:
    """Peak tensor bytes of one step; `build()` makes everything the step needs and returns the step.

    Build inside, not before: what was allocated before the profile began is not counted (see the module docstring).
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        step = build()
        for _ in range(warm_up):
            step()
        gc.collect()
        with record_function(_MARK):
            result = step()
        del step
    del result
    return _replay(recorded)


def _replay(recorded: profile) -> Peak:
    events = list(_walk(recorded.profiler.kineto_results.experimental_event_tree(), ()))  # type: ignore[union-attr]
    mark = next(event for event, _ in events if event.name == _MARK)
    blocks = [(event, path) for event, path in events if event.name == "[memory]"]
    blocks.sort(key=lambda pair: pair[0].start_time_ns)

    alive = peak = resident = after = 0
    holding: dict[int, tuple[int, str]] = {}
    at_peak: dict[int, tuple[int, str]] = {}
    entered = False
    for event, path in blocks:
        if event.start_time_ns > mark.end_time_ns:
            break
        if not entered and event.start_time_ns >= mark.start_time_ns:
            entered, resident, peak, at_peak = True, alive, alive, dict(holding)
        size, pointer = event.extra_fields.alloc_size, event.extra_fields.ptr
        alive += size
        if size > 0:
            holding[pointer] = (size, " > ".join(path[-4:]))
        else:
            holding.pop(pointer, None)
        after = alive
        if entered and alive > peak:
            peak, at_peak = alive, dict(holding)
    held: Counter[str] = Counter()
    for size, where in at_peak.values():
        held[where] += size
    return Peak(peak, resident, after, dict(held.most_common()))


def _walk(events: list[Any], path: tuple[str, ...]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    pending = [(event, path) for event in reversed(events)]
    while pending:
        event, above = pending.pop()
        yield event, above
        below = (*above, event.name)
        pending.extend((child, below) for child in reversed(event.children))
