"""Integer sum of the clipped rows: each row times its factor, rounded to the grid, added in int64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_bitfit_kernels._validate import OpError
from dp_bitfit_kernels.kernels.checks import check_rows, check_tensor
from dp_bitfit_kernels.kernels.plan import alignment, cdiv, on_device_of, pow2_up

# 128 threads with one 16-byte load a row each; eight rows are in flight at once. With several groups a row also
# takes a gather of its factors, four float64 a thread: half the rows, to stay in registers.
TILE = 512
ROWS = 8
ROWS_GROUPED = 4


@triton.jit(do_not_specialize=["B", "P", "L", "stride_r"])
def clipped_sum_kernel(
    p_total,  # [P] int64
    p_rows,  # [B, P] float32
    p_offsets,  # [L + 1] int64
    p_factors,  # [B, L] float64
    B,
    P,
    L,
    stride_r,
    ONE_GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """One program owns ``BLOCK`` columns and walks down all rows, ``BLOCK_B`` at a time; no two write one element.

    With several groups each column first finds its own by bisection of the offsets (the last one that starts at
    or before it, so empty groups own nothing). A factor of exactly 0.0 selects zero before any arithmetic.
    Multiply and add are two roundings on every backend: launched without floating-point contraction.
    """
    i_p = tl.program_id(0).to(tl.int64)
    o_p = i_p * BLOCK + tl.arange(0, BLOCK)
    o_b = tl.arange(0, BLOCK_B)
    stride_r = stride_r.to(tl.int64) // ALIGN * ALIGN
    P = P // ALIGN * ALIGN
    m_p = o_p < P
    if not ONE_GROUP:
        o_l = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(SEARCH):
            o_next = o_l + (1 << (SEARCH - 1 - i))
            b_begin = tl.load(p_offsets + o_next, mask=o_next < L, other=9223372036854775807)
            o_l = tl.where(b_begin <= o_p, o_next, o_l)
    b_sum = tl.zeros([BLOCK], tl.int64)
    for b in range(0, B, BLOCK_B):
        o_row = (b + o_b).to(tl.int64)
        m_row = o_row < B
        if ONE_GROUP:
            b_factor = tl.load(p_factors + o_row, mask=m_row, other=0.0)[:, None]
        else:
            b_factor = tl.load(p_factors + (o_row[:, None] * L + o_l[None, :]), mask=m_row[:, None], other=0.0)
        b_x = tl.load(
            p_rows + (o_row[:, None] * stride_r + o_p[None, :]), mask=m_row[:, None] & m_p[None, :], other=0.0
        )
        b_x = tl.where(b_factor == 0.0, 0.0, b_x)
        b_sum += tl.sum(tl.floor(b_x.to(tl.float64) * b_factor + 0.5).to(tl.int64), axis=0)
    p_out = p_total + o_p
    tl.store(p_out, tl.load(p_out, mask=m_p, other=0) + b_sum, mask=m_p)


def clipped_sum_(total: Tensor, rows: Tensor, offsets: Tensor, factors: Tensor) -> None:
    """``total`` [P] int64 += sum over the rows [B, P] float32 of ``floor(row * factor + 0.5)``.

    ``factors`` [B, L] float64 belongs to the groups ``offsets`` [L + 1] int64. A row whose factor is exactly 0.0
    adds nothing, whatever it holds. Integer addition: the order of rows and calls does not matter.
    """
    check_rows("clipped_sum_", rows)
    batch, width = rows.shape
    if factors.dim() != 2:
        raise OpError(f"clipped_sum_: factors must be [B, L], got {factors.dim()} dimensions")
    groups = factors.shape[1]
    check_tensor("clipped_sum_", "factors", factors, torch.float64, (batch, groups), rows)
    check_tensor("clipped_sum_", "offsets", offsets, torch.int64, (groups + 1,), rows)
    check_tensor("clipped_sum_", "total", total, torch.int64, (width,), rows)
    if batch == 0 or width == 0 or groups == 0:
        return
    with on_device_of(rows):
        clipped_sum_kernel[(cdiv(width, TILE),)](
            total,
            rows,
            offsets,
            factors,
            batch,
            width,
            groups,
            rows.stride(0),
            ONE_GROUP=groups == 1,
            ALIGN=alignment(rows.element_size(), width, rows.stride(0)),
            BLOCK_B=ROWS if groups == 1 else ROWS_GROUPED,
            BLOCK=TILE,
            SEARCH=pow2_up(groups).bit_length() - 1,
            num_warps=4,
            enable_fp_fusion=False,
        )
