"""What does a private bias-only step cost, against the same step without privacy and against the rivals?

    pytest bench/bench_step.py                         every case, 1 and 2 threads, result file and plot
    python -m bench.bench_step --cases gpt2_b8_t128 --threads 1 --only ours,plain_bias --rounds 60

pytest-benchmark times one call, not seven in turns, so inside each benchmark test our own interleaved runner does the
work (bench/timing.py); the test's own time is only how long the whole comparison took. In order: check every contender
against one-sample gradients in float64 (bench/check.py; who fails gets no number), measure peak bytes, measure time.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from bench import plots, results
from bench.check import CheckFailed, Oracle, check, oracle
from bench.environment import environment
from bench.models import CASES, Case
from bench.providers import BASELINE, CONTROL, OURS, PROVIDERS, Settings, Step
from bench.timing import interleave
from dp_bitfit_kernels._allocator import peak_bytes

THREADS = (1, 2)
TARGET = 1.02  # time and peak bytes of ours over plain bias-only
ROUNDS = 80  # of ours and the baseline; the rivals run in every RIVAL_PERIOD-th
RIVAL_PERIOD = 8
CONTROL_PERIOD = 2
SECONDS = 60.0  # of timing per case and thread count

Verdict = dict[str, dict[str, Any]]


def verify(case: Case, names: Iterable[str]) -> Verdict:
    """Relative error of each contender's step, or why it failed."""
    batch = case.batch()
    expected: Oracle = oracle(case, batch, sorted({PROVIDERS[name].scope for name in names}))
    verdict: Verdict = {}
    for name in names:
        try:
            verdict[name] = {"passed": True, "relative_error": check(PROVIDERS[name], case, batch, expected)}
        except CheckFailed as failed:
            verdict[name] = {"passed": False, "reason": str(failed)}
    return verdict


def _built(name: str, case: Case, settings: Settings) -> Step:
    return PROVIDERS[name].build(case, case.batch(), settings)


def measure_memory(case: Case, names: Iterable[str], settings: Settings) -> dict[str, Any]:
    """Peak bytes by contender, and their ratios to the baseline.

    `ratio` is of all tensor bytes; `ratio_above_given` leaves out parameters, buffers and the batch, which no contender
    can avoid, and is therefore the stricter of the two.
    """
    peaks = {name: peak_bytes(partial(_built, name, case, settings)) for name in names}
    result: dict[str, Any] = {
        "given_bytes": case.given_bytes(),
        "peak_bytes": {name: peak.peak for name, peak in peaks.items()},
        "resident_bytes": {name: peak.resident for name, peak in peaks.items()},
    }
    if base := peaks.get(BASELINE):
        given = result["given_bytes"]
        result["ratio"] = {name: peak.peak / base.peak for name, peak in peaks.items()}
        result["ratio_above_given"] = {name: (peak.peak - given) / (base.peak - given) for name, peak in peaks.items()}
    return result


def measure_time(
    case: Case, names: Iterable[str], settings: Settings, threads: int, *, rounds: int, seconds: float | None
) -> dict[str, Any]:
    batch = case.batch()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps = {name: PROVIDERS[name].build(case, batch, settings) for name in names}
        rivals = {name: RIVAL_PERIOD for name in steps if name not in (OURS, BASELINE, CONTROL)}
        rivals[CONTROL] = CONTROL_PERIOD
        samples = interleave(steps, rounds=rounds, every=rivals, budget_s=seconds)
    finally:
        torch.set_num_threads(before)
    against = steps if BASELINE in steps else {}
    return {
        "rounds": samples.rounds,
        "median_ms": {name: 1e3 * samples.median(name) for name in steps},
        "spread": {name: samples.spread(name) for name in steps},
        "ratio": {name: samples.ratio(name, BASELINE).to_json() for name in against},
        "cpu_ratio": {name: samples.ratio(name, BASELINE, cpu=True).to_json() for name in against},
    }


def run_case(
    case: Case,
    names: Iterable[str] = tuple(PROVIDERS),
    threads: Iterable[int] = THREADS,
    settings: Settings = Settings(),  # noqa: B008  frozen, so sharing it is safe
    *,
    rounds: int = ROUNDS,
    seconds: float | None = SECONDS,
) -> dict[str, Any]:
    verdict = verify(case, names)
    sound = [name for name in verdict if verdict[name]["passed"]]
    memory = measure_memory(case, sound, settings)
    time = {}
    for count in threads:
        gc.collect()
        time[str(count)] = measure_time(case, sound, settings, count, rounds=rounds, seconds=seconds)
    return {"reason": case.reason, "check": verdict, "memory": memory, "time": time}


def summary(name: str, case: dict[str, Any]) -> str:
    lines = [name]
    for provider, verdict in case["check"].items():
        if not verdict["passed"]:
            lines.append(f"  {provider:20s} NO NUMBER: {verdict['reason']}")
            continue
        times = "   ".join(
            f"{count} thr {value['median_ms'][provider]:8.1f} ms x{value['ratio'][provider]['value']:.3f} "
            f"[{value['ratio'][provider]['low']:.3f}, {value['ratio'][provider]['high']:.3f}] "
            f"cpu x{value['cpu_ratio'][provider]['value']:.3f}"
            for count, value in case["time"].items()
            if provider in value["ratio"]
        )
        memory = case["memory"]
        peak = memory["peak_bytes"][provider] / 2**20
        ratio, above = (memory.get(key, {}).get(provider, float("nan")) for key in ("ratio", "ratio_above_given"))
        lines.append(f"  {provider:20s} {times}   {peak:8.1f} MiB x{ratio:.3f} (above model and batch x{above:.3f})")
    return "\n".join(lines)


def targets(case: dict[str, Any]) -> dict[str, bool]:
    """Which of the targets (ours over plain bias-only <= 1.02) this case meets; empty where ours has no number."""
    if not case["check"].get(OURS, {}).get("passed"):
        return {}
    met = {f"time, {count} thread(s)": value["ratio"][OURS]["value"] <= TARGET for count, value in case["time"].items()}
    return {**met, "peak bytes": case["memory"]["ratio"][OURS] <= TARGET}


def publish(cases: dict[str, dict[str, Any]], recorded: dict[str, Any], name: str = "step") -> None:
    """Write the result file and the plot."""
    for case in cases.values():
        case["targets_met"] = targets(case)
    content = {"bench": "step", "environment": recorded, "target": TARGET, "cases": cases}
    target = results.write(f"{name}.json", content)
    plots.draw_step(json.loads(target.read_text()), target.with_suffix(".png"))


def test_step(benchmark: Any) -> None:
    """All cases in one run, so that one result file comes from one hour of one machine."""
    recorded = environment()
    cases: dict[str, dict[str, Any]] = {}

    def run() -> None:
        for name, case in CASES.items():
            cases[name] = run_case(case)
            print("\n" + summary(name, cases[name]), flush=True)

    benchmark.pedantic(run, rounds=1, iterations=1)
    publish(cases, recorded)
    for name, case in cases.items():
        benchmark.extra_info[name] = case["targets_met"]
        failed = {key: value["reason"] for key, value in case["check"].items() if not value["passed"]}
        assert OURS not in failed, failed[OURS]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--threads", default=",".join(map(str, THREADS)))
    parser.add_argument("--only", default=",".join(PROVIDERS), help="contenders; plain_bias is the baseline")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="timing budget per case and thread count")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    parser.add_argument("--save", metavar="NAME", help="also write bench/results/cpu/NAME.json and .png")
    given = parser.parse_args()
    recorded = environment()
    cases = {}
    for name in given.cases.split(","):
        cases[name] = run_case(
            CASES[name],
            given.only.split(","),
            [int(count) for count in given.threads.split(",")],
            Settings(optimizer=given.optimizer),
            rounds=given.rounds,
            seconds=given.seconds,
        )
        print(summary(name, cases[name]), flush=True)
    if given.save:
        publish(cases, recorded, given.save)


if __name__ == "__main__":
    main()
