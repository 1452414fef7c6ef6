"""Release of the integer sum: Gaussian noise on the grid, added and scaled in one launch.

Logarithm, sine and cosine are written out (fdlibm's polynomials on an exactly reduced argument) and launched
without floating-point contraction: every backend gets the same bits. ``tl.cos`` in float64 would also spill.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_bitfit_kernels._validate import OpError
from dp_bitfit_kernels.kernels.chacha import BLOCKS, chacha_words, interleave_words, plan_words
from dp_bitfit_kernels.kernels.checks import NOISE_STD_LIMIT, check_stream, check_tensor
from dp_bitfit_kernels.kernels.plan import alignment, on_device_of

TWO_M61 = tl.constexpr(2.0**-61)
TWO_M64 = tl.constexpr(2.0**-64)
TWO_M12 = tl.constexpr(2.0**-12)
SQRT_2_BITS = tl.constexpr(0x3FF6A09E667F3BCD)
PI_4 = tl.constexpr(0.7853981633974483)
# fdlibm e_log.c
LN2_HI = tl.constexpr(6.93147180369123816490e-01)
LN2_LO = tl.constexpr(1.90821492927058770002e-10)
L1 = tl.constexpr(6.666666666666735130e-01)
L2 = tl.constexpr(3.999999999940941908e-01)
L3 = tl.constexpr(2.857142874366239149e-01)
L4 = tl.constexpr(2.222219843214978396e-01)
L5 = tl.constexpr(1.818357216161805012e-01)
L6 = tl.constexpr(1.531383769920937332e-01)
L7 = tl.constexpr(1.479819860511658591e-01)
# fdlibm k_sin.c, k_cos.c
S1 = tl.constexpr(-1.66666666666666324348e-01)
S2 = tl.constexpr(8.33333333332248946124e-03)
S3 = tl.constexpr(-1.98412698298579493134e-04)
S4 = tl.constexpr(2.75573137070700676789e-06)
S5 = tl.constexpr(-2.50507602534068634195e-08)
S6 = tl.constexpr(1.58969099521155010221e-10)
C1 = tl.constexpr(4.16666666666666019037e-02)
C2 = tl.constexpr(-1.38888888888741095749e-03)
C3 = tl.constexpr(2.48015872894767294178e-05)
C4 = tl.constexpr(-2.75573143513906633035e-07)
C5 = tl.constexpr(2.08757232129817482790e-09)
C6 = tl.constexpr(-1.13596475577881948265e-11)


@triton.jit
def log_uniform(b_word, b_next):
    """Natural logarithm of u, 2^76 u = 2^12 word + low 12 bits of the next word + 1: float64 from uint64.

    From 3/4 on by the distance 1 - u, so that small radii keep their relative precision.
    """
    near = (b_word >> 62) == 3
    low = (b_next & 0xFFF).to(tl.int64)
    rest = tl.where(near, 0xFFF - low, low + 1).to(tl.float64)
    v = (tl.where(near, ~b_word, b_word).to(tl.float64) + rest * TWO_M12) * TWO_M64
    bits = v.to(tl.int64, bitcast=True)
    m_bits = (bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000
    upper = m_bits >= SQRT_2_BITS  # as integers: Triton 3.6 rounds the constant of a float comparison to float32
    m = m_bits.to(tl.float64, bitcast=True)
    m = tl.where(upper, m * 0.5, m)
    k = ((bits >> 52) - 1023 + upper.to(tl.int64)).to(tl.float64)
    k = tl.where(near, 0.0, k)
    g = tl.where(near, -v, m - 1.0)
    q = g / (g + 2.0)
    w = q * q
    r = w * (L1 + w * (L2 + w * (L3 + w * (L4 + w * (L5 + w * (L6 + w * L7))))))
    h = (0.5 * g) * g
    return k * LN2_HI - ((h - (q * (h + r) + k * LN2_LO)) - g)


@triton.jit
def cos_sin_turn(b_word):
    """Cosine and sine of ``2 pi * a / 2^52``, a the upper 52 bits, the octant off exactly: float64 from uint64."""
    octant = (b_word >> 61).to(tl.int32)
    f = (b_word & 0x1FFFFFFFFFFFF000).to(tl.int64)
    f = tl.where((octant & 1) == 1, 0x2000000000000000 - f, f)
    x = (f.to(tl.float64) * TWO_M61) * PI_4
    z = x * x
    s = x + (x * z) * (S1 + z * (S2 + z * (S3 + z * (S4 + z * (S5 + z * S6)))))
    c = (1.0 - 0.5 * z) + (z * z) * (C1 + z * (C2 + z * (C3 + z * (C4 + z * (C5 + z * C6)))))
    swap = ((octant + 1) & 2) == 2  # octants 1, 2, 5, 6
    cos = tl.where(swap, s, c)
    sin = tl.where(swap, c, s)
    cos = tl.where(((octant + 2) & 4) == 4, -cos, cos)  # octants 2 to 5
    sin = tl.where(octant >= 4, -sin, sin)
    return cos, sin


@triton.jit(do_not_specialize=["stream", "block", "count"])
def noisy_sum_kernel(
    p_total,  # [count] int64
    p_key,  # [8] int32
    p_step,  # [1] int64
    p_out,  # [count] float32
    stream,
    block,
    skew,
    count,
    noise_std: tl.float64,
    scale: tl.float64,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program serves the elements of ``BLOCK`` key-stream blocks, eight normals each, eight elements a thread.

    Box-Muller takes the words 2i and 2i + 1 of a block to the normals of elements 2i (cosine) and 2i + 1 (sine).
    Counted by global element, so any cut of the vector into calls gives the same noise.
    """
    i_block = tl.program_id(0).to(tl.int64) * BLOCK
    b_counter = (block.to(tl.int64) + i_block + tl.arange(0, BLOCK)).to(tl.uint32)
    b_even, b_odd = chacha_words(p_key, p_step, stream, b_counter)
    b_radius = tl.sqrt(log_uniform(b_even, b_odd) * -2.0)
    b_cos, b_sin = cos_sin_turn(b_odd)
    b_normal = interleave_words(b_radius * b_cos, b_radius * b_sin, BLOCK)

    o_out = i_block * 8 + tl.arange(0, BLOCK * 8) - skew
    m_out = (o_out >= 0) & (o_out < count // ALIGN * ALIGN)
    b_total = tl.load(p_total + o_out, mask=m_out, other=0)
    b_total += tl.floor(b_normal * noise_std + 0.5).to(tl.int64)
    tl.store(p_out + o_out, (b_total.to(tl.float64) * scale).to(tl.float32), mask=m_out)


def noisy_sum(
    total: Tensor, key: Tensor, step: Tensor, stream: int, first: int, noise_std: float, scale: float
) -> Tensor:
    """``float32(double(total + round(noise_std * z)) * scale)`` -> [P] float32, for ``total`` [P] int64.

    z are standard normals from the ChaCha20 stream of ``key`` [8] int32 and ``step`` [1] int64; element j is number
    ``first + j`` of the stream.
    """
    out = torch.empty((total.numel(),), dtype=torch.float32, device=total.device)
    _write("noisy_sum", out, total, key, step, stream, first, noise_std, scale)
    return out


def noisy_sum_(
    release: Tensor,
    total: Tensor,
    key: Tensor,
    step: Tensor,
    stream: int,
    first: int,
    noise_std: float,
    scale: float,
) -> None:
    """As :func:`noisy_sum`, written into ``release`` [P] float32, neighbours in memory."""
    check_tensor("noisy_sum_", "release", release, torch.float32, (total.numel(),), total)
    _write("noisy_sum_", release, total, key, step, stream, first, noise_std, scale)


def _write(
    op: str,
    out: Tensor,
    total: Tensor,
    key: Tensor,
    step: Tensor,
    stream: int,
    first: int,
    noise_std: float,
    scale: float,
) -> None:
    count = total.numel()
    check_tensor(op, "total", total, torch.int64, (count,), key)
    check_stream(op, key, step, stream, first, count)
    if not 0.0 <= noise_std <= NOISE_STD_LIMIT:
        raise OpError(f"{op}: noise_std must lie in [0, 2^40], got {noise_std}")
    if count == 0:
        return
    block, skew, programs = plan_words(first, count)
    with on_device_of(total):
        noisy_sum_kernel[(programs,)](
            total,
            key,
            step,
            out,
            stream,
            block,
            skew,
            count,
            float(noise_std),
            float(scale),
            ALIGN=alignment(out.element_size(), count),
            BLOCK=BLOCKS,
            num_warps=4,
            enable_fp_fusion=False,
        )
