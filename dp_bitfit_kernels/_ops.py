"""Schemas and fake (shape) implementations of every op; nothing else.

The compiled backend implements these under the dispatcher (``torch.ops.dp_bitfit_kernels.*``). The
reference and Triton backends offer Python functions of the same names and arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._validate import check_one_device

NAMESPACE = "dp_bitfit_kernels"

SCHEMAS: dict[str, str] = {
    # grad [B, T, p], any strides (channels first is the transposed view of [B, p, T]); -> [B, p] float32
    "bias_grad": "(Tensor grad) -> Tensor",
    # rows [B, p] float32 (unit column stride) += the same sum
    "bias_grad_": "(Tensor(a!) rows, Tensor grad) -> ()",
    # rows [B, P] float32, offsets [L+1] int64, mask [B] bool, bounds [L] float64, grid [L] float64,
    # extra_squares [B, L] float64 or None; -> factors [B, L] float64, norms [B, L] float64
    "clip_factors": (
        "(Tensor rows, Tensor offsets, Tensor mask, Tensor bounds, Tensor grid, "
        "Tensor? extra_squares, float scale, float? gamma) -> (Tensor, Tensor)"
    ),
    # total [P] int64 += sum over rows of floor(row * factor + 0.5)
    "clipped_sum_": "(Tensor(a!) total, Tensor rows, Tensor offsets, Tensor factors) -> ()",
    # total [P] int64, key [8] int32, step [1] int64; -> [P] float32
    "noisy_sum": (
        "(Tensor total, Tensor key, Tensor step, int stream, int first, float noise_std, float scale) -> Tensor"
    ),
    # -> [count] int64: 64-bit words of the ChaCha20 key stream, numbers first, first + 1, ...
    "random_words": "(Tensor key, Tensor step, int stream, int first, int count) -> Tensor",
}

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)


def _bias_grad_fake(grad: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], grad.shape[2]), dtype=torch.float32)


def _bias_grad_into_fake(rows: Tensor, grad: Tensor) -> None:
    check_one_device("bias_grad_", rows, grad)


def _clip_factors_fake(
    rows: Tensor,
    offsets: Tensor,
    mask: Tensor,
    bounds: Tensor,
    grid: Tensor,
    extra_squares: Tensor | None,
    scale: float,
    gamma: float | None,
) -> tuple[Tensor, Tensor]:
    check_one_device("clip_factors", rows, offsets, mask, bounds, grid, extra_squares)
    shape = (rows.shape[0], bounds.shape[0])
    return rows.new_empty(shape, dtype=torch.float64), rows.new_empty(shape, dtype=torch.float64)


def _clipped_sum_fake(total: Tensor, rows: Tensor, offsets: Tensor, factors: Tensor) -> None:
    check_one_device("clipped_sum_", total, rows, offsets, factors)


def _noisy_sum_fake(
    total: Tensor, key: Tensor, step: Tensor, stream: int, first: int, noise_std: float, scale: float
) -> Tensor:
    check_one_device("noisy_sum", total, key, step)
    return total.new_empty(total.shape, dtype=torch.float32)


def _random_words_fake(key: Tensor, step: Tensor, stream: int, first: int, count: int) -> Tensor:
    check_one_device("random_words", key, step)
    return key.new_empty((count,), dtype=torch.int64)


_FAKES: dict[str, Callable[..., Any]] = {
    "bias_grad": _bias_grad_fake,
    "bias_grad_": _bias_grad_into_fake,
    "clip_factors": _clip_factors_fake,
    "clipped_sum_": _clipped_sum_fake,
    "noisy_sum": _noisy_sum_fake,
    "random_words": _random_words_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)
