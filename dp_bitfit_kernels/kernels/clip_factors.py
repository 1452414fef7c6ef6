"""Clip factors: float64 norms of every row and clipping group, then one factor each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_bitfit_kernels._validate import check_clip_scales
from dp_bitfit_kernels.kernels.checks import check_rows, check_tensor
from dp_bitfit_kernels.kernels.plan import alignment, cdiv, on_device_of, pow2_up

# Columns of one program: 128 threads with 16 elements each, four 16-byte loads in flight a thread. Fixed, so that
# a norm has the same bits in every batch.
TILE = 2048
# Of a whole row: 512 threads with 16 elements each, 32 KiB in flight a multiprocessor.
ROW_TILE = 8192


@triton.jit(do_not_specialize=["P", "L", "tiles", "stride_r", "slots"])
def squares_kernel(
    p_rows,  # [B, P] float32
    p_offsets,  # [L + 1] int64
    p_partial,  # [B, slots] float64, slots = tiles + L - 1
    P,
    L,
    tiles,
    stride_r,
    slots,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program squares ``BLOCK`` columns of one row and writes a sum for every group that they touch.

    The tiles are cut without regard to the groups, so loads stay aligned and programs equal. Group l's share of
    tile k goes to slot k + l: along the columns either k or l grows, so no two shares meet in a slot.
    Example: BLOCK = 4, groups 0:3, 3:9. Tile 0 holds group 0 (slot 0) and group 1 (slot 1); tiles 1 and 2 hold
    group 1 (slots 2 and 3).
    """
    i_program = tl.program_id(0)
    i_k = i_program % tiles
    i_b = (i_program // tiles).to(tl.int64)
    first = i_k.to(tl.int64) * BLOCK
    o_p = first + tl.arange(0, BLOCK)
    stride_r = stride_r.to(tl.int64) // ALIGN * ALIGN
    P = P // ALIGN * ALIGN
    b_x = tl.load(p_rows + i_b * stride_r + o_p, mask=o_p < P, other=0.0).to(tl.float64)
    b_square = b_x * b_x
    p_slot = p_partial + i_b * slots + i_k
    o_l = tl.arange(0, BLOCK_L)
    b_begin = tl.load(p_offsets + o_l, mask=o_l < L, other=9223372036854775807)
    i_l = tl.sum((b_begin <= first).to(tl.int32), axis=0) - 1
    last = tl.sum((b_begin < tl.minimum(first + BLOCK, P)).to(tl.int32), axis=0)
    while i_l < last:
        begin = tl.load(p_offsets + i_l)
        end = tl.load(p_offsets + i_l + 1)
        m_group = (o_p >= begin) & (o_p < end)
        tl.store(p_slot + i_l, tl.sum(tl.where(m_group, b_square, 0.0), axis=0))
        i_l += 1


@triton.jit
def select_factor(norm, bound, grid, keep, scale, gamma, FLAT: tl.constexpr):
    """``grid * scale / max(norm, bound)`` or ``grid * scale / (norm + gamma)`` where ``keep``, else exactly 0.0."""
    if FLAT:
        # tl.where, not tl.maximum: what a maximum makes of NaN differs between platforms.
        denominator = tl.where(norm > bound, norm, bound)
    else:
        denominator = norm + gamma
    factor = grid * scale / denominator
    return tl.where(keep, factor, 0.0)


@triton.jit(do_not_specialize=["P", "stride_r"])
def row_kernel(
    p_rows,  # [B, P] float32
    p_mask,  # [B] bool
    p_bounds,  # [1] float64
    p_grid,  # [1] float64
    p_extra,  # [B, 1] float64, not read unless HAS_EXTRA
    p_factors,  # [B, 1] float64
    p_norms,  # [B, 1] float64
    P,
    stride_r,
    scale: tl.float64,
    gamma: tl.float64,
    FLAT: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A single group: one program squares its row, whole, and writes the factor, in one launch.

    Example: P = 300,000: 37 tiles of 8,192, 16 elements a thread, folded once at the end.
    """
    i_b = tl.program_id(0).to(tl.int64)
    stride_r = stride_r.to(tl.int64) // ALIGN * ALIGN
    P = P // ALIGN * ALIGN
    o_p = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float64)
    for p in range(0, P, BLOCK):
        b_x = tl.load(p_rows + i_b * stride_r + p + o_p, mask=o_p < P - p, other=0.0).to(tl.float64)
        b_sum += b_x * b_x
    square = tl.sum(b_sum, axis=0)
    if HAS_EXTRA:
        square += tl.load(p_extra + i_b)
    norm = tl.sqrt(square) * scale
    keep = tl.load(p_mask + i_b).to(tl.int1) & (tl.abs(norm) < float("inf"))
    tl.store(p_norms + i_b, norm)
    factor = select_factor(norm, tl.load(p_bounds), tl.load(p_grid), keep, scale, gamma, FLAT)
    tl.store(p_factors + i_b, factor)


@triton.jit(do_not_specialize=["L", "slots"])
def groups_kernel(
    p_partial,  # [B, slots] float64
    p_offsets,  # [L + 1] int64
    p_mask,  # [B] bool
    p_bounds,  # [L] float64
    p_grid,  # [L] float64
    p_extra,  # [B, L] float64, not read unless HAS_EXTRA
    p_factors,  # [B, L] float64
    p_norms,  # [B, L] float64
    L,
    slots,
    scale: tl.float64,
    gamma: tl.float64,
    FLAT: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program adds up the shares of all groups of one row, side by side, and writes its norms and factors.

    One norm that is not finite drops the whole row.
    """
    i_b = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, BLOCK_L)
    m_l = o_l < L
    b_begin = tl.load(p_offsets + o_l, mask=m_l, other=0)
    b_end = tl.load(p_offsets + o_l + 1, mask=m_l, other=0)
    b_first = b_begin // TILE_WIDTH
    b_shares = tl.where(b_end > b_begin, (b_end - 1) // TILE_WIDTH + 1 - b_first, 0)
    p_slot = p_partial + i_b * slots + b_first + o_l
    b_square = tl.zeros([BLOCK_L], tl.float64)
    for k in range(tl.max(b_shares, axis=0)):
        b_square += tl.load(p_slot + k, mask=k < b_shares, other=0.0)
    if HAS_EXTRA:
        b_square += tl.load(p_extra + i_b * L + o_l, mask=m_l, other=0.0)
    b_norm = tl.sqrt(b_square) * scale
    tl.store(p_norms + i_b * L + o_l, b_norm, mask=m_l)
    finite = tl.sum((tl.abs(b_norm) < float("inf")).to(tl.int32), axis=0)
    keep = tl.load(p_mask + i_b).to(tl.int1) & (finite == BLOCK_L)
    b_bound = tl.load(p_bounds + o_l, mask=m_l, other=1.0)
    b_grid = tl.load(p_grid + o_l, mask=m_l, other=0.0)
    b_factor = select_factor(b_norm, b_bound, b_grid, keep, scale, gamma, FLAT)
    tl.store(p_factors + i_b * L + o_l, b_factor, mask=m_l)


def clip_factors(
    rows: Tensor,
    offsets: Tensor,
    mask: Tensor,
    bounds: Tensor,
    grid: Tensor,
    extra_squares: Tensor | None,
    scale: float,
    gamma: float | None,
) -> tuple[Tensor, Tensor]:
    """Factors and norms, both [B, L] float64, of ``rows`` [B, P] float32 with groups ``offsets`` [L + 1] int64.

    ``norm = scale * sqrt(sum of squares + extra_squares)``; ``factor = grid * scale / max(norm, bounds)``, or
    ``grid * scale / (norm + gamma)`` when ``gamma`` is given. All factors of a row are exactly 0.0 where ``mask``
    [B] is False or any of its norms is not finite.
    """
    check_rows("clip_factors", rows)
    check_clip_scales(scale, gamma)
    batch, width = rows.shape
    groups = bounds.shape[0]
    check_tensor("clip_factors", "offsets", offsets, torch.int64, (groups + 1,), rows)
    check_tensor("clip_factors", "mask", mask, torch.bool, (batch,), rows)
    check_tensor("clip_factors", "bounds", bounds, torch.float64, (groups,), rows)
    check_tensor("clip_factors", "grid", grid, torch.float64, (groups,), rows)
    if extra_squares is not None:
        check_tensor("clip_factors", "extra_squares", extra_squares, torch.float64, (batch, groups), rows)
    factors = torch.empty((batch, groups), dtype=torch.float64, device=rows.device)
    norms = torch.empty_like(factors)
    if batch == 0 or groups == 0:
        return factors, norms
    extra = norms if extra_squares is None else extra_squares
    options = {"FLAT": gamma is None, "HAS_EXTRA": extra_squares is not None, "enable_fp_fusion": False}
    scales = (float(scale), 0.0 if gamma is None else float(gamma))
    align = alignment(rows.element_size(), width, rows.stride(0))
    if groups == 1:
        with on_device_of(rows):
            row_kernel[(batch,)](
                *(rows, mask, bounds, grid, extra, factors, norms, width, rows.stride(0)),
                *scales,
                ALIGN=align,
                BLOCK=min(ROW_TILE, pow2_up(width)),
                num_warps=16,
                **options,
            )
        return factors, norms
    tiles = cdiv(width, TILE)
    slots = tiles + groups - 1
    partial = torch.empty((batch, slots), dtype=torch.float64, device=rows.device)
    with on_device_of(rows):
        if tiles:
            squares_kernel[(batch * tiles,)](
                *(rows, offsets, partial, width, groups, tiles, rows.stride(0), slots),
                ALIGN=align,
                BLOCK=TILE,
                BLOCK_L=pow2_up(groups),
                num_warps=4,
                enable_fp_fusion=False,
            )
        groups_kernel[(batch,)](
            *(partial, offsets, mask, bounds, grid, extra, factors, norms, groups, slots),
            *scales,
            TILE_WIDTH=TILE,
            BLOCK_L=pow2_up(groups),
            num_warps=4,
            **options,
        )
    return factors, norms
