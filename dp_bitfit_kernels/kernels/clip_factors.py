"""Clip factors: float64 norms of every row and clipping group, then one factor each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_bitfit_kernels.kernels.checks import check_rows, check_tensor
from dp_bitfit_kernels.kernels.plan import alignment, cdiv, on_device_of, pow2_up

# Columns of one program: 128 threads with 16 elements each, four 16-byte loads in flight a thread. Fixed, so that
# a norm has the same bits in every batch.
TILE = 2048


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
    ONE_GROUP: tl.constexpr,
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
    if ONE_GROUP:
        tl.store(p_slot, tl.sum(b_square, axis=0))
    else:
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


@triton.jit(do_not_specialize=["L", "slots"])
def norms_kernel(
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
    ONE_GROUP: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds up the shares of one row's group; with a single group it also writes the factor."""
    i_program = tl.program_id(0)
    i_l = i_program % L
    i_b = (i_program // L).to(tl.int64)
    begin = tl.load(p_offsets + i_l)
    end = tl.load(p_offsets + i_l + 1)
    p_slot = p_partial + i_b * slots + i_l
    o_k = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float64)
    if end > begin:
        last = (end - 1) // TILE_WIDTH + 1
        for k in range(begin // TILE_WIDTH, last, BLOCK):
            b_sum += tl.load(p_slot + k + o_k, mask=k + o_k < last, other=0.0)
    square = tl.sum(b_sum, axis=0)
    if HAS_EXTRA:
        square += tl.load(p_extra + i_b * L + i_l)
    norm = tl.sqrt(square) * scale
    tl.store(p_norms + i_b * L + i_l, norm)
    if ONE_GROUP:
        keep = tl.load(p_mask + i_b).to(tl.int1) & (tl.abs(norm) < float("inf"))
        factor = select_factor(norm, tl.load(p_bounds), tl.load(p_grid), keep, scale, gamma, FLAT)
        tl.store(p_factors + i_b, factor)


@triton.jit(do_not_specialize=["L"])
def factors_kernel(
    p_norms,  # [B, L] float64
    p_mask,  # [B] bool
    p_bounds,  # [L] float64
    p_grid,  # [L] float64
    p_factors,  # [B, L] float64
    L,
    scale: tl.float64,
    gamma: tl.float64,
    FLAT: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program writes the factors of one row: one non-finite norm drops the whole row."""
    i_b = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, BLOCK_L)
    m_l = o_l < L
    b_norm = tl.load(p_norms + i_b * L + o_l, mask=m_l, other=0.0)
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
    tiles = cdiv(width, TILE)
    slots = tiles + groups - 1
    partial = torch.empty((batch, slots), dtype=torch.float64, device=rows.device)
    extra = norms if extra_squares is None else extra_squares
    one_group = groups == 1
    flat = gamma is None
    with on_device_of(rows):
        if tiles:
            squares_kernel[(batch * tiles,)](
                rows,
                offsets,
                partial,
                width,
                groups,
                tiles,
                rows.stride(0),
                slots,
                ONE_GROUP=one_group,
                ALIGN=alignment(rows.element_size(), width, rows.stride(0)),
                BLOCK=TILE,
                BLOCK_L=pow2_up(groups),
                num_warps=4,
                enable_fp_fusion=False,
            )
        norms_kernel[(batch * groups,)](
            partial,
            offsets,
            mask,
            bounds,
            grid,
            extra,
            factors,
            norms,
            groups,
            slots,
            float(scale),
            0.0 if gamma is None else float(gamma),
            FLAT=flat,
            HAS_EXTRA=extra_squares is not None,
            ONE_GROUP=one_group,
            TILE_WIDTH=TILE,
            BLOCK=256,
            num_warps=4,
            enable_fp_fusion=False,
        )
        if not one_group:
            factors_kernel[(batch,)](
                norms,
                mask,
                bounds,
                grid,
                factors,
                groups,
                float(scale),
                0.0 if gamma is None else float(gamma),
                FLAT=flat,
                BLOCK_L=pow2_up(groups),
                num_warps=4,
                enable_fp_fusion=False,
            )
    return factors, norms
