"""Launch planner of the Triton kernels: pure Python, no device query, no autotuning.

Every choice is a function of shapes, strides and dtype of *one* sample, never of the batch size nor of
the card: a sample's row has the same bits whatever it is batched with (design, section 5.3).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import lru_cache

import torch

VECTOR_BYTES = 16  # widest load of one thread


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)`` for ``a >= 0``, ``b > 0``."""
    return -(-a // b)


def pow2_up(n: int) -> int:
    """Smallest power of two that is at least ``max(n, 1)``."""
    return 1 << max(n - 1, 0).bit_length()


def alignment(itemsize: int, *extents: int) -> int:
    """Elements that one vector load may hold: the largest power of two dividing every extent, at most 16 bytes.

    The kernels round these extents to this constant (a no-op), which is how the compiler learns of it; Triton
    itself only notices multiples of 16 elements, which misses p = 200 or a 14 x 14 image.
    """
    align = VECTOR_BYTES // itemsize
    while any(extent % align for extent in extents):
        align //= 2
    return align


@dataclass(frozen=True)
class BiasGradPlan:
    """One launch of ``bias_grad_kernel`` over a [B, T, p] tensor."""

    block_t: int  # rows of a tile
    block_p: int  # columns of a tile
    chunk: int  # rows summed by one program, a multiple of block_t
    splits: int  # programs along T; more than one: their partial sums [B, splits, p] take a second launch
    tiles: int  # programs along p
    unit: str  # "p": features last, "t": channels first, "": no dimension is contiguous
    align: int  # elements of a vector load along the contiguous dimension


# 4096 elements on 128 threads: 32 float32 accumulators a thread, and 4 (16-bit) or 8 (float32) vector loads in
# flight, 8 to 16 KiB a program; a handful of programs then cover the latency of HBM on an SM.
TILE = 4096
# Features last: 64 columns are one (16-bit) or two (float32) full 128-byte lines a row.
FEATURES_BLOCK_P = 64
# Channels first: 16 channels of 256 contiguous elements, one warp a channel row for 16-bit types.
CHANNELS_BLOCK_P = 16
# Up to here one program sums all of T: a second launch costs more than it brings.
UNSPLIT_TILES = 16
# Programs per sample worth having when T is long; two to four waves of a large card for B = 1.
TARGET_PROGRAMS = 512
# Additions one accumulator may chain: bounds the rounding error for any T (longer sums go through more stages).
LONGEST_CHAIN = 128


@lru_cache(maxsize=4096)
def plan_bias_grad(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, tile: int = TILE) -> BiasGradPlan:
    """Tile and split of ``bias_grad`` for ``shape`` = (B, T, p) and ``strides`` in elements; T, p >= 1.

    ``tile`` is the number of elements of a tile, for kernels that do more with each.
    """
    _, t, p = shape
    stride_b, stride_t, stride_p = strides
    # The stride of a dimension of one element is arbitrary, so p = 1 is channels first and T = 1 features last.
    if stride_p == 1 and (p > 1 or stride_t != 1):
        unit = "p"
        align = alignment(itemsize, stride_b, stride_t, p)
    elif stride_t == 1:
        unit = "t"
        align = alignment(itemsize, stride_b, stride_p, t)
    else:
        unit, align = "", 1
    widest = CHANNELS_BLOCK_P if unit == "t" else FEATURES_BLOCK_P
    block_p = min(pow2_up(p), widest)
    block_t = min(_pow4_up(t), tile // block_p)
    block_p = min(pow2_up(p), max(block_p, tile // block_t), 1024)
    tiles = cdiv(p, block_p)
    if t <= UNSPLIT_TILES * block_t:
        chunk = cdiv(t, block_t) * block_t
    else:
        chunk = cdiv(cdiv(t, cdiv(TARGET_PROGRAMS, tiles)), block_t) * block_t
        chunk = min(max(chunk, UNSPLIT_TILES // 2 * block_t), LONGEST_CHAIN * block_t)
    return BiasGradPlan(block_t, block_p, chunk, cdiv(t, chunk), tiles, unit, align)


def _pow4_up(n: int) -> int:
    """Smallest power of four that is at least n: half as many compiled variants as powers of two."""
    exponent = max(n - 1, 0).bit_length()
    return 1 << (exponent + exponent % 2)


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; make that the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
