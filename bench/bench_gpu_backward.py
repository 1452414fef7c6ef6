"""How near do the ops of a lean backward come to the card's bandwidth? Native, Triton, and PyTorch's own, one run.

    python -m bench.bench_gpu_backward [--json FILE]

Bytes on paper: each input read once, each result written once; the ceiling is a device-to-device copy of the same run.
What PyTorch does for the same result (its backward, then the sum over T) stands beside. Each op is compared with the
reference first; who fails gets no number.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.bench_gpu_kernels import available
from bench.gpu_timing import copy_bandwidth, graph_seconds, op_lines, rotated
from dp_bitfit_kernels import reference_backward as reference

TEXT, IMAGE = (32, 512, 768), (32, 256, 56 * 56)
WIDE = (32, 512, 3072)
Call = Callable[[Any, tuple[Any, ...]], Any]


@dataclass(frozen=True)
class Contest:
    """make(seed) -> arguments; ours(ops, arguments) and torchs(arguments) give the same; moved: bytes on paper."""

    make: Callable[[int], tuple[Any, ...]]
    ours: Call
    torchs: Callable[[tuple[Any, ...]], Any]
    moved: int
    tolerance: float = 0.02


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def _layer_norm(seed: int) -> tuple[Any, ...]:
    grad, x = _random(TEXT, seed), _random(TEXT, seed + 1000)
    weight = torch.ones(TEXT[2], device="cuda")
    _, mean, rstd = torch.native_layer_norm(x.float(), TEXT[2:], weight, None, 1e-5)
    return grad, x, mean.view(-1), rstd.view(-1), weight


def _torchs_layer_norm(a: tuple[Any, ...]) -> Any:
    grad, x, mean, rstd, weight = a
    shape = (*TEXT[:2], 1)
    aten = torch.ops.aten.native_layer_norm_backward
    w = weight.to(x.dtype)
    dx = aten(grad, x, TEXT[2:], mean.view(shape), rstd.view(shape), w, None, [True, False, False])[0]
    return dx, grad.sum(1, dtype=torch.float32)


def _group_norm(seed: int) -> tuple[Any, ...]:
    grad, x = _random(IMAGE, seed), _random(IMAGE, seed + 1000)
    weight = torch.ones(IMAGE[1], device="cuda")
    _, mean, rstd = torch.native_group_norm(x.float(), weight, None, *IMAGE, 32, 1e-5)
    return grad, x, mean, rstd, weight


def _torchs_group_norm(a: tuple[Any, ...]) -> Any:
    grad, x, mean, rstd, weight = a
    aten = torch.ops.aten.native_group_norm_backward
    statistics = (mean.to(x.dtype), rstd.to(x.dtype), weight.to(x.dtype))
    return aten(grad, x, *statistics, *IMAGE, 32, [True, False, False])[0], grad.sum(2, dtype=torch.float32)


def _bits(seed: int) -> tuple[Any, ...]:
    x = _random(IMAGE, seed)
    return x, reference.pack_bits((x > 0).view(-1))


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


CONTESTS: dict[str, Contest] = {
    "layer_norm_grad": Contest(
        _layer_norm,
        lambda ops, a: ops.layer_norm_grad(a[0], a[1], a[2], a[3], a[3], a[4], 1),
        _torchs_layer_norm,
        6 * _elements(TEXT),
    ),
    "group_norm_grad": Contest(
        _group_norm,
        lambda ops, a: ops.group_norm_grad(a[0], a[1], a[2], a[3], a[3], a[4]),
        _torchs_group_norm,
        6 * _elements(IMAGE),
    ),
    "gelu, sum": Contest(
        lambda seed: (_random(WIDE, seed), _random(WIDE, seed + 1000)),
        lambda ops, a: ops.activation_grad(a[0], a[1], 0, 1),
        lambda a: (g := torch.ops.aten.gelu_backward(a[0], a[1]), g.sum(1, dtype=torch.float32)),
        6 * _elements(WIDE),
    ),
    "relu forward": Contest(
        lambda seed: (_random(IMAGE, seed),),
        lambda ops, a: ops.clamp_pack(a[0], 0.0, float("nan"), 0.0)[0],
        lambda a: a[0].relu(),
        4 * _elements(IMAGE),
    ),
    "relu backward, sum": Contest(
        _bits,
        lambda ops, a: ops.bit_scale(a[0], a[1], 1.0, 0.0, 2),
        lambda a: (g := torch.ops.aten.threshold_backward(a[0], a[0], 0), g.sum(2, dtype=torch.float32)),
        4 * _elements(IMAGE),
    ),
    "affine_grad (frozen BatchNorm)": Contest(
        lambda seed: (_random(IMAGE, seed), torch.rand(IMAGE[1], device="cuda") + 0.5),
        lambda ops, a: ops.affine_grad(a[0], a[1], 2),
        lambda a: ((a[0] * a[1].unsqueeze(1)).to(a[0].dtype), a[0].sum(2, dtype=torch.float32)),
        4 * _elements(IMAGE),
    ),
}


def _wrong(got: Any, want: Any, tolerance: float) -> str | None:
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    for number, (a, b) in enumerate(pairs):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        if not error <= tolerance:
            return f"result {number} differs by {error:.2e}"
    return None


def run(copy: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, contest in CONTESTS.items():
        inputs = rotated(contest.make, contest.moved)
        want = contest.ours(reference, inputs[0])
        case: dict[str, Any] = {"bytes": contest.moved}
        calls: dict[str, Callable[[Any], Any]] = {
            who: (lambda a, ops=ops, c=contest: c.ours(ops, a)) for who, ops in available().items()
        }
        calls["torch"] = contest.torchs
        for who, call in calls.items():
            fault = _wrong(call(inputs[0]), want, contest.tolerance)
            if fault:
                case[who] = {"passed": False, "reason": fault}
                continue
            seconds = graph_seconds(call, inputs)
            case[who] = {"passed": True, "us": 1e6 * seconds, "of_copy": contest.moved / seconds / copy}
        found[name] = case
        del inputs, want
        torch.cuda.empty_cache()
    return found


def table(found: dict[str, Any]) -> list[str]:
    lines = [f"copy {found['copy_bytes_per_s'] / 1e12:.2f} TB/s", *op_lines(found["ops"])]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    copy = copy_bandwidth()
    found: dict[str, Any] = {"copy_bytes_per_s": copy, "ops": run(copy)}
    found["table"] = table(found)
    print("\n".join(found["table"]))
    if given.json:
        given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
