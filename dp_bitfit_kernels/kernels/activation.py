"""Activations and their derivatives, in float32; the derivative kept in 24 bits an element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_bitfit_kernels._validate import OpError
from dp_bitfit_kernels.kernels.checks import check_kind
from dp_bitfit_kernels.kernels.plan import alignment, cdiv, on_device_of

GELU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
QUICK_GELU = tl.constexpr(3)  # 2 is silu
SQRT_HALF = tl.constexpr(0.7071067811865476)
PDF_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
TWO_SQRT_2_PI = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBE = tl.constexpr(0.044715)
QUICK = tl.constexpr(1.702)
STEPS = tl.constexpr(2.0**23)  # codes for each unit of a derivative, which starts at -0.5
HALF_STEPS = tl.constexpr(2**22)
LARGEST_CODE = tl.constexpr(2**24 - 1)

# Elements of one program: 128 threads with 8 each; with 16, the exact division takes 124 registers.
TILE = 1024


@triton.jit
def sigmoids(b_a, PRECISE: tl.constexpr):
    """sigmoid(a) and sigmoid(-a), each with its own relative precision: 1 - sigmoid(a) would have none near 0.

    PRECISE: by a division that is rounded once; the plain one may be two units off, and takes fewer registers.
    """
    b_small = tl.exp(-tl.abs(b_a))
    b_near_1 = tl.div_rn(1.0, 1.0 + b_small) if PRECISE else 1.0 / (1.0 + b_small)
    b_near_0 = b_small * b_near_1
    b_up = b_a >= 0.0
    return tl.where(b_up, b_near_1, b_near_0), tl.where(b_up, b_near_0, b_near_1)


@triton.jit
def inner(b_x, KIND: tl.constexpr):
    """The a(x) of f(x) = x sigmoid(a(x)), and its derivative: tanh(u) is 2 sigmoid(2 u) - 1."""
    if KIND == GELU_TANH:
        b_square = b_x * b_x
        b_a = TWO_SQRT_2_PI * (b_x + CUBE * b_square * b_x)
        b_slope = TWO_SQRT_2_PI * (1.0 + 3.0 * CUBE * b_square)
    elif KIND == QUICK_GELU:
        b_a = QUICK * b_x
        b_slope = b_x * 0.0 + QUICK
    else:
        b_a = b_x
        b_slope = b_x * 0.0 + 1.0
    return b_a, b_slope


@triton.jit
def activation(b_x, KIND: tl.constexpr):
    """f(x) of activation KIND, float32."""
    if KIND == GELU:
        b_y = 0.5 * b_x * (1.0 + tl.erf(b_x * SQRT_HALF))
    else:
        b_a, _ = inner(b_x, KIND)
        b_up, _ = sigmoids(b_a, True)
        b_y = b_x * b_up
    return b_y


@triton.jit
def derivative(b_x, KIND: tl.constexpr):
    """f'(x) of activation KIND, float32."""
    if KIND == GELU:
        b_d = 0.5 * (1.0 + tl.erf(b_x * SQRT_HALF)) + b_x * (tl.exp(-0.5 * b_x * b_x) * PDF_0)
    else:
        b_a, b_slope = inner(b_x, KIND)
        b_up, b_down = sigmoids(b_a, False)
        b_d = b_up * (1.0 + b_x * b_slope * b_down)
    return b_d


@triton.jit(do_not_specialize=["n"])
def slope_pack_kernel(
    p_x,  # [n] float32
    p_y,  # [n] float32
    p_codes,  # [3, n] uint8
    n,
    KIND: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program serves BLOCK neighbouring elements: their values, and three bytes of each derivative.

    A derivative times 2^23 is exact in float32; it is rounded by its fraction, since adding 0.5 to an integer beyond
    2^23 would round once more. Example: d = 1: 2^23 + 2^22 = 0xC00000, bytes 0, 0, 192.
    """
    n = n.to(tl.int64) // ALIGN * ALIGN
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_x = tl.load(p_x + o_n, mask=m_n, other=0.0)
    tl.store(p_y + o_n, activation(b_x, KIND), mask=m_n)
    b_d = derivative(b_x, KIND)
    b_steps = tl.where(b_d == b_d, b_d, -0.5) * STEPS
    b_floor = tl.floor(b_steps)
    b_code = b_floor.to(tl.int32) + (b_steps - b_floor >= 0.5).to(tl.int32) + HALF_STEPS
    b_code = tl.minimum(tl.maximum(b_code, 0), LARGEST_CODE)
    for i in tl.static_range(3):
        tl.store(p_codes + i * n + o_n, ((b_code >> (8 * i)) & 255).to(tl.uint8), mask=m_n)


def slope_pack(x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Activation ``kind`` of ``x`` float32, contiguous, n elements -> y, codes [3, n] uint8 of its derivative."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise OpError(f"slope_pack: x must be contiguous float32, got {x.dtype} with strides {list(x.stride())}")
    check_kind("slope_pack", kind)
    count = x.numel()
    y, codes = torch.empty_like(x), torch.empty((3, count), dtype=torch.uint8, device=x.device)
    if count:
        with on_device_of(x):
            slope_pack_kernel[(cdiv(count, TILE),)](
                *(x, y, codes, count),
                KIND=kind,
                ALIGN=alignment(1, count),
                BLOCK=TILE,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return y, codes
