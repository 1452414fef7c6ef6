"""How near do the ops come to the card's bandwidth? Native (CUDA C++), Triton and torch.sum, one run.

    python -m bench.bench_gpu_kernels [--json FILE]

Bytes are counted on paper (each input read once, each output written once) over the time of a graph's replay; the
ceiling is a device-to-device copy of the same run. Each op is compared with float64 (or, integers, with the reference)
first; who fails gets no number.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_timing import copy_bandwidth, eager_seconds, graph_seconds, op_lines, rotated
from dp_bitfit_kernels import backends, reference

BACKENDS = ("native", "triton")
# name -> (B, T, p, dtype, channels first): at least 64 MB each, the sizes of the issue
GRADS: dict[str, tuple[int, int, int, torch.dtype, bool]] = {
    "text bf16 B=64": (64, 1024, 768, torch.bfloat16, False),
    "text bf16 B=8": (8, 8192, 768, torch.bfloat16, False),
    "text bf16 B=1": (1, 65_536, 768, torch.bfloat16, False),
    "text fp32 B=64": (64, 512, 768, torch.float32, False),
    "text fp32 B=8": (8, 4096, 768, torch.float32, False),
    "text fp32 B=1": (1, 32_768, 768, torch.float32, False),
    "image bf16 B=64 56x56": (64, 3136, 256, torch.bfloat16, True),
    "image bf16 B=64 14x14": (64, 196, 4096, torch.bfloat16, True),
    "image bf16 B=64 7x7": (64, 49, 16_384, torch.bfloat16, True),
    "image fp32 B=8 112x112": (8, 12_544, 256, torch.float32, True),
    "image fp32 B=1 224x224": (1, 50_176, 512, torch.float32, True),
}
SMALL = {"one layer, RoBERTa-base T=128 B=32": (32, 128, 768, torch.bfloat16, False)}
LEDGER = (64, 300_000)  # B, P


def available() -> dict[str, Any]:
    return {name: backends.select(name, "cuda") for name in BACKENDS if backends.unavailable(name, "cuda") is None}


def make_grad(shape: tuple[int, int, int, torch.dtype, bool], seed: int) -> Tensor:
    batch, length, features, dtype, first = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (batch, features, length) if first else (batch, length, features)
    values = torch.randn(size, generator=generator, device="cuda", dtype=torch.float32).to(dtype)
    return values.transpose(1, 2) if first else values


def wrong(got: Tensor, grad: Tensor) -> str | None:
    exact = grad.double().sum(1)
    error = float((got.double() - exact).norm() / exact.norm())
    allowed = 2 * max(2.0**-22, float((grad.sum(1, dtype=torch.float32).double() - exact).norm() / exact.norm()))
    return None if error <= allowed else f"relative error {error:.2e}, allowed {allowed:.2e}"


def bench_bias_grad(copy: float, cases: dict[str, Any]) -> dict[str, Any]:
    contenders: dict[str, Callable[[Tensor], Any]] = {name: b.bias_grad for name, b in available().items()}
    contenders["torch.sum"] = lambda grad: grad.sum(1, dtype=torch.float32)
    found: dict[str, Any] = {}
    for name, shape in cases.items():
        batch, length, features, dtype, _ = shape
        moved = batch * length * features * dtype.itemsize + 4 * batch * features
        inputs = rotated(lambda i, shape=shape: make_grad(shape, i), moved)  # type: ignore[misc]
        case: dict[str, Any] = {"bytes": moved}
        for contender, call in contenders.items():
            fault = wrong(call(inputs[0]), inputs[0])
            if fault:
                case[contender] = {"passed": False, "reason": fault}
                continue
            seconds = graph_seconds(call, inputs)
            eager = eager_seconds(lambda call=call, first=inputs[0]: call(first))  # type: ignore[misc]
            share = moved / seconds / copy
            case[contender] = {"passed": True, "us": 1e6 * seconds, "eager_us": 1e6 * eager, "of_copy": share}
        found[name] = case
        del inputs
        torch.cuda.empty_cache()
    return found


def bench_release(copy: float) -> dict[str, Any]:
    """clip_factors, clipped_sum_ and noisy_sum of one ledger, each and together."""
    batch, width = LEDGER
    offsets = torch.tensor([0, width], device="cuda")
    one = torch.ones(1, dtype=torch.float64, device="cuda")
    mask = torch.ones(batch, dtype=torch.bool, device="cuda")
    key, step = torch.arange(8, dtype=torch.int32, device="cuda"), torch.tensor([1], device="cuda")
    clip = (offsets, mask, one, one * 2.0**20, None, 1.0, None)
    ledgers = rotated(lambda i: torch.randn(LEDGER, device="cuda"), 4 * batch * width)
    found: dict[str, Any] = {"read_twice_us": 1e6 * 2 * 4 * batch * width / copy}
    for name, ops in available().items():
        total = torch.zeros(width, dtype=torch.int64, device="cuda")
        factors, _ = ops.clip_factors(ledgers[0], *clip)
        ops.clipped_sum_(total, ledgers[0], offsets, factors)
        want = torch.zeros(width, dtype=torch.int64)
        reference.clipped_sum_(want, ledgers[0].cpu(), offsets.cpu(), factors.cpu())
        if not torch.equal(total.cpu(), want):
            found[name] = {"passed": False, "reason": "the integer sum differs from the reference"}
            continue

        def whole(rows: Tensor, ops: Any = ops, total: Tensor = total) -> None:
            ops.clipped_sum_(total, rows, offsets, ops.clip_factors(rows, *clip)[0])
            ops.noisy_sum(total, key, step, 0, 0, 2.0**20, 1.0)

        calls: dict[str, Callable[[Tensor], Any]] = {
            "clip_factors": lambda rows, ops=ops: ops.clip_factors(rows, *clip),  # type: ignore[misc]
            "clipped_sum_": lambda rows, ops=ops, t=total, f=factors: ops.clipped_sum_(t, rows, offsets, f),  # type: ignore[misc]
            "noisy_sum": lambda rows, ops=ops, t=total: ops.noisy_sum(t, key, step, 0, 0, 2.0**20, 1.0),  # type: ignore[misc]
            "all three": whole,
        }
        found[name] = {"passed": True, **{op: 1e6 * graph_seconds(call, ledgers) for op, call in calls.items()}}
    return found


def table(found: dict[str, Any]) -> list[str]:
    lines = [f"copy {found['copy_bytes_per_s'] / 1e12:.2f} TB/s", *op_lines({**found["bias_grad"], **found["small"]})]
    release = found["release"]
    lines.append(f"ledger {LEDGER[0]} x {LEDGER[1]}: reading it twice takes {release['read_twice_us']:.1f} us")
    for who, value in release.items():
        if isinstance(value, dict):
            lines.append(f"  {who}: " + ", ".join(f"{k} {v:.1f} us" for k, v in value.items() if isinstance(v, float)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    copy = copy_bandwidth()
    found: dict[str, Any] = {"copy_bytes_per_s": copy}
    found["bias_grad"] = bench_bias_grad(copy, GRADS)
    found["small"] = bench_bias_grad(copy, SMALL)
    found["release"] = bench_release(copy)
    found["table"] = table(found)
    print("\n".join(found["table"]))
    if given.json:
        given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
