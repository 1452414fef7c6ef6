"""Per-sample bias gradient: sum over T of a [B, T, p] tensor, one visit to it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_bitfit_kernels._validate import OpError
from dp_bitfit_kernels.kernels.checks import check_device, check_grad, check_rows
from dp_bitfit_kernels.kernels.plan import alignment, on_device_of, plan_bias_grad

_SHAPE_ARGUMENTS = [
    "T", "p", "chunk", "splits", "tiles", "stride_gb", "stride_gt", "stride_gp", "stride_ob", "stride_os",
]  # fmt: skip


@triton.jit
def fold_tile(b_sum, UNIT_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_T, BLOCK_P] accumulators -> [BLOCK_P], in two steps of chains of at most 16 where the tile allows it,
    the one inside a thread first."""
    FOLD: tl.constexpr = 16 if BLOCK_T > 16 else BLOCK_T
    b_fold = tl.reshape(b_sum, [BLOCK_T // FOLD, FOLD, BLOCK_P])
    if UNIT_T:
        b_row = tl.sum(tl.sum(b_fold, axis=1), axis=0)
    else:
        b_row = tl.sum(tl.sum(b_fold, axis=0), axis=0)
    return b_row


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def bias_grad_kernel(
    p_grad,  # [B, T, p], any strides
    p_out,  # [B, splits, p] float32, unit stride along p
    T,
    p,
    chunk,
    splits,
    tiles,
    stride_gb,
    stride_gt,
    stride_gp,
    stride_ob,
    stride_os,
    UNIT_P: tl.constexpr,
    UNIT_T: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_OUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program sums ``chunk`` rows of ``BLOCK_P`` columns of one sample.

    It walks down T in tiles of BLOCK_T x BLOCK_P that are added element by element into as many float32
    accumulators, and folds those once, at the end: short chains, no atomics, always the same order.
    The compiler lays the threads along whichever dimension is contiguous (p: features last, T: channels first).
    """
    i_program = tl.program_id(0)
    i_p = i_program % tiles
    i_s = (i_program // tiles) % splits
    i_b = (i_program // tiles // splits).to(tl.int64)

    stride_gb = stride_gb.to(tl.int64) // ALIGN * ALIGN
    stride_gt = stride_gt.to(tl.int64)
    stride_gp = stride_gp.to(tl.int64)
    t_first = i_s.to(tl.int64) * chunk
    t_count = tl.minimum(T - t_first, chunk).to(tl.int32)
    if UNIT_P:
        stride_gp = 1
        stride_gt = stride_gt // ALIGN * ALIGN
        p = p // ALIGN * ALIGN
    elif UNIT_T:
        stride_gt = 1
        stride_gp = stride_gp // ALIGN * ALIGN
        t_first = t_first // ALIGN * ALIGN
        t_count = t_count // ALIGN * ALIGN

    o_t = tl.arange(0, BLOCK_T)
    o_p = i_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < p
    p_tile = (
        p_grad
        + (i_b * stride_gb + t_first * stride_gt)
        + (o_t.to(tl.int64)[:, None] * stride_gt + o_p[None, :] * stride_gp)
    )
    b_sum = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    for t in range(0, t_count, BLOCK_T):
        b_sum += tl.load(p_tile, mask=(o_t < t_count - t)[:, None] & m_p[None, :], other=0.0).to(tl.float32)
        p_tile += BLOCK_T * stride_gt
    b_row = fold_tile(b_sum, UNIT_T, BLOCK_T, BLOCK_P)

    stride_ob = stride_ob.to(tl.int64) // ALIGN_OUT * ALIGN_OUT
    stride_os = stride_os.to(tl.int64) // ALIGN_OUT * ALIGN_OUT
    p_row = p_out + i_b * stride_ob + i_s * stride_os + o_p
    m_p = o_p < p // ALIGN_OUT * ALIGN_OUT
    if ACCUMULATE:
        b_row += tl.load(p_row, mask=m_p, other=0.0)
    tl.store(p_row, b_row, mask=m_p)


def bias_grad(grad: Tensor) -> Tensor:
    """Sum of ``grad`` [B, T, p] (any strides, float32, bfloat16 or float16) over T -> [B, p] float32."""
    check_grad("bias_grad", grad)
    rows = torch.empty((grad.shape[0], grad.shape[2]), dtype=torch.float32, device=grad.device)
    if grad.shape[1] == 0:
        rows.zero_()
    else:
        _launch(rows, grad, accumulate=False)
    return rows


def bias_grad_(rows: Tensor, grad: Tensor) -> None:
    """``rows`` [B, p] float32 (unit column stride) += sum of ``grad`` [B, T, p] over T."""
    check_grad("bias_grad_", grad)
    check_rows("bias_grad_", rows)
    check_device("bias_grad_", "rows", rows, grad)
    if rows.shape != (grad.shape[0], grad.shape[2]):
        raise OpError(f"bias_grad_: rows {list(rows.shape)} does not fit grad {list(grad.shape)}")
    if grad.shape[1] > 0:
        _launch(rows, grad, accumulate=True)


def _launch(rows: Tensor, grad: Tensor, accumulate: bool) -> None:
    """Long T takes two launches of the same kernel: partial sums of chunks, then the sum of those [B, splits, p]."""
    batch, length, features = grad.shape
    if batch == 0 or features == 0:
        return
    plan = plan_bias_grad(grad.shape, grad.stride(), grad.element_size())
    two_stages = plan.splits > 1
    if two_stages:
        out = torch.empty((batch, plan.splits, features), dtype=torch.float32, device=grad.device)
    else:
        out = rows.unsqueeze(1)
    with on_device_of(grad):
        bias_grad_kernel[(batch * plan.splits * plan.tiles,)](
            grad,
            out,
            length,
            features,
            plan.chunk,
            plan.splits,
            plan.tiles,
            *grad.stride(),
            out.stride(0),
            out.stride(1),
            UNIT_P=plan.unit == "p",
            UNIT_T=plan.unit == "t",
            ALIGN=plan.align,
            ALIGN_OUT=alignment(out.element_size(), features, *out.stride()[:2]),
            ACCUMULATE=accumulate and not two_stages,
            BLOCK_T=plan.block_t,
            BLOCK_P=plan.block_p,
            num_warps=4,
            enable_fp_fusion=False,
        )
    if two_stages:
        _launch(rows, out, accumulate)
