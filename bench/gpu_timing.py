"""Kernel time on a CUDA device: replays of a graph over rotated inputs, so that no launch and no cache is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ROTATE_BYTES = 400 * 2**20  # several times the second-level cache of today's cards


def rotated(make: Callable[[int], Any], bytes_each: int, limit: int = 64) -> list[Any]:
    """Enough inputs of `bytes_each` that a full turn passes the cache: make(0), make(1), ..."""
    return [make(i) for i in range(max(2, min(limit, -(-ROTATE_BYTES // max(1, bytes_each)))))]


def graph_seconds(call: Callable[[Any], Any], inputs: Sequence[Any], repeats: int = 15) -> float:
    """Median seconds of one call, from replays of a graph that calls each input once; no launch gaps, no allocation."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for value in inputs[:2]:
            call(value)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for value in inputs:
            call(value)
    graph.replay()
    return _replayed(graph.replay, repeats) / len(inputs)


def eager_seconds(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median seconds between events around one eager call, launches and Python included."""
    for _ in range(5):
        call()
    return _replayed(call, repeats)


def _replayed(call: Callable[[], Any], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(taken)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large device-to-device copy: the ceiling of what follows."""
    source = torch.randn(2**28, device="cuda")
    target: Tensor = torch.empty_like(source)
    seconds = graph_seconds(lambda _: target.copy_(source), [0, 1])
    return 2 * source.numel() * 4 / seconds


def op_lines(cases: dict[str, Any]) -> list[str]:
    """A line a case: each contender's time and share of the copy's bandwidth, or why it has no number."""
    lines = []
    for name, case in cases.items():
        cells = []
        for who, value in case.items():
            if not isinstance(value, dict):
                continue
            if not value["passed"]:
                cells.append(f"{who} NO NUMBER ({value['reason']})")
                continue
            eager = f", eager {value['eager_us']:6.1f} us" if "eager_us" in value else ""
            cells.append(f"{who} {value['us']:7.1f} us {value['of_copy']:5.2f} of copy{eager}")
        lines.append(f"{name:36s} " + "   ".join(cells))
    return lines
