"""The demonstration with three seeds: is the gap wide, and how much of it does each epsilon close?

    python -m bench.bench_demo            writes bench/results/cpu/demo.json

The settings were chosen on other seeds (0, 1, 2 and 100). Asked of the mean: training without privacy gains
at least 25 points, and epsilon = 8 closes at least two thirds of that gap. The network also knows capitals, so both are
also given from the accuracy that it has before fine-tuning when letters are ruled out as answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench import results
from bench.environment import environment
from dp_bitfit_kernels.demo.outcome import Outcome, Settings
from dp_bitfit_kernels.demo.report import print_table
from dp_bitfit_kernels.demo.run import run_demo

SEEDS = [3, 4, 5]


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Means over the seeds, accuracies in percent; `closed` is the ratio of mean gains, not the mean of ratios."""
    before = statistics.mean(100 * o.before.accuracy for o in outcomes)
    digits_only = statistics.mean(100 * o.before_digits_only for o in outcomes)
    plain = statistics.mean(100 * o.plain.accuracy for o in outcomes)
    private = {}
    for rows in zip(*(o.private for o in outcomes), strict=True):
        scores = [100 * row.accuracy for row in rows]
        mean = statistics.mean(scores)
        private[rows[0].method.rpartition(" ")[2]] = {
            "accuracy": mean,
            "stdev": statistics.stdev(scores) if len(scores) > 1 else None,
            "closed": (mean - before) / (plain - before),
            "closed_of_digits_only": (mean - digits_only) / (plain - digits_only),
        }
    gap = plain - before
    largest = list(private.values())[-1]
    return {
        "before": before,
        "before_digits_only": digits_only,
        "no_privacy": plain,
        "gap": gap,
        "gap_from_digits_only": plain - digits_only,
        "private": private,
        "gap_at_least_25": gap >= 25,
        "largest_epsilon_closes_two_thirds": largest["closed"] >= 2 / 3,
        "seconds": statistics.mean(o.seconds for o in outcomes),
    }


def run_seeds(seeds: list[int], settings: Settings, *, quiet: bool = False) -> dict[str, Any]:
    """One demonstration a seed, one after the other; every run's rows are kept."""
    recorded = environment()
    outcomes = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(run_demo(dataclasses.replace(settings, seed=seed), Path(folder), quiet=quiet))
            if not quiet:
                print_table(outcomes[-1])
    return {"environment": recorded, "mean": summary(outcomes), "runs": [outcome.to_dict() for outcome in outcomes]}


def test_demo(benchmark: Any, capsys: Any) -> None:
    """Under `make bench`: three seeds, the targets asserted, the result file written."""
    found: dict[str, Any] = {}
    benchmark.pedantic(lambda: found.update(run_seeds(SEEDS, Settings(), quiet=True)), rounds=1, iterations=1)
    results.write("demo.json", found)
    with capsys.disabled():
        print("\n" + json.dumps(found["mean"], indent=1))
    benchmark.extra_info.update(found["mean"])
    assert found["mean"]["gap_at_least_25"] and found["mean"]["largest_epsilon_closes_two_thirds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="write the result file")
    given = parser.parse_args()
    found = run_seeds(given.seeds, Settings())
    if given.save:
        print(results.write("demo.json", found))
    print(json.dumps(found["mean"], indent=1))


if __name__ == "__main__":
    main()
