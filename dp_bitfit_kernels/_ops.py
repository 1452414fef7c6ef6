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
    # total [V, d] int64 at rows ids [B, T] int64 += floor(vectors * factor + 0.5), vectors [B, T, d] float32,
    # factors [B] float64
    "clipped_index_sum_": "(Tensor(a!) total, Tensor ids, Tensor vectors, Tensor factors) -> ()",
    # total [p * d] int64 += (fresh: =) sum over samples of floor(row * factor + 0.5), row = sum_t left_t right_t^T,
    # left [B, T, p], right [B, T, d] float32, of both T or the last with unit stride, factors [B] float64
    "clipped_outer_sum_": "(Tensor(a!) total, Tensor left, Tensor right, Tensor factors, bool fresh) -> ()",
    # left [B, T, p], right [B, T, d] likewise -> |sum_t left_t right_t^T|^2 [B] float64, and the sums over t of
    # |left_t| |right_t|, |left_t|, |right_t| [3, B] float64
    "ghost_squares": "(Tensor left, Tensor right) -> (Tensor, Tensor)",
    # grad, x [B, T, p] of one dtype; contiguous; -> rows [B, p], for CPUs alone
    "scale_grad": "(Tensor grad, Tensor x, float eps, bool centered) -> Tensor",
    # total [P] int64, key [8] int32, step [1] int64; -> [P] float32
    "noisy_sum": (
        "(Tensor total, Tensor key, Tensor step, int stream, int first, float noise_std, float scale) -> Tensor"
    ),
    # the same, written into release [P] float32, neighbours in memory
    "noisy_sum_": (
        "(Tensor(a!) release, Tensor total, Tensor key, Tensor step, int stream, int first, float noise_std, "
        "float scale) -> ()"
    ),
    # -> [count] int64: 64-bit words of the ChaCha20 key stream, numbers first, first + 1, ...
    "random_words": "(Tensor key, Tensor step, int stream, int first, int count) -> Tensor",
    # What follows keeps little for backward. grad is contiguous [B, R, C]; rows [B, C] (reduce 1), [B, R] (2) or [0].
    # mask bool, n elements -> [ceil(n / 8)] uint8
    "pack_bits": "(Tensor mask) -> Tensor",
    # x contiguous, n elements -> y, bits [ceil(n / 8)] uint8 of what lies strictly between
    "clamp_pack": "(Tensor x, float low, float high, float slope) -> (Tensor, Tensor)",
    "clamp_pack_": "(Tensor(a!) x, float low, float high, float slope) -> Tensor",
    # x [B, R, C], bits [ceil(n / 8)] -> x * (bit ? on : off), its rows
    "bit_scale": "(Tensor x, Tensor bits, float on, float off, int reduce) -> (Tensor, Tensor)",
    # grad, x [B, R, C] -> grad * f'(x), its rows
    "activation_grad": "(Tensor grad, Tensor x, int kind, int reduce) -> (Tensor, Tensor)",
    # x float32, n elements -> f(x), codes [3, n] uint8 of f'(x)
    "slope_pack": "(Tensor x, int kind) -> (Tensor, Tensor)",
    # grad float32 [B, R, C], codes [3, n] -> grad * f', its rows
    "slope_scale": "(Tensor grad, Tensor codes, int reduce) -> (Tensor, Tensor)",
    # x, n elements; edges [7] float32 -> bit planes [3, ceil(n / 8)] uint8
    "level_pack": "(Tensor x, Tensor edges) -> Tensor",
    # grad [B, R, C], planes [3, ceil(n / 8)], levels [8] float32 -> grad * level, its rows
    "level_scale": "(Tensor grad, Tensor planes, Tensor levels, int reduce) -> (Tensor, Tensor)",
    # x [M, N], mean [M], rstd [M] float32 -> int8 [M, N], scale [M] float32
    "quantize_norm": "(Tensor x, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    # grad, x [B, R, C] (x also int8); shift, scale, rstd [B * R] float32; weight [C] float32 -> dx, rows of grad
    "layer_norm_grad": (
        "(Tensor grad, Tensor x, Tensor? shift, Tensor scale, Tensor rstd, Tensor? weight, int reduce) "
        "-> (Tensor, Tensor)"
    ),
    # grad, x [B, C, S] (x also int8); shift, scale, rstd [B, G] float32; weight [C] float32 -> dx, rows [B, C] of grad
    "group_norm_grad": (
        "(Tensor grad, Tensor x, Tensor? shift, Tensor scale, Tensor rstd, Tensor? weight) -> (Tensor, Tensor)"
    ),
    # grad [B, R, C], scale [C] (reduce 1) or [R] (reduce 2) float32 -> grad * scale, rows of grad
    "affine_grad": "(Tensor grad, Tensor scale, int reduce) -> (Tensor, Tensor)",
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


def _noisy_sum_into_fake(release: Tensor, total: Tensor, key: Tensor, step: Tensor, *numbers: Any) -> None:
    check_one_device("noisy_sum_", release, total, key, step)


def _random_words_fake(key: Tensor, step: Tensor, stream: int, first: int, count: int) -> Tensor:
    check_one_device("random_words", key, step)
    return key.new_empty((count,), dtype=torch.int64)


def _bytes(count: int) -> int:
    return (count + 7) // 8


def _rows_beside(grad: Tensor, reduce: int) -> Tensor:
    shape = {0: (0,), 1: (grad.shape[0], grad.shape[2]), 2: (grad.shape[0], grad.shape[1])}[reduce]
    return grad.new_empty(shape, dtype=torch.float32)


def _packed(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.uint8)


def _grad_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Of every op whose last argument is ``reduce``."""
    return torch.empty_like(grad), _rows_beside(grad, arguments[-1])


def _quantize_norm_fake(x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


_FAKES: dict[str, Callable[..., Any]] = {
    "bias_grad": _bias_grad_fake,
    "bias_grad_": _bias_grad_into_fake,
    "clip_factors": _clip_factors_fake,
    "clipped_sum_": _clipped_sum_fake,
    "clipped_index_sum_": lambda total, ids, vectors, factors: None,
    "clipped_outer_sum_": lambda total, left, right, factors, fresh: None,
    "ghost_squares": lambda left, right: tuple(
        left.new_empty((*several, left.shape[0]), dtype=torch.float64) for several in ((), (3,))
    ),
    "scale_grad": lambda grad, x, eps, centered: _bias_grad_fake(grad),
    "noisy_sum": _noisy_sum_fake,
    "noisy_sum_": _noisy_sum_into_fake,
    "random_words": _random_words_fake,
    "pack_bits": lambda mask: _packed(mask, _bytes(mask.numel())),
    "clamp_pack": lambda x, low, high, slope: (torch.empty_like(x), _packed(x, _bytes(x.numel()))),
    "clamp_pack_": lambda x, low, high, slope: _packed(x, _bytes(x.numel())),
    "bit_scale": _grad_fake,
    "activation_grad": _grad_fake,
    "slope_pack": lambda x, kind: (torch.empty_like(x), _packed(x, 3, x.numel())),
    "slope_scale": _grad_fake,
    "level_pack": lambda x, edges: _packed(x, 3, _bytes(x.numel())),
    "level_scale": _grad_fake,
    "quantize_norm": _quantize_norm_fake,
    "layer_norm_grad": _grad_fake,
    "group_norm_grad": lambda grad, *others: (torch.empty_like(grad), _rows_beside(grad, 2)),
    "affine_grad": _grad_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)
