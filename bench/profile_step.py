"""Where do the time and the bytes of a step go? Ours beside the baseline, operator by operator.

    python -m bench.profile_step --case roberta_b16_t128 --threads 1 --contenders ours,plain_bias
    python -m bench.profile_step --case roberta_b16_t128 --python       cProfile of one contender's Python side

A look at a cause, not a result: the profiler's own cost is in its times.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from bench.models import CASES, Case
from bench.providers import PROVIDERS, Settings, Step
from dp_bitfit_kernels._allocator import peak_bytes


def operators(step: Callable[[], object], steps: int) -> Counter[str]:
    """Self CPU time by operator in microseconds a step, between two batches that the layout proof is asked of."""
    for _ in range(8):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    return Counter({event.key: event.self_cpu_time_total / steps for event in recorded.key_averages()})


def build_step(name: str, case: Case, settings: Settings) -> Step:
    return PROVIDERS[name].build(case, case.batch(), settings)


def compare(left: dict[str, float], right: dict[str, float], unit: str, scale: float, limit: int = 25) -> str:
    """A table of both columns, the largest differences first."""
    rows = sorted(left.keys() | right.keys(), key=lambda key: -abs(left.get(key, 0) - right.get(key, 0)))
    lines = [f"{'total':60s} {sum(left.values()) * scale:10.3f} {sum(right.values()) * scale:10.3f}  {unit}"]
    for key in rows[:limit]:
        a, b = left.get(key, 0) * scale, right.get(key, 0) * scale
        lines.append(f"{key[-60:]:60s} {a:10.3f} {b:10.3f} {a - b:+10.3f}")
    return "\n".join(lines)


def python_side(case: Case, name: str, settings: Settings, steps: int) -> None:
    step = build_step(name, case, settings)
    step()
    recorder = cProfile.Profile()
    recorder.enable()
    for _ in range(steps):
        step()
    recorder.disable()
    pstats.Stats(recorder).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=tuple(CASES), default="roberta_b16_t128")
    parser.add_argument("--contenders", default="ours,plain_bias", help="two names; the second is the baseline")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--python", action="store_true", help="cProfile of the first contender instead")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    case, settings = CASES[given.case], Settings()
    first, second = given.contenders.split(",")
    if given.python:
        python_side(case, first, settings, given.steps)
        return
    times = [operators(build_step(name, case, settings), given.steps) for name in (first, second)]
    print(f"self CPU time by operator: {first}, {second}")
    print(compare(times[0], times[1], "ms a step", 1e-3))
    peaks = [peak_bytes(partial(build_step, name, case, settings)) for name in (first, second)]
    print(f"\nbytes alive at the peak by allocating operator: {first}, {second}")
    print(compare(dict(peaks[0].holders), dict(peaks[1].holders), "MiB", 2**-20))


if __name__ == "__main__":
    main()
