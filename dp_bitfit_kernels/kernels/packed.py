"""What a backward keeps in bits: element i is bit i % 8 of byte i // 8, unused bits are 0."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_bitfit_kernels._validate import OpError
from dp_bitfit_kernels.kernels.checks import check_float, check_tensor
from dp_bitfit_kernels.kernels.plan import alignment, cdiv, on_device_of
from dp_bitfit_kernels.kernels.rounding import rounded

# Bytes of bits of one program: 2,048 elements, 16 a thread, of which 8 neighbours lie in one 16-byte load of 16 bits.
BYTES = 256


@triton.jit
def packed(b_bit):
    """[BYTES, 8] of 0 or 1 -> [BYTES] uint8."""
    o_place = tl.arange(0, 8)
    return tl.sum(b_bit.to(tl.int32) << o_place[None, :], axis=1).to(tl.uint8)


@triton.jit
def places(n, BYTES: tl.constexpr):
    """A program's bytes [BYTES], its elements [BYTES, 8], and which of each exist."""
    o_byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    o_n = o_byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    return o_byte, o_byte < (n + 7) // 8, o_n, o_n < n


@triton.jit(do_not_specialize=["n"])
def pack_bits_kernel(
    p_mask,  # [n] uint8, 0 or 1
    p_bits,  # [ceil(n / 8)] uint8
    n,
    ALIGN: tl.constexpr,
    BYTES: tl.constexpr,
):
    """One program folds BYTES groups of eight neighbours into a byte each."""
    o_byte, m_byte, o_n, m_n = places(n.to(tl.int64) // ALIGN * ALIGN, BYTES)
    tl.store(p_bits + o_byte, packed(tl.load(p_mask + o_n, mask=m_n, other=0)), mask=m_byte)


@triton.jit(do_not_specialize=["n"])
def clamp_pack_kernel(
    p_x,  # [n]
    p_y,  # [n], may be p_x
    p_bits,  # [ceil(n / 8)] uint8
    n,
    low: tl.float32,
    high: tl.float32,
    slope: tl.float32,
    ALIGN: tl.constexpr,
    BYTES: tl.constexpr,
):
    """One program clamps 8 BYTES neighbouring elements and packs which of them were strictly between.

    Comparisons with a NaN are false: a NaN element lies between and stays, a NaN ``high`` limits nothing.
    """
    o_byte, m_byte, o_n, m_n = places(n.to(tl.int64) // ALIGN * ALIGN, BYTES)
    b_x = tl.load(p_x + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_below = b_x <= low
    b_above = b_x >= high
    b_y = tl.where(b_below, tl.where(slope != 0.0, b_x * slope, low), b_x)
    b_y = tl.where(b_above, high, b_y)
    tl.store(p_y + o_n, rounded(b_y, p_y.dtype.element_ty), mask=m_n)
    tl.store(p_bits + o_byte, packed(m_n & (b_below == 0) & (b_above == 0)), mask=m_byte)


@triton.jit(do_not_specialize=["n"])
def level_pack_kernel(
    p_x,  # [n]
    p_edges,  # [7] float32
    p_planes,  # [3, ceil(n / 8)] uint8
    n,
    ALIGN: tl.constexpr,
    BYTES: tl.constexpr,
):
    """One program counts the edges below each of 8 BYTES neighbouring elements and packs the counts, a plane a bit."""
    n = n.to(tl.int64) // ALIGN * ALIGN
    o_byte, m_byte, o_n, m_n = places(n, BYTES)
    b_x = tl.load(p_x + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_code = tl.zeros([BYTES, 8], tl.int32)
    for i in range(7):
        b_code += (m_n & (b_x > tl.load(p_edges + i))).to(tl.int32)
    for i in tl.static_range(3):
        tl.store(p_planes + i * ((n + 7) // 8) + o_byte, packed((b_code >> i) & 1), mask=m_byte)


def _pack(kernel: object, count: int, itemsize: int, like: Tensor, *arguments: object) -> None:
    """One launch over ``count`` elements of ``itemsize`` bytes."""
    if count:
        with on_device_of(like):
            kernel[(cdiv(count, 8 * BYTES),)](  # type: ignore[index]
                *arguments, ALIGN=alignment(itemsize, count), BYTES=BYTES, num_warps=4, enable_fp_fusion=False
            )


def _empty_bits(like: Tensor, *planes: int) -> Tensor:
    return torch.empty((*planes, cdiv(like.numel(), 8)), dtype=torch.uint8, device=like.device)


def pack_bits(mask: Tensor) -> Tensor:
    """``mask`` bool, contiguous, n elements -> [ceil(n / 8)] uint8."""
    if mask.dtype != torch.bool or not mask.is_contiguous():
        raise OpError(f"pack_bits: mask must be contiguous bool, got {mask.dtype} with strides {list(mask.stride())}")
    bits, count = _empty_bits(mask), mask.numel()
    _pack(pack_bits_kernel, count, 1, mask, mask.view(torch.uint8), bits, count)
    return bits


def clamp_pack(x: Tensor, low: float, high: float, slope: float) -> tuple[Tensor, Tensor]:
    """``x``, contiguous, clamped to [low, high] -> y, and a bit for each element strictly between.

    Where ``slope`` is not 0, y = slope * x at or below ``low``. ``high`` may be NaN: no upper limit.
    """
    check_float("clamp_pack", "x", x)
    y = torch.empty_like(x)
    return y, _clamp(x, y, low, high, slope)


def clamp_pack_(x: Tensor, low: float, high: float, slope: float) -> Tensor:
    """As :func:`clamp_pack`, with y written over ``x``; returns the bits."""
    check_float("clamp_pack_", "x", x)
    return _clamp(x, x, low, high, slope)


def _clamp(x: Tensor, y: Tensor, low: float, high: float, slope: float) -> Tensor:
    bits, count, limits = _empty_bits(x), x.numel(), (float(low), float(high), float(slope))
    _pack(clamp_pack_kernel, count, x.element_size(), x, x, y, bits, count, *limits)
    return bits


def level_pack(x: Tensor, edges: Tensor) -> Tensor:
    """Number of ``edges`` [7] float32 below each of the n elements of ``x`` -> bit planes [3, ceil(n / 8)] uint8."""
    check_float("level_pack", "x", x)
    check_tensor("level_pack", "edges", edges, torch.float32, (7,), x)
    planes, count = _empty_bits(x, 3), x.numel()
    _pack(level_pack_kernel, count, x.element_size(), x, x, edges, planes, count)
    return planes
