"""The backends that must give one contract, each on its device: one suite (test_ops.py) runs on all of them.

`native`: C++ on the CPU. `cuda source`: the CUDA kernels' own source, run on a CPU fiber by fiber. `triton`: the
interpreter, in a process of its own. `native on cuda`, `triton on cuda`: a real device, `pytest -m gpu`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import native_internals
import pytest
import torch
from cases import FLOAT_DTYPES
from torch import Tensor

from dp_bitfit_kernels import _extension, backends


@dataclass(frozen=True)
class Lane:
    """Ops with the arguments of ``_ops.SCHEMAS``, and where their tensors must lie."""

    ops: Any
    device: str

    def put(self, value: Any) -> Any:
        """A tensor on the lane's device with the same strides and what lies around it; anything else as it is."""
        if not isinstance(value, Tensor) or value.device.type == self.device:
            return value
        length = value.untyped_storage().nbytes() // value.element_size()
        everything = value.as_strided((length,), (1,), 0).to(self.device)
        return everything.as_strided(value.shape, value.stride(), value.storage_offset())

    def __call__(self, op: str, *arguments: Any) -> Any:
        """Result of the op on the CPU. An argument that the op writes must lie on the lane's device already."""
        result = getattr(self.ops, op)(*(self.put(argument) for argument in arguments))
        if isinstance(result, tuple):
            return tuple(r.cpu() for r in result)
        return None if result is None else result.cpu()


class CudaSource:
    """The kernels of csrc/cuda, launched as the .cu files launch them."""

    def __init__(self) -> None:
        self.native = native_internals.load()

    def _reduce(self, rows: Tensor, grad: Tensor, accumulate: bool) -> None:
        batch, steps, features = grad.shape
        if batch == 0 or features == 0:
            return
        where = (*grad.shape, *grad.stride(), grad.element_size(), grad.data_ptr())
        splits = self.native.cuda_plan_bias_grad(*where)["splits"]
        partial = torch.full((batch, splits, features), float("nan")) if splits > 1 else None
        out, split = (rows, 0) if partial is None else (partial, features)
        self.native.cuda_bias_grad(
            *(FLOAT_DTYPES.index(grad.dtype), grad.data_ptr()),
            *(batch, steps, features, *grad.stride()),
            *(out.data_ptr(), out.stride(0), split),
            accumulate and partial is None,
        )
        if partial is not None:
            self._reduce(rows, partial, accumulate)

    def bias_grad(self, grad: Tensor) -> Tensor:
        rows = torch.full((grad.shape[0], grad.shape[2]), float("nan"))
        self._reduce(rows, grad, accumulate=False)
        return rows

    def bias_grad_(self, rows: Tensor, grad: Tensor) -> None:
        self._reduce(rows, grad, accumulate=True)

    def clip_factors(self, rows, offsets, mask, bounds, grid, extra, scale, gamma):  # type: ignore[no-untyped-def]
        groups = len(offsets) - 1
        factors, norms = torch.full((2, len(rows), groups), float("nan"), dtype=torch.float64)
        tensors = (mask, bounds, grid, extra, factors, norms)
        self.native.cuda_clip_factors(
            *(rows.data_ptr(), len(rows), rows.stride(0), offsets.data_ptr(), groups),
            *(0 if t is None else t.data_ptr() for t in tensors),
            *(scale, gamma or 0.0, gamma is None),
        )
        return factors, norms

    def clipped_sum_(self, total: Tensor, rows: Tensor, offsets: Tensor, factors: Tensor) -> None:
        self.native.cuda_clipped_sum(
            *(total.data_ptr(), rows.data_ptr(), *rows.shape, rows.stride(0)),
            *(offsets.data_ptr(), factors.data_ptr(), len(offsets) - 1),
        )

    def noisy_sum(self, total, key, step, stream, first, noise_std, scale):  # type: ignore[no-untyped-def]
        count = len(total)
        out = torch.full((count + 2,), float("nan"))
        self.native.cuda_noisy_sum(
            *(total.data_ptr(), key.data_ptr(), step.data_ptr()),
            *(stream, first, count, noise_std, scale, out.data_ptr()),
        )
        assert out[count:].isnan().all()
        return out[:count]

    def random_words(self, key: Tensor, step: Tensor, stream: int, first: int, count: int) -> Tensor:
        out = torch.full((count + 1,), -1, dtype=torch.int64)
        self.native.cuda_random_words(key.data_ptr(), step.data_ptr(), stream, first, count, out.data_ptr())
        assert out[count] == -1
        return out[:count]


def _cpu() -> Lane:
    if (reason := _extension.native_available("cpu")) is not None:
        pytest.skip(reason)
    return Lane(torch.ops.dp_bitfit_kernels, "cpu")


def _cuda_source() -> Lane:
    pytest.importorskip("pybind11")
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    return Lane(CudaSource(), "cpu")


def _interpreter() -> Lane:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 from the start")
    from dp_bitfit_kernels import kernels

    return Lane(kernels, "cpu")


def _on_cuda(backend: str) -> Lane:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (reason := backends.unavailable(backend, "cuda")) is not None:
        pytest.skip(reason)
    return Lane(backends.select(backend, "cuda"), "cuda")


_MAKE: dict[str, Callable[[], Lane]] = {
    "native": _cpu,
    "cuda source": _cuda_source,
    "triton": _interpreter,
    "native on cuda": lambda: _on_cuda("native"),
    "triton on cuda": lambda: _on_cuda("triton"),
}
MARKS: dict[str, Any] = {
    "triton": pytest.mark.interpreter,
    "native on cuda": pytest.mark.gpu,
    "triton on cuda": pytest.mark.gpu,
}
LANES = [pytest.param(name, marks=MARKS.get(name, ())) for name in _MAKE]


def make_lane(name: str) -> Lane:
    """The lane, or a skip that says what it lacks."""
    return _MAKE[name]()
