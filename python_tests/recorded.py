"""A CUDA graph as a CPU can have it: the operations of one run, recorded, and replayed on the same memory.

What a graph must not do shows here, too: a replay repeats operations on tensors, nothing of Python. A value that the
host read, a leaf that is made anew for each batch, a tensor that was not copied into the captured one all give other
numbers than the eager step, or are refused when they are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The host would wait for the device, or the shape of a result depend on it: a capture fails at these.
REFUSED = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "repeat_interleave",
    "bincount",
    "lift_fresh",  # torch.tensor(...) of numbers: a copy from the host
}


class Recorder(TorchDispatchMode):
    """Notes every operation with its arguments and results, below autograd."""

    def __init__(self, steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]]) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, [t for t in tree_leaves(result) if isinstance(t, Tensor)]))
        return result


class RecordedGraph:
    """Replays what ``work`` did. As under capture, the first run must leave no trace: memory is put back after it."""

    captures = 0
    runs_python = False

    def __init__(self, work: Callable[[], None], stream: Any, pool: Any) -> None:
        type(self).captures += 1
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        kept = self._memory_before(work)
        for tensor, before in kept:
            tensor.copy_(before)

    def _memory_before(self, work: Callable[[], None]) -> list[tuple[Tensor, Tensor]]:
        before: dict[int, tuple[Tensor, Tensor]] = {}
        made: set[int] = set()

        class Keeper(Recorder):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                for leaf in tree_leaves((args, kwargs)):
                    if isinstance(leaf, Tensor):
                        place = leaf.untyped_storage().data_ptr()
                        if place not in made and place not in before:
                            whole = torch.empty(0, dtype=leaf.dtype).set_(leaf.untyped_storage())
                            before[place] = (whole, whole.clone())
                result = super().__torch_dispatch__(func, types, args, kwargs)
                for leaf in tree_leaves(result):
                    if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in before:
                        made.add(leaf.untyped_storage().data_ptr())
                return result

        generator = torch.random.get_rng_state()
        with Keeper(self.steps):
            work()
        torch.random.set_rng_state(generator)
        return list(before.values())

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.steps:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for result, new in zip(results, again, strict=True):
                if result.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    result.copy_(new)
