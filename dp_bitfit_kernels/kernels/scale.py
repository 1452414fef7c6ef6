"""A gradient times what was kept of the forward pass, and in the same visit its per-sample sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_bitfit_kernels._validate import OpError
from dp_bitfit_kernels.kernels.activation import derivative
from dp_bitfit_kernels.kernels.bias_grad import bias_grad, fold_tile
from dp_bitfit_kernels.kernels.checks import check_device, check_float, check_kind, check_reduced, check_tensor
from dp_bitfit_kernels.kernels.plan import cdiv, on_device_of, plan_bias_grad
from dp_bitfit_kernels.kernels.rounding import rounded

# Elements of a tile: 16 a thread, half of bias_grad's, for what each of them takes beside its sum.
TILE = 2048

# What a gradient is multiplied by.
BITS = tl.constexpr(0)  # one of two factors, by a bit
ACTIVATION = tl.constexpr(1)  # the derivative at an element of its own dtype
CODES = tl.constexpr(2)  # a derivative of 24 bits
LEVELS = tl.constexpr(3)  # one of eight factors, by three bits
COLUMNS = tl.constexpr(4)  # a factor a column

_SHAPE_ARGUMENTS = ["T", "p", "chunk", "splits", "tiles", "stride_b", "stride_t", "stride_p", "n"]


@triton.jit
def bit_of(p_bits, first, o_tile, m, o_byte, m_byte, OCTETS: tl.constexpr, UNIT_T: tl.constexpr):
    """Bits of the elements ``first + o_tile`` as 0 or 1. Whole bytes go to the pointer: offsets stay short.

    OCTETS: eight neighbours begin with a byte, which is loaded once for all of them, from ``o_byte``.
    """
    p_first = p_bits + (first >> 3)
    if OCTETS:
        b_byte = tl.load(p_first + o_byte, mask=m_byte, other=0).to(tl.int32)
        o_place = tl.arange(0, 8)
        if UNIT_T:
            b_bit = b_byte[:, None, :] >> o_place[None, :, None]
        else:
            b_bit = b_byte[:, :, None] >> o_place[None, None, :]
        b_bit = tl.reshape(b_bit, o_tile.shape) & 1
    else:
        o_bit = (first & 7).to(o_tile.dtype) + o_tile
        b_byte = tl.load(p_first + (o_bit >> 3), mask=m, other=0).to(tl.int32)
        b_bit = (b_byte >> (o_bit & 7).to(tl.int32)) & 1
    return b_bit


@triton.jit
def scaled(
    b_grad,
    p_kept,
    p_table,
    b_column,
    first,
    o_tile,
    m,
    o_byte,
    m_byte,
    n,
    on,
    off,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    OCTETS: tl.constexpr,
    UNIT_T: tl.constexpr,
):
    """Elements ``first + o_tile`` of a gradient times what was kept beside them, float32."""
    if MODE == BITS:
        b_off = tl.where(off != 0.0, b_grad * off, 0.0)
        b_y = tl.where(bit_of(p_kept, first, o_tile, m, o_byte, m_byte, OCTETS, UNIT_T) != 0, b_grad * on, b_off)
    elif MODE == ACTIVATION:
        b_y = b_grad * derivative(tl.load(p_kept + first + o_tile, mask=m, other=0.0).to(tl.float32), KIND)
    elif MODE == CODES:
        b_code = tl.load(p_kept + first + o_tile, mask=m, other=0).to(tl.int32)
        b_code |= tl.load(p_kept + n + first + o_tile, mask=m, other=0).to(tl.int32) << 8
        b_code |= tl.load(p_kept + 2 * n + first + o_tile, mask=m, other=0).to(tl.int32) << 16
        b_y = b_grad * (b_code.to(tl.float32) * 1.1920928955078125e-07 - 0.5)  # times 2^-23: exact
    elif MODE == LEVELS:
        plane = (n + 7) // 8
        b_code = bit_of(p_kept, first, o_tile, m, o_byte, m_byte, OCTETS, UNIT_T)
        b_code |= bit_of(p_kept + plane, first, o_tile, m, o_byte, m_byte, OCTETS, UNIT_T) << 1
        b_code |= bit_of(p_kept + 2 * plane, first, o_tile, m, o_byte, m_byte, OCTETS, UNIT_T) << 2
        b_y = b_grad * tl.load(p_table + b_code)
    else:
        b_y = b_grad * b_column[None, :]
    return b_y


@triton.jit(do_not_specialize=_SHAPE_ARGUMENTS)
def scale_kernel(
    p_grad,  # [B, T, p], T or p contiguous, without gaps
    p_kept,  # bits [ceil(n / 8)], x as grad, codes [3, n] or planes [3, ceil(n / 8)]; not read for COLUMNS
    p_table,  # levels [8] or factors of columns [p], float32; not read otherwise
    p_dx,  # as grad
    p_out,  # [B, splits, p] float32, not written unless SUM
    T,
    p,
    chunk,
    splits,
    tiles,
    stride_b,
    stride_t,
    stride_p,
    n,
    on: tl.float32,
    off: tl.float32,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    SUM: tl.constexpr,
    UNIT_T: tl.constexpr,
    WIDE: tl.constexpr,
    OCTETS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program scales ``chunk`` rows of ``BLOCK_P`` columns of one sample, and sums them as bias_grad_kernel does.

    What is summed is the rounded result, as the layer before would read it; for COLUMNS the gradient itself.
    Offsets within a tile are of 32 bits unless it is WIDE, and spans more elements than those can count.
    Example: [64, 512, 768] in bfloat16: tiles of 32 x 64, walked 16 times, 12 programs a sample.
    """
    i_program = tl.program_id(0)
    i_p = i_program % tiles
    i_s = (i_program // tiles) % splits
    i_b = (i_program // tiles // splits).to(tl.int64)

    stride_b = stride_b.to(tl.int64) // ALIGN * ALIGN
    n = n.to(tl.int64) // ALIGN * ALIGN
    t_first = i_s.to(tl.int64) * chunk
    t_count = tl.minimum(T - t_first, chunk).to(tl.int32)
    if UNIT_T:
        stride_t = 1
        stride_p = stride_p.to(tl.int64) // ALIGN * ALIGN
        t_first = t_first // ALIGN * ALIGN
        t_count = t_count // ALIGN * ALIGN
    else:
        stride_t = stride_t.to(tl.int64) // ALIGN * ALIGN
        stride_p = 1
        p = p // ALIGN * ALIGN

    o_t = tl.arange(0, BLOCK_T)
    o_column = tl.arange(0, BLOCK_P)
    o_p = i_p.to(tl.int64) * BLOCK_P + o_column
    m_p = o_p < p
    if WIDE:
        o_tile = o_t.to(tl.int64)[:, None] * stride_t + o_column.to(tl.int64)[None, :] * stride_p
    elif UNIT_T:
        o_tile = o_t[:, None] + o_column[None, :] * stride_p.to(tl.int32)
    else:
        o_tile = o_t[:, None] * stride_t.to(tl.int32) + o_column[None, :]
    first = i_b * stride_b + t_first * stride_t + i_p.to(tl.int64) * BLOCK_P * stride_p
    o_byte = o_tile
    if OCTETS and UNIT_T:
        o_t8 = tl.arange(0, BLOCK_T // 8)
        o_byte = o_t8[:, None] + o_column[None, :] * (stride_p // 8).to(o_tile.dtype)
    elif OCTETS:
        o_p8 = tl.arange(0, BLOCK_P // 8)
        o_byte = o_t[:, None] * (stride_t // 8).to(o_tile.dtype) + o_p8[None, :]
        m_p8 = i_p.to(tl.int64) * BLOCK_P + 8 * o_p8 < p
    b_column = o_column
    if MODE == COLUMNS:
        b_column = tl.load(p_table + o_p, mask=m_p, other=0.0)
    b_sum = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    for t in range(0, t_count, BLOCK_T):
        m = (o_t < t_count - t)[:, None] & m_p[None, :]
        m_byte = m
        if OCTETS and UNIT_T:
            m_byte = (8 * o_t8 < t_count - t)[:, None] & m_p[None, :]
        elif OCTETS:
            m_byte = (o_t < t_count - t)[:, None] & m_p8[None, :]
        b_grad = tl.load(p_grad + first + o_tile, mask=m, other=0.0).to(tl.float32)
        b_y = scaled(
            b_grad, p_kept, p_table, b_column, first, o_tile, m, o_byte, m_byte, n, on, off, MODE, KIND, OCTETS, UNIT_T
        )
        b_dx = rounded(b_y, p_dx.dtype.element_ty)
        tl.store(p_dx + first + o_tile, b_dx, mask=m)
        if SUM:
            b_sum += b_grad if MODE == COLUMNS else b_dx.to(tl.float32)
        first += BLOCK_T * stride_t
    if SUM:
        b_row = fold_tile(b_sum, UNIT_T, BLOCK_T, BLOCK_P)
        tl.store(p_out + (i_b * splits + i_s) * p + o_p, b_row, mask=m_p)


def _scale(
    grad: Tensor,
    reduce: int,
    mode: tl.constexpr,
    kept: Tensor | None = None,
    table: Tensor | None = None,
    kind: int = 0,
    on: float = 0.0,
    off: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One launch, and bias_grad's of the partial sums where the summed dimension is long."""
    batch, length, width = grad.shape
    dx = torch.empty_like(grad)
    shape = {0: (0,), 1: (batch, width), 2: (batch, length)}[reduce]
    if grad.numel() == 0:
        return dx, torch.zeros(shape, dtype=torch.float32, device=grad.device)
    # As bias_grad sees it: [B, T, p] with the sum along T. Nothing to sum: all elements in a row.
    view = grad if reduce == 1 else grad.transpose(1, 2) if reduce == 2 else grad.view(1, 1, grad.numel())
    plan = plan_bias_grad(view.shape, view.stride(), grad.element_size(), TILE)
    if plan.align == 1:
        # Each element takes an address and a mask of its own.
        plan = plan_bias_grad(view.shape, view.stride(), grad.element_size(), TILE // 2)
    unit, block = (view.shape[1], plan.block_t) if plan.unit == "t" else (view.shape[2], plan.block_p)
    octets = unit % 8 == 0 and view.stride(0) % 8 == 0 and block >= 8
    out_shape = (view.shape[0], plan.splits, view.shape[2]) if reduce else (0,)
    out = torch.empty(out_shape, dtype=torch.float32, device=grad.device)
    with on_device_of(grad):
        scale_kernel[(view.shape[0] * plan.splits * plan.tiles,)](
            *(grad, grad if kept is None else kept, out if table is None else table, dx, out),
            *(view.shape[1], view.shape[2], plan.chunk, plan.splits, plan.tiles, *view.stride(), grad.numel()),
            *(float(on), float(off)),
            MODE=mode.value,
            KIND=kind,
            SUM=reduce != 0,
            UNIT_T=plan.unit == "t",
            WIDE=plan.block_t * view.stride(1) + plan.block_p * view.stride(2) >= 2**31,
            OCTETS=mode.value in (BITS.value, LEVELS.value) and octets,
            ALIGN=plan.align,
            BLOCK_T=plan.block_t,
            BLOCK_P=plan.block_p,
            num_warps=4,
            maxnreg=128 if plan.align == 1 else None,  # there ptxas may aim at more blocks, and spill
            enable_fp_fusion=False,
        )
    return dx, bias_grad(out) if reduce and plan.splits > 1 else out.view(shape)


def _bytes(grad: Tensor) -> int:
    return cdiv(grad.numel(), 8)


def bit_scale(x: Tensor, bits: Tensor, on: float, off: float, reduce: int) -> tuple[Tensor, Tensor]:
    """``x`` [B, R, C] times ``on`` where the bit is set, else ``off`` (0 selects 0, whatever x holds) -> y, rows."""
    check_reduced("bit_scale", x, reduce)
    check_tensor("bit_scale", "bits", bits, torch.uint8, (_bytes(x),), x)
    return _scale(x, reduce, BITS, kept=bits, on=on, off=off)


def activation_grad(grad: Tensor, x: Tensor, kind: int, reduce: int) -> tuple[Tensor, Tensor]:
    """``grad`` [B, R, C] times the derivative of activation ``kind`` at ``x`` (same shape and dtype) -> dx, rows."""
    check_reduced("activation_grad", grad, reduce)
    check_float("activation_grad", "x", x)
    check_kind("activation_grad", kind)
    check_device("activation_grad", "x", x, grad)
    if x.shape != grad.shape or x.dtype != grad.dtype:
        raise OpError(f"activation_grad: x {x.dtype} {list(x.shape)} does not fit grad {grad.dtype} {list(grad.shape)}")
    return _scale(grad, reduce, ACTIVATION, kept=x, kind=kind)


def slope_scale(grad: Tensor, codes: Tensor, reduce: int) -> tuple[Tensor, Tensor]:
    """``grad`` float32 [B, R, C] times the derivatives in ``codes`` [3, B * R * C] of slope_pack -> dx, rows."""
    check_reduced("slope_scale", grad, reduce)
    if grad.dtype != torch.float32:
        raise OpError(f"slope_scale: grad must be float32, got {grad.dtype}")
    check_tensor("slope_scale", "codes", codes, torch.uint8, (3, grad.numel()), grad)
    return _scale(grad, reduce, CODES, kept=codes)


def level_scale(grad: Tensor, planes: Tensor, levels: Tensor, reduce: int) -> tuple[Tensor, Tensor]:
    """``grad`` [B, R, C] times ``levels`` [8] float32 at the codes in ``planes`` [3, ceil(n / 8)] -> dx, rows."""
    check_reduced("level_scale", grad, reduce)
    check_tensor("level_scale", "planes", planes, torch.uint8, (3, _bytes(grad)), grad)
    check_tensor("level_scale", "levels", levels, torch.float32, (8,), grad)
    return _scale(grad, reduce, LEVELS, kept=planes, table=levels)


def affine_grad(grad: Tensor, scale: Tensor, reduce: int) -> tuple[Tensor, Tensor]:
    """``grad`` [B, R, C] times ``scale`` ([C] with reduce 1, [R] with reduce 2) -> dx, and rows: sums of ``grad``."""
    check_reduced("affine_grad", grad, reduce)
    if reduce == 0:
        raise OpError("affine_grad: reduce must be 1 or 2, got 0")
    check_tensor("affine_grad", "scale", scale, torch.float32, (grad.shape[3 - reduce],), grad)
    return _scale(grad, reduce, COLUMNS, table=scale)
