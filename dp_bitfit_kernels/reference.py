"""PyTorch specification of every op: the oracle for the compiled and the Triton backend.

Tensor operations only, on any device, without a host synchronisation or a data-dependent shape, so
that it is also a working backend. 32-bit words are carried in int64 and masked. Integer arithmetic,
random words and the noise are defined here to the bit; the other backends must reproduce them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._validate import OpError, check_clip_scales, check_one_device

_MASK32 = 0xFFFFFFFF
_WORDS_PER_BLOCK = 8  # 64-bit words in one 64-byte ChaCha20 block
_BLOCK_LIMIT = 2**32
# Blocks and elements handled at once: the temporaries then stay in a CPU's second-level cache.
_BLOCKS_AT_ONCE = 8192
_ELEMENTS_AT_ONCE = 8 * _BLOCKS_AT_ONCE
_VALUES_AT_ONCE = 1 << 22  # elements of a float64 copy of the rows
# Above this a float64 no longer holds noise_std * z + 0.5 to a small part of one grid cell.
_NOISE_STD_LIMIT = 2.0**40

_SIGMA = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"

# fdlibm e_log.c, k_sin.c and k_cos.c (Sun Microsystems, 1993)
_LN2_HI = 6.93147180369123816490e-01
_LN2_LO = 1.90821492927058770002e-10
_LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
_SIN = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
_COS = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)
_LOW_BITS = 2**12 - 1  # of an angle's word: they lengthen the radius's word
_SQRT2 = math.sqrt(2.0)  # as float64: 0x3FF6A09E667F3BCD
_PI_4 = math.pi / 4


def bias_grad(grad: Tensor) -> Tensor:
    """Sum of ``grad`` [B, T, p] (any strides) over T -> [B, p] float32; float64 stays float64.

    Summed in float64 and rounded once.
    """
    if grad.dim() != 3:
        raise OpError(f"bias_grad: grad must be [B, T, p], got {grad.dim()} dimensions")
    if not grad.dtype.is_floating_point:
        raise OpError(f"bias_grad: grad must be floating point, got {grad.dtype}")
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.sum(1, dtype=torch.float64).to(dtype)


def bias_grad_(rows: Tensor, grad: Tensor) -> None:
    """``rows`` [B, p] += sum of ``grad`` [B, T, p] over T, in place."""
    if grad.dim() != 3 or rows.shape != (grad.shape[0], grad.shape[2]):
        raise OpError(f"bias_grad_: rows {tuple(rows.shape)} does not fit grad {tuple(grad.shape)}")
    check_one_device("bias_grad_", rows, grad)
    rows.add_(bias_grad(grad))


def _check_rows(op: str, rows: Tensor, offsets: Tensor, groups: int) -> None:
    if rows.dim() != 2 or not rows.dtype.is_floating_point:
        raise OpError(f"{op}: rows must be a floating point [B, P], got {rows.dtype} {tuple(rows.shape)}")
    if offsets.dtype != torch.int64 or offsets.shape != (groups + 1,):
        raise OpError(f"{op}: offsets must be int64 [{groups + 1}], got {offsets.dtype} {tuple(offsets.shape)}")


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
    """Factors that bring each row onto the integer grid, and the group norms; both [B, L] float64.

    ``rows`` [B, P], ``offsets`` [L + 1] int64 (group l is columns ``offsets[l]:offsets[l + 1]``),
    ``mask`` [B] bool, ``bounds`` and ``grid`` [L] float64, ``extra_squares`` [B, L] float64 or None.

    Guarantee: with ``n = scale * sqrt(sum of squares)`` in float64, a factor is
    ``grid * scale / max(n, bound)`` (``gamma`` None) or ``grid * scale / (n + gamma)``, hence
    ``factor * sqrt(sum of squares) <= grid`` up to float64 rounding. All factors of a row that is masked
    out, or any of whose norms is NaN or infinite, are exactly 0: selected, never multiplied.
    """
    groups = bounds.shape[0]
    check_one_device("clip_factors", rows, offsets, mask, bounds, grid, extra_squares)
    check_clip_scales(scale, gamma)
    _check_rows("clip_factors", rows, offsets, groups)
    batch = rows.shape[0]
    if mask.dtype != torch.bool or mask.shape != (batch,):
        raise OpError(f"clip_factors: mask must be bool [{batch}], got {mask.dtype} {tuple(mask.shape)}")
    for name, tensor in (("bounds", bounds), ("grid", grid)):
        if tensor.dtype != torch.float64 or tensor.shape != (groups,):
            raise OpError(f"clip_factors: {name} must be float64 [{groups}], got {tensor.dtype} {tuple(tensor.shape)}")
    if extra_squares is not None and extra_squares.shape != (batch, groups):
        raise OpError(f"clip_factors: extra_squares must be [{batch}, {groups}], got {tuple(extra_squares.shape)}")

    parts = [_group_squares(part, offsets) for part in torch.split(rows, _rows_at_once(rows))]
    squares = torch.cat(parts) if parts else rows.new_zeros((0, groups), dtype=torch.float64)
    if extra_squares is not None:
        squares = squares + extra_squares
    norms = squares.sqrt() * scale  # [B, L]
    keep = mask & norms.isfinite().all(1)  # [B]
    denominator = torch.maximum(norms, bounds) if gamma is None else norms + gamma
    factors = torch.where(keep.unsqueeze(1), grid * scale / denominator, 0.0)
    return factors, norms


def _rows_at_once(rows: Tensor) -> int:
    return max(1, _VALUES_AT_ONCE // max(1, rows.shape[1]))


def _group_squares(rows: Tensor, offsets: Tensor) -> Tensor:
    """Sums of squares of ``rows`` [B, P] within each column group -> [B, L] float64."""
    squares = rows.to(torch.float64).square()
    if offsets.shape[0] == 2:
        return squares.sum(1, keepdim=True)
    # unsafe=True: no check of the offsets' values, which would synchronise the host
    ends = offsets.expand(rows.shape[0], -1).contiguous()
    return torch.segment_reduce(squares, "sum", offsets=ends, axis=1, unsafe=True, initial=0)


def _column_groups(offsets: Tensor, columns: int) -> Tensor:
    """Group number of each column -> [P] int64."""
    return torch.searchsorted(offsets[1:], torch.arange(columns, device=offsets.device), right=True)


def clipped_sum_(total: Tensor, rows: Tensor, offsets: Tensor, factors: Tensor) -> None:
    """``total`` [P] int64 += sum over rows of floor(row * factor + 0.5), in place.

    ``rows`` [B, P], ``offsets`` [L + 1] int64, ``factors`` [B, L] float64.

    Guarantee: the sum is exact, so it does not depend on the order of the rows nor on how they are
    split over calls; a row whose factor is exactly 0 adds exactly 0, whatever it holds.
    """
    check_one_device("clipped_sum_", total, rows, offsets, factors)
    _check_rows("clipped_sum_", rows, offsets, factors.shape[-1])
    if factors.dtype != torch.float64 or factors.shape != (rows.shape[0], offsets.shape[0] - 1):
        raise OpError(
            f"clipped_sum_: factors must be float64 [{rows.shape[0]}, {offsets.shape[0] - 1}], "
            f"got {factors.dtype} {tuple(factors.shape)}"
        )
    if total.dtype != torch.int64 or total.shape != (rows.shape[1],):
        raise OpError(f"clipped_sum_: total must be int64 [{rows.shape[1]}], got {total.dtype} {tuple(total.shape)}")
    columns = None if factors.shape[1] == 1 else _column_groups(offsets, rows.shape[1])
    at_once = _rows_at_once(rows)
    for part, factor in zip(torch.split(rows, at_once), torch.split(factors, at_once), strict=True):
        column_factor = factor if columns is None else factor.index_select(1, columns)
        scaled = part.to(torch.float64) * column_factor
        scaled = torch.where(column_factor == 0.0, 0.0, scaled)
        total.add_(scaled.add_(0.5).floor_().to(torch.int64).sum(0))


def random_words(key: Tensor, step: Tensor, stream: int, first: int, count: int) -> Tensor:
    """64-bit words ``first`` to ``first + count - 1`` of a ChaCha20 (RFC 8439) key stream -> [count] int64.

    ``key`` [8] int32 (little-endian words as bit patterns), ``step`` [1] int64. Nonce = step (64 bits,
    little endian) || stream (32 bits); block counter = index // 8; word i of a block is its state words
    2i (low half) and 2i + 1 (high half).

    Guarantee: a pure function of (key, step, stream, index); two different (step, stream, index) never
    share key-stream bytes, because the nonce holds step and stream whole and the counter cannot wrap.
    """
    check_one_device("random_words", key, step)
    if key.dtype != torch.int32 or key.shape != (8,):
        raise OpError(f"random_words: key must be int32 [8], got {key.dtype} {tuple(key.shape)}")
    if step.dtype != torch.int64 or step.shape != (1,):
        raise OpError(f"random_words: step must be int64 [1], got {step.dtype} {tuple(step.shape)}")
    if not 0 <= stream < 2**32:
        raise OpError(f"random_words: stream must lie in [0, 2^32), got {stream}")
    if first < 0 or count < 0 or first + count > _BLOCK_LIMIT * _WORDS_PER_BLOCK:
        raise OpError(f"random_words: words {first} to {first + count} are outside the 2^32 blocks of a nonce")
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=key.device)
    begin = first // _WORDS_PER_BLOCK
    end = (first + count - 1) // _WORDS_PER_BLOCK + 1
    parts = [
        _chacha_blocks(key, step, stream, block, min(block + _BLOCKS_AT_ONCE, end))
        for block in range(begin, end, _BLOCKS_AT_ONCE)
    ]
    words = parts[0] if len(parts) == 1 else torch.cat(parts)
    return words.narrow(0, first - begin * _WORDS_PER_BLOCK, count)


def _chacha_blocks(key: Tensor, step: Tensor, stream: int, begin: int, end: int) -> Tensor:
    """Blocks ``begin`` to ``end - 1`` of the key stream -> [8 * (end - begin)] int64.

    The 4 x 4 state of every block is four tensors [4, blocks]: a quarter round on whole rows does the
    four columns at once, and turning rows 1 to 3 brings the diagonals into columns.
    """
    counter = torch.arange(begin, end, dtype=torch.int64, device=key.device)
    words = key.to(torch.int64).bitwise_and(_MASK32).unsqueeze(1).expand(8, counter.shape[0])
    step_low, step_high = step & _MASK32, (step >> 32) & _MASK32
    last = torch.stack(
        [counter, step_low.expand_as(counter), step_high.expand_as(counter), torch.full_like(counter, stream)]
    )
    constants = torch.stack([torch.full_like(counter, word) for word in _SIGMA])
    start = (constants, words[:4], words[4:], last)
    a, b, c, d = (row.clone() for row in start)
    for _ in range(10):
        _quarter_round(a, b, c, d)
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
        _quarter_round(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    state = torch.cat([a, b, c, d]).add_(torch.cat(start)).bitwise_and_(_MASK32)  # [16, blocks]
    return (state[0::2] | (state[1::2] << 32)).t().reshape(-1)


def _quarter_round(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """RFC 8439 section 2.1 on int64 tensors that hold 32-bit words, in place."""
    for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x.add_(y).bitwise_and_(_MASK32)
        z.bitwise_xor_(x)
        high = z << bits
        z.bitwise_right_shift_(32 - bits).bitwise_or_(high).bitwise_and_(_MASK32)


def noisy_sum(
    total: Tensor, key: Tensor, step: Tensor, stream: int, first: int, noise_std: float, scale: float
) -> Tensor:
    """(total + round(noise_std * z)) * scale -> [P] float32, z standard normal; the only release.

    ``total`` [P] int64, ``key`` [8] int32, ``step`` [1] int64. Element j has global index
    ``first + j``; even and odd neighbours share two words (Box-Muller), so any slice of the vector can
    be drawn on its own.

    Guarantee: since ``total`` is an integer, total + round(noise_std * z) is a rounding of the continuous
    Gaussian mechanism of standard deviation ``noise_std``, hence post-processing of it, up to the numerical
    slack that ``noise.delta_slack`` bounds. Noise is a pure function of (key, step, stream, index).
    ``noise_std`` = 0 releases ``total`` itself.
    """
    check_one_device("noisy_sum", total, key, step)
    if total.dtype != torch.int64 or total.dim() != 1:
        raise OpError(f"noisy_sum: total must be int64 [P], got {total.dtype} {tuple(total.shape)}")
    if not 0.0 <= noise_std <= _NOISE_STD_LIMIT:
        raise OpError(f"noisy_sum: noise_std must lie in [0, 2^40], got {noise_std}")
    count = total.shape[0]
    if first < 0 or first + count > _BLOCK_LIMIT * _WORDS_PER_BLOCK:
        raise OpError(f"noisy_sum: elements {first} to {first + count} are outside the 2^32 blocks of a nonce")
    if noise_std == 0.0:
        return (total.to(torch.float64) * scale).to(torch.float32)
    released = torch.empty(count, dtype=torch.float32, device=total.device)
    for begin in range(0, count, _ELEMENTS_AT_ONCE):
        part = total[begin : begin + _ELEMENTS_AT_ONCE]
        noise = standard_normal(key, step, stream, first + begin, part.shape[0]).mul_(noise_std).add_(0.5).floor_()
        noisy = part + noise.to(torch.int64)
        released[begin : begin + _ELEMENTS_AT_ONCE] = (noisy.to(torch.float64) * scale).to(torch.float32)
    return released


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
    check_one_device("noisy_sum_", release, total, key, step)
    if release.dtype != torch.float32 or release.shape != total.shape or not release.is_contiguous():
        raise OpError(
            f"noisy_sum_: release must be contiguous float32 {list(total.shape)}, got {release.dtype} "
            f"{list(release.shape)} with strides {list(release.stride())}"
        )
    release.copy_(noisy_sum(total, key, step, stream, first, noise_std, scale))


def standard_normal(key: Tensor, step: Tensor, stream: int, first: int, count: int) -> Tensor:
    """Standard normals with global indices ``first`` to ``first + count - 1`` -> [count] float64.

    Box-Muller in float64 on a uniform of 76 bits for the radius (a word and the 12 low bits of the next) and one of
    52 bits for the angle (the rest of that): |z| reaches sqrt(152 ln 2) = 10.26. Errors: see ``noise.delta_slack``.
    """
    begin = first & ~1
    end = (first + count + 1) & ~1
    words = random_words(key, step, stream, begin, end - begin).view(-1, 2)
    radius = (log_uniform(words[:, 0], words[:, 1] & _LOW_BITS) * -2.0).sqrt_()
    sine, cosine = sin_cos(words[:, 1])
    pairs = torch.stack([radius * cosine, radius * sine], 1)  # [pairs, 2]: even index, odd index
    return pairs.view(-1)[first - begin : first - begin + count]


def log_uniform(word: Tensor, low: Tensor) -> Tensor:
    """ln u of u = (2^12 word + low + 1) / 2^76 -> float64, in [-76 ln 2, 0].

    ``word`` unsigned 64-bit words given as int64, ``low`` int64 in [0, 2^12). From u = 3/4 on the logarithm is that
    of 1 - (1 - u): the distance from 1 keeps its relative precision, and with it the small radii theirs.
    One definition for all backends, without libm: fdlibm's e_log.c, each operation rounded once.
    """
    near = (word >> 62) == -1  # the two top bits are set
    word = torch.where(near, ~word, word)
    rest = torch.where(near, _LOW_BITS - low, low + 1).to(torch.float64)
    whole = ((word >> 32) & _MASK32).to(torch.float64) * 2.0**32 + (word & _MASK32).to(torch.float64)
    value = (whole + rest * 2.0**-12) * 2.0**-64  # u, or 1 - u where near
    bits = value.view(torch.int64)
    exponent = (bits >> 52) - 1023
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(torch.float64)
    large = mantissa >= _SQRT2
    mantissa = torch.where(large, mantissa * 0.5, mantissa)
    k = torch.where(near, 0.0, (exponent + large).to(torch.float64))
    g = torch.where(near, -value, mantissa - 1.0)
    q = g / (g + 2.0)
    w = q * q
    series = w * _horner(w, _LOG)
    h = 0.5 * g * g
    return k * _LN2_HI - ((h - (q * (h + series) + k * _LN2_LO)) - g)


def sin_cos(word: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of 2 pi a / 2^52, a the upper 52 bits of unsigned 64-bit words given as int64 -> float64.

    The octant is cut from the word exactly; fdlibm's polynomials do the rest on [0, pi / 4].
    """
    octant = (word >> 61) & 7
    fraction = word & (2**61 - 1 - _LOW_BITS)
    fraction = torch.where((octant & 1) == 1, 2**61 - fraction, fraction)
    x = (fraction.to(torch.float64) * 2.0**-61) * _PI_4
    z = x * x
    sine = x + (x * z) * _horner(z, _SIN)
    cosine = (1.0 - 0.5 * z) + (z * z) * _horner(z, _COS)
    swap = ((octant + 1) & 2) == 2  # octants 1, 2, 5, 6
    sine, cosine = torch.where(swap, cosine, sine), torch.where(swap, sine, cosine)
    cosine = torch.where(((octant + 2) & 4) == 4, -cosine, cosine)  # octants 2 to 5
    sine = torch.where(octant >= 4, -sine, sine)
    return sine, cosine


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """c[0] + x * (c[1] + x * (...)), each multiply and add rounded on its own."""
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        value = value * x + coefficient
    return value
