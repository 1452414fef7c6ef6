"""How long calibration and epsilon take: `python bench/bench_accounting.py [OUTPUT.json]`.

Each case runs in a process of its own, so that no cache is warm; the import of dp-accounting is timed apart.
No time is reported for a case whose check (epsilon <= target, or equal to the one recorded) fails.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RATE, STEPS, DELTA = 1000 / 67349, 202, 1e-5  # three epochs of SST-2 in expected batches of 1000
REPEATS = 3
OUTPUT = Path(__file__).parent / "results" / "cpu" / "accounting.json"


def timed(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def case(kind: str, target: float) -> dict[str, float]:
    from dp_bitfit_kernels import accounting

    _, imported, _ = timed(accounting._dp_accounting)
    sigma, calibrated, calibrated_cpu = timed(
        accounting.calibrate_noise_multiplier,
        target_epsilon=target,
        target_delta=DELTA,
        sample_rate=RATE,
        steps=STEPS,
        kind=kind,
    )
    accountant = accounting.Accountant(kind)
    for _ in range(STEPS - 1):
        accountant.charge(sigma, RATE)
    epsilon, evaluated, evaluated_cpu = timed(accountant.get_epsilon, DELTA)
    accountant.charge(sigma, RATE)
    final = accountant.get_epsilon(DELTA)
    if not epsilon < final <= target:
        raise AssertionError(f"{kind}, target {target}: epsilon {epsilon} then {final}")
    return {
        "noise_multiplier": sigma,
        "epsilon": final,
        "import_s": imported,
        "calibrate_s": calibrated,
        "calibrate_cpu_s": calibrated_cpu,
        "get_epsilon_s": evaluated,
        "get_epsilon_cpu_s": evaluated_cpu,
    }


def schedule(kind: str) -> dict[str, float]:
    """A noise scheduler: every step has its own noise, falling from 1.5 to 0.75."""
    from dp_bitfit_kernels import accounting

    accounting._dp_accounting()
    accountant = accounting.Accountant(kind)
    for i in range(STEPS):
        accountant.charge(1.5 * 0.5 ** (i / STEPS), RATE)
    first, cold, _ = timed(accountant.get_epsilon, DELTA)
    accountant.charge(0.75, RATE)
    second, warm, _ = timed(accountant.get_epsilon, DELTA)
    if not first < second:
        raise AssertionError(f"{kind}: epsilon fell from {first} to {second}")
    return {"epsilon": second, "segments": STEPS + 1, "get_epsilon_cold_s": cold, "get_epsilon_warm_s": warm}


def fresh(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--case", *arguments], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def best(*arguments: str) -> dict[str, float]:
    """Least time of each kind over a few fresh processes; the other values do not vary."""
    runs = [fresh(*arguments) for _ in range(REPEATS)]
    return {key: min(run[key] for run in runs) for key in runs[0]}


def main(output: Path) -> None:
    started = os.getloadavg()
    results = {
        f"{kind}, epsilon {target:g}": best(kind, str(target)) for kind in ("pld", "rdp") for target in (1.0, 3.0, 8.0)
    } | {f"{kind}, noise schedule": best(kind, "schedule") for kind in ("pld", "rdp")}
    report = {
        "question": "calibrating sigma < 6 s and get_epsilon < 0.5 s at q = 1000/67349, 202 steps, delta 1e-5",
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "load_before": started,
            "load_after": os.getloadavg(),
            "repeats": REPEATS,
            **{name: importlib.metadata.version(name) for name in ("dp-accounting", "numpy", "scipy")},
        },
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    for name, values in results.items():
        print(f"{name:22}", "  ".join(f"{key} {value:.4g}" for key, value in values.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        kind, what = sys.argv[2:]
        print(json.dumps(schedule(kind) if what == "schedule" else case(kind, float(what))))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
