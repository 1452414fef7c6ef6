"""Work of a device, recorded once and replayed on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Work of the device that was recorded once and is replayed on the same memory."""

    runs_python: bool  # at each replay

    def __init__(self, work: Callable[[], None], stream: Any, pool: Any) -> None: ...

    def replay(self) -> None: ...


class _CudaGraph:
    runs_python = False

    def __init__(self, work: Callable[[], None], stream: Any, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(stream.device)
        stream.wait_stream(before)
        try:
            # thread_local: the loader's pinning thread may allocate meanwhile, which is no part of the capture.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
        except BaseException:
            torch.cuda.set_stream(before)  # a capture that was broken off leaves its own stream behind
            raise

    def replay(self) -> None:
        self._graph.replay()


class Repetition:
    """Where a device has no graphs, the work itself, each time."""

    runs_python = True

    def __init__(self, work: Callable[[], None], stream: Any, pool: Any) -> None:
        self.replay = work


GRAPHS: dict[str, type[Graph]] = {"cuda": _CudaGraph}
