"""Backward of LayerNorm and GroupNorm, with the per-sample sum of the gradient taken in the same visit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_bitfit_kernels._validate import OpError
from dp_bitfit_kernels.kernels.bias_grad import bias_grad, fold_tile
from dp_bitfit_kernels.kernels.checks import check_float, check_norm, check_reduced, check_tensor
from dp_bitfit_kernels.kernels.plan import alignment, cdiv, on_device_of, pow2_up
from dp_bitfit_kernels.kernels.rounding import rounded

# Elements of a tile of whole rows: 16 a thread, of which gradient, input and sum are kept, 48 registers.
ROWS_TILE = 2048
# Features up to which a row is held in registers, by 512 threads; wider rows are visited twice, as groups are.
WIDEST_ROW = 8192
# Rows of one program: the partial sums that it writes are then 2% of what it reads and writes.
CHUNK = 32
# Programs a sample worth having where rows are many, and tiles that one accumulator may chain.
TARGET_PROGRAMS = 64
LONGEST_CHAIN = 128
# Elements of a tile of a group: 16 each of up to 256 threads.
GROUP_TILE = 4096


@triton.jit(do_not_specialize=["R", "C", "chunk", "splits"])
def layer_norm_grad_kernel(
    p_grad,  # [B, R, C]
    p_x,  # [B, R, C], of grad's dtype or int8
    p_shift,  # [B, R] float32, not read unless HAS_SHIFT
    p_scale,  # [B, R] float32
    p_rstd,  # [B, R] float32
    p_weight,  # [C] float32, not read unless HAS_WEIGHT
    p_dx,  # [B, R, C]
    p_out,  # [B, splits, C] float32, not written unless SUM
    R,
    C,
    chunk,
    splits,
    HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUM: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program serves ``chunk`` rows of one sample, BLOCK_R whole rows at a time, which it reads once.

    Both means of a row are taken from registers; the gradient is added up column by column on the way.
    Example: C = 768 in bfloat16: two rows at a time, 16 steps a program, 16 programs for 512 rows.
    """
    i_s = tl.program_id(0) % splits
    i_b = (tl.program_id(0) // splits).to(tl.int64)
    inverse = 1.0 / C.to(tl.float32)
    C = C // ALIGN * ALIGN
    r_first = i_s.to(tl.int64) * chunk
    r_count = tl.minimum(R - r_first, chunk).to(tl.int32)
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(0, r_count, BLOCK_R):
        o_row = i_b * R + r_first + r + o_r
        m_r = o_r < r_count - r
        o = o_row[:, None] * C + o_c[None, :]
        m = m_r[:, None] & m_c[None, :]
        b_g = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)
        b_n = tl.load(p_x + o, mask=m, other=0).to(tl.float32)
        if SUM:
            b_sum += b_g
        if HAS_SHIFT:
            b_n -= tl.load(p_shift + o_row, mask=m_r, other=0.0)[:, None]
        b_n *= tl.load(p_scale + o_row, mask=m_r, other=0.0)[:, None]
        if HAS_WEIGHT:
            b_g *= tl.load(p_weight + o_c, mask=m_c, other=0.0)[None, :]
        b_mean = tl.sum(b_g, axis=1) * inverse
        b_along = tl.sum(b_g * b_n, axis=1) * inverse
        b_rstd = tl.load(p_rstd + o_row, mask=m_r, other=0.0)
        b_dx = b_rstd[:, None] * (b_g - b_mean[:, None] - b_n * b_along[:, None])
        tl.store(p_dx + o, rounded(b_dx, p_dx.dtype.element_ty), mask=m)
    if SUM:
        b_row = fold_tile(b_sum, False, BLOCK_R, BLOCK_C)
        tl.store(p_out + (i_b * splits + i_s) * C + o_c, b_row, mask=m_c)


@triton.jit
def group_tile(p_grad, p_x, b_weight, o, m, shift, scale):
    """A tile of the gradient, the same times weight, and of the normalised input."""
    b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)
    b_n = (tl.load(p_x + o, mask=m, other=0).to(tl.float32) - shift) * scale
    return b_grad, b_grad * b_weight[:, None], b_n


@triton.jit(do_not_specialize=["G", "K", "S"])
def group_norm_grad_kernel(
    p_grad,  # [B, G, K, S]
    p_x,  # [B, G, K, S], of grad's dtype or int8
    p_shift,  # [B, G] float32, not read unless HAS_SHIFT
    p_scale,  # [B, G] float32
    p_rstd,  # [B, G] float32
    p_weight,  # [G, K] float32, not read unless HAS_WEIGHT
    p_dx,  # [B, G, K, S]
    p_rows,  # [B, G, K] float32, not written unless SUM
    G,
    K,
    S,
    inverse: tl.float64,  # 1 / (K * S)
    HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SUM: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIT_K: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    CHAIN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program serves one group of one sample: K channels of S positions, tile by tile.

    Its first visit sums the gradient of each channel (which is its row) and its product with the normalised input:
    in float32 along at most CHAIN tiles, then in float64. The second visit, from cache or, where one tile is the
    WHOLE group, from registers, writes dx. UNIT_K: S is 1 and channels are neighbours.
    WIDE: a tile spans more elements than 32 bits count.
    Example: 8 channels of 28 x 28: one tile of 4 x 1024 for four channels, two of them, twice.
    """
    i_g = tl.program_id(0).to(tl.int64)
    i_c = (tl.program_id(0) % G).to(tl.int64) * K
    if UNIT_K:
        S = 1
        K = K.to(tl.int64) // ALIGN * ALIGN
    else:
        S = S.to(tl.int64) // ALIGN * ALIGN
    shift = 0.0
    if HAS_SHIFT:
        shift = tl.load(p_shift + i_g)
    scale = tl.load(p_scale + i_g)
    rstd = tl.load(p_rstd + i_g)
    o_k = tl.arange(0, BLOCK_K)
    o_s = tl.arange(0, BLOCK_S)
    first = i_g * K * S
    if WIDE:
        o_tile = o_k.to(tl.int64)[:, None] * S + o_s.to(tl.int64)[None, :]
    elif UNIT_K:
        o_tile = o_k[:, None] + o_s[None, :]
    else:
        o_tile = o_k[:, None] * S.to(tl.int32) + o_s[None, :]
    b_mean = tl.zeros([BLOCK_K], tl.float64)
    b_along = tl.zeros([BLOCK_K], tl.float64)
    b_weight = tl.full([BLOCK_K], 1.0, tl.float32)
    if WHOLE:
        m_k = o_k < K
        m = m_k[:, None] & (o_s < S)[None, :]
        if HAS_WEIGHT:
            b_weight = tl.load(p_weight + i_c + o_k, mask=m_k, other=0.0)
        b_grad, b_g, b_n = group_tile(p_grad + first, p_x + first, b_weight, o_tile, m, shift, scale)
        if SUM:
            tl.store(p_rows + i_g * K + o_k, tl.sum(b_grad, axis=1), mask=m_k)
        b_mean += tl.sum(b_g, axis=1).to(tl.float64)
        b_along += tl.sum(b_g * b_n, axis=1).to(tl.float64)
    else:
        for k in range(0, K, BLOCK_K):
            m_k = o_k < K - k
            if HAS_WEIGHT:
                b_weight = tl.load(p_weight + i_c + k + o_k, mask=m_k, other=0.0)
            b_row = tl.zeros([BLOCK_K], tl.float64)
            for far in range(0, S, CHAIN * BLOCK_S):
                b_sum = tl.zeros([BLOCK_K, BLOCK_S], tl.float32)
                b_product = tl.zeros([BLOCK_K, BLOCK_S], tl.float32)
                for s in range(far, tl.minimum(far + CHAIN * BLOCK_S, S), BLOCK_S):
                    m = m_k[:, None] & (o_s < S - s)[None, :]
                    o = (i_g * K + k) * S + s
                    b_grad, b_g, b_n = group_tile(p_grad + o, p_x + o, b_weight, o_tile, m, shift, scale)
                    b_sum += b_grad
                    b_product += b_g * b_n
                b_row += tl.sum(b_sum, axis=1).to(tl.float64)
                b_along += tl.sum(b_product, axis=1).to(tl.float64)
            if SUM:
                tl.store(p_rows + i_g * K + k + o_k, b_row.to(tl.float32), mask=m_k)
            b_mean += b_row * b_weight
    mean = (tl.sum(b_mean, axis=0) * inverse).to(tl.float32)
    along = (tl.sum(b_along, axis=0) * inverse).to(tl.float32)
    if WHOLE:
        tl.store(p_dx + first + o_tile, rounded(rstd * (b_g - mean - b_n * along), p_dx.dtype.element_ty), mask=m)
    else:
        for k in range(0, K, BLOCK_K):
            m_k = o_k < K - k
            if HAS_WEIGHT:
                b_weight = tl.load(p_weight + i_c + k + o_k, mask=m_k, other=0.0)
            for s in range(0, S, BLOCK_S):
                m = m_k[:, None] & (o_s < S - s)[None, :]
                o = (i_g * K + k) * S + s
                b_grad, b_g, b_n = group_tile(p_grad + o, p_x + o, b_weight, o_tile, m, shift, scale)
                b_dx = rstd * (b_g - mean - b_n * along)
                tl.store(p_dx + o + o_tile, rounded(b_dx, p_dx.dtype.element_ty), mask=m)


@triton.jit
def normal_tile(p_x, o, m, b_mean, b_rstd):
    """A tile of normalised values, 0 where there are none."""
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    return tl.where(m, (b_x - b_mean[:, None]) * b_rstd[:, None], 0.0)


@triton.jit
def largest_of(b_n):
    """Largest absolute value of each row; infinite where one is not a number, which a maximum may lose."""
    b_abs = tl.abs(b_n)
    return tl.max(tl.where(b_abs < float("inf"), b_abs, float("inf")), axis=1)


@triton.jit
def codes_of(b_n, b_scale):
    """floor(n / scale + 0.5) within [-127, 127], 0 for NaN: int8."""
    b_code = tl.floor(b_n / b_scale[:, None] + 0.5)
    b_code = tl.where(b_code == b_code, b_code, 0.0)
    return tl.where(b_code > 127.0, 127.0, tl.where(b_code < -127.0, -127.0, b_code)).to(tl.int8)


@triton.jit(do_not_specialize=["M", "N"])
def quantize_norm_kernel(
    p_x,  # [M, N]
    p_mean,  # [M] float32
    p_rstd,  # [M] float32
    p_codes,  # [M, N] int8
    p_scale,  # [M] float32
    M,
    N,
    WHOLE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program serves BLOCK_M rows: their largest values, then their codes, from registers if WHOLE, else visited
    a second time."""
    N = N.to(tl.int64) // ALIGN * ALIGN
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_n = tl.arange(0, BLOCK_N)
    b_mean = tl.load(p_mean + o_m, mask=m_m, other=0.0)
    b_rstd = tl.load(p_rstd + o_m, mask=m_m, other=0.0)
    o = o_m[:, None] * N + o_n[None, :]
    if WHOLE:
        m = m_m[:, None] & (o_n < N)[None, :]
        b_n = normal_tile(p_x, o, m, b_mean, b_rstd)
        b_largest = largest_of(b_n)
    else:
        b_largest = tl.zeros([BLOCK_M], tl.float32)
        for n in range(0, N, BLOCK_N):
            m = m_m[:, None] & (o_n < N - n)[None, :]
            b_here = largest_of(normal_tile(p_x, o + n, m, b_mean, b_rstd))
            b_largest = tl.where(b_here > b_largest, b_here, b_largest)
    b_scale = tl.where((b_largest > 0.0) & (b_largest < float("inf")), tl.div_rn(b_largest, 127.0), 1.0)
    tl.store(p_scale + o_m, b_scale, mask=m_m)
    if WHOLE:
        tl.store(p_codes + o, codes_of(b_n, b_scale), mask=m)
    else:
        for n in range(0, N, BLOCK_N):
            m = m_m[:, None] & (o_n < N - n)[None, :]
            tl.store(p_codes + o + n, codes_of(normal_tile(p_x, o + n, m, b_mean, b_rstd), b_scale), mask=m)


def layer_norm_grad(
    grad: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor, rstd: Tensor, weight: Tensor | None, reduce: int
) -> tuple[Tensor, Tensor]:
    """Input gradient of a LayerNorm over C, and the sum of ``grad`` over R (reduce 1).

    ``grad`` [B, R, C]; ``x`` as grad, or int8; ``shift`` (or None), ``scale``, ``rstd`` [B * R], ``weight`` [C] (or
    None) float32. With n = (x - shift) * scale and g = weight * grad: rstd * (g - mean(g) - n * mean(g * n)).
    """
    check_reduced("layer_norm_grad", grad, reduce)
    batch, length, width = grad.shape
    if reduce == 2:
        raise OpError("layer_norm_grad: reduce must be 0 or 1, got 2")
    values = {"shift": shift, "scale": scale, "rstd": rstd}
    check_norm("layer_norm_grad", grad, x, values, (batch * length,), weight)
    dx = torch.empty_like(grad)
    shape = (batch, width) if reduce else (0,)
    if grad.numel() == 0:
        return dx, torch.zeros(shape, dtype=torch.float32, device=grad.device)
    if width > WIDEST_ROW:
        _group_norm(dx, None, grad, x, shift, scale, rstd, weight, (1, width, 1))
        return dx, bias_grad(grad) if reduce else torch.empty(shape, dtype=torch.float32, device=grad.device)
    block_c = pow2_up(width)
    block_r = min(max(ROWS_TILE // block_c, 1), pow2_up(length))
    chunk = min(max(cdiv(length, TARGET_PROGRAMS), CHUNK), LONGEST_CHAIN * block_r)
    chunk = cdiv(chunk, block_r) * block_r
    splits = cdiv(length, chunk)
    out = torch.empty((batch, splits, width) if reduce else (0,), dtype=torch.float32, device=grad.device)
    with on_device_of(grad):
        layer_norm_grad_kernel[(batch * splits,)](
            *(grad, x, scale if shift is None else shift, scale, rstd, scale if weight is None else weight, dx, out),
            *(length, width, chunk, splits),
            HAS_SHIFT=shift is not None,
            HAS_WEIGHT=weight is not None,
            SUM=reduce == 1,
            ALIGN=alignment(1, width),
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=min(max(block_r * block_c // 512, 1), 16),
            enable_fp_fusion=False,
        )
    return dx, bias_grad(out) if reduce and splits > 1 else out.view(shape)


def group_norm_grad(
    grad: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Input gradient of a GroupNorm, and the sum of ``grad`` over positions.

    As :func:`layer_norm_grad` for ``grad`` [B, C, S], with means over the C / G channels and S positions of a group;
    ``shift``, ``scale``, ``rstd`` [B, G]; rows [B, C].
    """
    check_reduced("group_norm_grad", grad, 2)
    batch, channels, length = grad.shape
    groups = scale.shape[-1] if scale.dim() else 0
    if groups == 0 or channels % groups:
        raise OpError(f"group_norm_grad: {channels} channels cannot form {groups} groups")
    values = {"shift": shift, "scale": scale, "rstd": rstd}
    check_norm("group_norm_grad", grad, x, values, (batch, groups), weight)
    dx = torch.empty_like(grad)
    if grad.numel() == 0:
        return dx, torch.zeros((batch, channels), dtype=torch.float32, device=grad.device)
    rows = torch.empty((batch, channels), dtype=torch.float32, device=grad.device)
    _group_norm(dx, rows, grad, x, shift, scale, rstd, weight, (groups, channels // groups, length))
    return dx, rows


def _group_norm(
    dx: Tensor,
    rows: Tensor | None,
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    shape: tuple[int, int, int],
) -> None:
    """One launch; ``shape`` (G, K, S) of a sample, as many as ``scale`` has elements / G."""
    groups, channels, length = shape
    unit_k = length == 1
    block_s = min(pow2_up(length), 1024)
    block_k = min(pow2_up(channels), GROUP_TILE // block_s)
    with on_device_of(grad):
        group_norm_grad_kernel[(scale.numel(),)](
            *(grad, x, scale if shift is None else shift, scale, rstd, scale if weight is None else weight),
            *(dx, scale if rows is None else rows, groups, channels, length),
            1.0 / (channels * length),
            HAS_SHIFT=shift is not None,
            HAS_WEIGHT=weight is not None,
            SUM=rows is not None,
            WHOLE=channels <= block_k and length <= block_s,
            UNIT_K=unit_k,
            WIDE=block_k * length >= 2**31,
            ALIGN=alignment(1, channels if unit_k else length),
            CHAIN=LONGEST_CHAIN,
            BLOCK_K=block_k,
            BLOCK_S=block_s,
            num_warps=min(max(block_k * block_s // 512, 1), 8),
            maxnreg=128,  # without it ptxas may aim at more blocks and spill
            enable_fp_fusion=False,
        )


def quantize_norm(x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised rows (x - mean) * rstd of ``x`` [M, N] in 8 bits -> codes int8 [M, N], scale [M] float32."""
    check_float("quantize_norm", "x", x)
    if x.dim() != 2:
        raise OpError(f"quantize_norm: x must be [M, N], got {x.dim()} dimensions")
    check_tensor("quantize_norm", "mean", mean, torch.float32, x.shape[:1], x)
    check_tensor("quantize_norm", "rstd", rstd, torch.float32, x.shape[:1], x)
    count, width = x.shape
    codes = torch.empty_like(x, dtype=torch.int8)
    if x.numel() == 0:
        return codes, torch.ones((count,), dtype=torch.float32, device=x.device)
    scale = torch.empty((count,), dtype=torch.float32, device=x.device)
    block_n = min(pow2_up(width), GROUP_TILE)
    block_m = max(ROWS_TILE // block_n, 1)
    with on_device_of(x):
        quantize_norm_kernel[(cdiv(count, block_m),)](
            *(x, mean, rstd, codes, scale, count, width),
            WHOLE=width <= block_n,
            ALIGN=alignment(1, width),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=min(max(block_m * block_n // 512, 1), 8),
            enable_fp_fusion=False,
        )
    return codes, scale
