"""How much of the memory's bandwidth does native bias_grad reach, against a plain read of the same tensor?

    pytest bench/bench_bias_grad.py            every case, result file
    python -m bench.bench_bias_grad --cases streaming --threads 2 --save

The yardstick is a loop that loads every byte once and folds it (csrc/tests/read_bandwidth.cpp), on the same threads.
Contenders take turns (bench/timing.py). On one thread the clock is CPU time, which other processes do not stretch; on
more it is the wall's, so a busy machine shows in the interval, and an interval wider than WIDEST is marked as no
result. A case whose sum is wrong gets no number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import results
from bench.environment import ROOT, environment
from bench.timing import interleave
from dp_bitfit_kernels import backends

sys.path.insert(0, str(Path(ROOT) / "csrc" / "tests"))
import native_internals  # beside the sources of the module that it builds

THREADS = (1, 2)
TARGET = 0.7  # of the read's bandwidth, for tensors beyond the last cache
SECONDS = 4.0  # of wall time per case, dtype, layout and thread count
WIDEST = 0.3  # interval of the share (95 %) beyond which the machine was too busy
CALL_SECONDS = 2e-3  # a sample repeats the call until it is about this long
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("features_last", "channels_first")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int]  # [B, T, p]
    reason: str
    streaming: bool  # larger than the last cache: the target holds here


CASES = {
    "streaming": Case((32, 1024, 1024), "a large layer, 128 MiB in float32: four times the last cache", True),
    "large": Case((16, 512, 1024), "one block of a large encoder, 32 MiB in float32", False),
    "roberta_feed_forward": Case((16, 128, 1024), "RoBERTa with 4 layers and hidden size 256: the wide layer", False),
    "roberta_hidden": Case((16, 128, 256), "the same, a narrow layer: in cache, where the launch counts", False),
    "resnet_late": Case((16, 49, 512), "7 x 7 pixels: short sums along the last dimension", False),
}


def make(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> Tensor:
    """A gradient [B, T, p], dense in memory."""
    batch, steps, features = shape
    generator = torch.Generator().manual_seed(0)
    if layout == "features_last":
        return torch.randn(batch, steps, features, generator=generator).to(dtype)
    return torch.randn(batch, features, steps, generator=generator).to(dtype).transpose(1, 2)


def relative_error(grad: Tensor, rows: Tensor) -> float:
    """Largest error of rows [B, p], in units of the largest sum of magnitudes; float64 reference by samples."""
    worst = 0.0
    for sample, row in zip(grad, rows, strict=True):
        exact = sample.to(torch.float64)
        worst = max(worst, ((row - exact.sum(0)).abs().max() / exact.abs().sum(0).max()).item())
    return worst


def repeat(call: Callable[[], object], times: int) -> Callable[[], None]:
    def sample() -> None:
        for _ in range(times):
            call()

    return sample


def measure(case: Case, dtype: str, layout: str, threads: int, seconds: float) -> dict[str, Any]:
    grad = make(case.shape, DTYPES[dtype], layout)
    native = backends.select("native", "cpu")
    internals = native_internals.load()
    record: dict[str, Any] = {"dtype": dtype, "layout": layout, "threads": threads, "bytes": grad.nbytes}
    error = relative_error(grad, native.bias_grad(grad))
    record["relative_error"] = error
    if not error < 2.0**-22:
        return record | {"failed": "wrong sum"}

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        calls = max(1, round(CALL_SECONDS * 1e10 / grad.nbytes))
        address, count = grad.data_ptr(), grad.nbytes
        samples = interleave(
            {
                "read": repeat(lambda: internals.read_bytes(address, count), calls),
                "native": repeat(lambda: native.bias_grad(grad), calls),
                "torch_sum": lambda: grad.sum(1, dtype=torch.float32),
            },
            rounds=400,
            every={"torch_sum": 5},
            budget_s=seconds,
        )
    finally:
        torch.set_num_threads(before)
    cpu = threads == 1
    record["clock"] = "cpu" if cpu else "wall"
    kept = samples.cpu_seconds if cpu else samples.seconds
    per_call = {"read": calls, "native": calls, "torch_sum": 1}
    record["milliseconds"] = {name: 1e3 * float(np.nanmedian(kept[name])) / n for name, n in per_call.items()}
    record["gigabytes_per_second"] = {name: 1e-6 * count / ms for name, ms in record["milliseconds"].items()}
    share = samples.ratio("read", "native", cpu=cpu)
    record["share_of_read"] = share.to_json()
    record["machine_was_busy"] = share.high - share.low > WIDEST
    return record


def line(name: str, record: dict[str, Any]) -> str:
    head = f"{name:22}{record['dtype']:10}{record['layout']:16}{record['threads']} threads "
    if "failed" in record:
        return head + record["failed"]
    speed, share = record["gigabytes_per_second"], record["share_of_read"]
    return head + (
        f"{record['bytes'] / 2**20:7.2f} MiB  {record['milliseconds']['native']:8.3f} ms  "
        f"native {speed['native']:5.1f} GB/s  read {speed['read']:5.1f}  torch.sum {speed['torch_sum']:5.1f}  "
        f"share {share['value']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"
        + ("  (machine busy: no result)" if record["machine_was_busy"] else "")
    )


def run(names: list[str], threads: list[int], seconds: float, save: bool, *, dtypes: list[str]) -> list[dict[str, Any]]:
    recorded = environment() | {"isa": native_internals.load().chosen_isa()}
    cases: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        measured = []
        for dtype in dtypes:
            for layout in LAYOUTS:
                for count in threads:
                    measured.append(measure(case, dtype, layout, count, seconds))
                    print(line(name, measured[-1]), flush=True)
        cases[name] = {
            "shape": case.shape,
            "reason": case.reason,
            "target_share": TARGET if case.streaming else None,
            "measured": measured,
        }
    if save:
        print(results.write("bias_grad.json", {"environment": recorded, "cases": cases}))
    return [record for case in cases.values() for record in case["measured"]]


def test_bias_grad(benchmark: Any) -> None:
    measured: list[dict[str, Any]] = []
    benchmark.pedantic(
        lambda: measured.extend(run(list(CASES), list(THREADS), SECONDS, True, dtypes=["float32", "bfloat16"])),
        rounds=1,
        iterations=1,
    )
    assert not [record for record in measured if "failed" in record]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", default=",".join(map(str, THREADS)))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="timing budget of one measurement")
    parser.add_argument("--save", action="store_true", help="write bench/results/cpu/bias_grad.json")
    given = parser.parse_args()
    threads = [int(count) for count in given.threads.split(",")]
    run(given.cases.split(","), threads, given.seconds, given.save, dtypes=given.dtypes.split(","))


if __name__ == "__main__":
    main()
