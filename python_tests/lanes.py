"""The backends that must give one contract, each on its device: one suite (test_ops*.py) runs on all of them.

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

    def noisy_sum(self, total, *arguments):  # type: ignore[no-untyped-def]
        out = torch.full((len(total) + 2,), float("nan"))
        self.noisy_sum_(out[: len(total)], total, *arguments)
        assert out[len(total) :].isnan().all()
        return out[: len(total)]

    def noisy_sum_(self, release, total, key, step, stream, first, noise_std, scale):  # type: ignore[no-untyped-def]
        self.native.cuda_noisy_sum(
            *(total.data_ptr(), key.data_ptr(), step.data_ptr()),
            *(stream, first, len(total), noise_std, scale, release.data_ptr()),
        )

    def random_words(self, key: Tensor, step: Tensor, stream: int, first: int, count: int) -> Tensor:
        out = torch.full((count + 1,), -1, dtype=torch.int64)
        self.native.cuda_random_words(key.data_ptr(), step.data_ptr(), stream, first, count, out.data_ptr())
        assert out[count] == -1
        return out[:count]


class CudaBackwardSource(CudaSource):
    """And of the ops that keep little for backward. No argument is checked here."""

    def _rows(self, grad: Tensor, reduce: int) -> Tensor:
        shape = {0: (0,), 1: (grad.shape[0], grad.shape[2]), 2: (grad.shape[0], grad.shape[1])}[reduce]
        return torch.full(shape, float("nan") if grad.numel() else 0.0)

    def _scale(self, factor, grad, reduce, kept=None, table=None, on=0.0, off=0.0, kind=0):  # type: ignore[no-untyped-def]
        dx, rows = torch.full_like(grad, float("nan")), self._rows(grad, reduce)
        if grad.numel() == 0:
            return dx, rows
        given = (factor, FLOAT_DTYPES.index(grad.dtype), grad.data_ptr(), *grad.shape, reduce)
        given += (*(0 if t is None else t.data_ptr() for t in (kept, table)), on, off, kind, dx.data_ptr())
        shape = self.native.cuda_scale(*given, 0)
        partial = torch.full(shape, float("nan")) if reduce and shape[1] > 1 else None
        unread = torch.zeros(1)  # an address that says: launch
        out = partial if partial is not None else rows if reduce else unread
        self.native.cuda_scale(*given, out.data_ptr())
        return dx, rows if partial is None else self.bias_grad(partial)

    def bit_scale(self, x, bits, on, off, reduce):  # type: ignore[no-untyped-def]
        return self._scale("bits", x, reduce, kept=bits, on=on, off=off)

    def activation_grad(self, grad, x, kind, reduce):  # type: ignore[no-untyped-def]
        return self._scale("activation", grad, reduce, kept=x, kind=kind)

    def slope_scale(self, grad, codes, reduce):  # type: ignore[no-untyped-def]
        return self._scale("codes", grad, reduce, kept=codes)

    def level_scale(self, grad, planes, levels, reduce):  # type: ignore[no-untyped-def]
        return self._scale("levels", grad, reduce, kept=planes, table=levels)

    def affine_grad(self, grad, scale, reduce):  # type: ignore[no-untyped-def]
        return self._scale("columns", grad, reduce, table=scale)

    def _pack(self, op, x, y, out, edges=None, limits=(0.0, 0.0, 0.0), kind=0):  # type: ignore[no-untyped-def]
        number = FLOAT_DTYPES.index(x.dtype) if x.dtype in FLOAT_DTYPES else 0
        places = (0 if t is None else t.data_ptr() for t in (y, out, edges))
        self.native.cuda_pack(op, number, x.data_ptr(), x.numel(), *places, *limits, kind)

    def _bits(self, x: Tensor, *planes: int) -> Tensor:
        return torch.full((*planes, (x.numel() + 7) // 8), 0xAA, dtype=torch.uint8)

    def pack_bits(self, mask: Tensor) -> Tensor:
        bits = self._bits(mask)
        self._pack("pack_bits", mask, None, bits)
        return bits

    def clamp_pack(self, x: Tensor, low: float, high: float, slope: float) -> tuple[Tensor, Tensor]:
        y, bits = torch.full_like(x, float("nan")), self._bits(x)
        self._pack("clamp_pack", x, y, bits, limits=(low, high, slope))
        return y, bits

    def clamp_pack_(self, x: Tensor, low: float, high: float, slope: float) -> Tensor:
        bits = self._bits(x)
        self._pack("clamp_pack", x, x, bits, limits=(low, high, slope))
        return bits

    def level_pack(self, x: Tensor, edges: Tensor) -> Tensor:
        planes = self._bits(x, 3)
        self._pack("level_pack", x, None, planes, edges)
        return planes

    def slope_pack(self, x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        y, codes = torch.full_like(x, float("nan")), torch.full((3, x.numel()), 0xAA, dtype=torch.uint8)
        self._pack("slope_pack", x, y, codes, kind=kind)
        return y, codes

    def _norm(self, layer, grad, given, dx, out, shape):  # type: ignore[no-untyped-def]
        places = (0 if t is None else t.data_ptr() for t in (grad, *given, dx, out))
        packed = given[0].dtype == torch.int8
        return self.native.cuda_norm_grad(layer, FLOAT_DTYPES.index(grad.dtype), packed, *places, *shape)

    def layer_norm_grad(self, grad, x, shift, scale, rstd, weight, reduce):  # type: ignore[no-untyped-def]
        dx, rows, given = torch.full_like(grad, float("nan")), self._rows(grad, reduce), (x, shift, scale, rstd, weight)
        if grad.numel() == 0:
            return dx, rows
        batch, length, width = grad.shape
        splits = self._norm(True, grad, given, None, None, (batch, 1, length, width))
        if splits == 0:
            self._norm(False, grad, given, dx, None, (batch * length, 1, width, 1))
            return dx, self.bias_grad(grad) if reduce else rows
        partial = torch.full((batch, splits, width), float("nan")) if reduce and splits > 1 else None
        out = partial if partial is not None else rows if reduce else None
        self._norm(True, grad, given, dx, out, (batch, 1, length, width))
        return dx, rows if partial is None else self.bias_grad(partial)

    def group_norm_grad(self, grad, x, shift, scale, rstd, weight):  # type: ignore[no-untyped-def]
        dx, rows, groups = torch.full_like(grad, float("nan")), self._rows(grad, 2), scale.shape[-1]
        if grad.numel() > 0:
            shape = (grad.shape[0] * groups, groups, grad.shape[1] // groups, grad.shape[2])
            self._norm(False, grad, (x, shift, scale, rstd, weight), dx, rows, shape)
        return dx, rows

    def quantize_norm(self, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = torch.full(x.shape, 77, dtype=torch.int8), torch.full(x.shape[:1], float("nan"))
        places = (t.data_ptr() for t in (mean, rstd, codes, scale))
        self.native.cuda_quantize_norm(FLOAT_DTYPES.index(x.dtype), x.data_ptr(), *x.shape, *places)
        return codes, scale


def _cpu() -> Lane:
    if (reason := _extension.native_available("cpu")) is not None:
        pytest.skip(reason)
    return Lane(torch.ops.dp_bitfit_kernels, "cpu")


def _cuda_source() -> Lane:
    pytest.importorskip("pybind11")
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    return Lane(CudaBackwardSource(), "cpu")


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
