"""The random words and the noise of the reference against RFC 8439, plain Python, and mpmath at 200 bits."""

from __future__ import annotations

import math
import struct

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from dp_bitfit_kernels import reference
from dp_bitfit_kernels._validate import OpError

M32 = 0xFFFFFFFF
COUNTING_KEY = bytes(range(32))  # the key of RFC 8439's examples


def key_of(data: bytes) -> Tensor:
    return torch.tensor(struct.unpack("<8i", data), dtype=torch.int32)


def step_of(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)


def signed(words: list[int]) -> Tensor:
    """Unsigned 64-bit integers as the int64 bit patterns that the ops use."""
    return torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64).copy())


def python_block(key: bytes, counter: int, nonce: tuple[int, int, int]) -> bytes:
    """RFC 8439 section 2.3 with Python integers, written apart from the reference."""

    def rotate(value: int, bits: int) -> int:
        return (value << bits | value >> (32 - bits)) & M32

    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter, *nonce]
    s = list(start)
    columns = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    diagonals = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    for _ in range(10):
        for a, b, c, d in columns + diagonals:
            for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                s[x] = (s[x] + s[y]) & M32
                s[z] = rotate(s[z] ^ s[x], bits)
    return struct.pack("<16I", *((x + y) & M32 for x, y in zip(s, start, strict=True)))


def python_words(key: bytes, step: int, stream: int, first: int, count: int) -> list[int]:
    nonce = (step & M32, step >> 32 & M32, stream)
    blocks = {i // 8 for i in range(first, first + count)}
    stored = {b: struct.unpack("<8Q", python_block(key, b, nonce)) for b in blocks}
    return [stored[i // 8][i % 8] for i in range(first, first + count)]


def python_normal(u1: int, u2: int) -> tuple[float, float]:
    """The contract's Box-Muller with Python floats, which never fuse a multiply with an add."""
    low, near = u2 % 4096, u1 >= 3 << 62
    base, rest = (2**64 - 1 - u1, 4095 - low) if near else (u1, low + 1)
    v = (float(base) + rest / 4096.0) * 2.0**-64
    if near:
        g, k = -v, 0
    else:
        m, k = math.frexp(v)
        m, k = m * 2.0, k - 1
        if m >= math.sqrt(2.0):
            m, k = m * 0.5, k + 1
        g = m - 1.0
    q = g / (2.0 + g)
    w = q * q
    series = 0.0
    for coefficient in (
        0.1479819860511658591, 0.1531383769920937332, 0.1818357216161805012, 0.2222219843214978396,
        0.2857142874366239149, 0.3999999999940941908, 0.6666666666666735130,
    ):  # fmt: skip
        series = coefficient + w * series
    series = w * series
    h = 0.5 * g * g
    log = k * 6.93147180369123816490e-01 - ((h - (q * (h + series) + k * 1.90821492927058770002e-10)) - g)
    radius = math.sqrt(-2.0 * log)

    octant, f = u2 >> 61, (u2 - low) & (2**61 - 1)
    if octant % 2:
        f = 2**61 - f
    x = (float(f) * 2.0**-61) * (math.pi / 4)
    z = x * x
    s1 = 1.58969099521155010221e-10
    for coefficient in (
        -2.50507602534068634195e-08, 2.75573137070700676789e-06, -1.98412698298579493134e-04,
        8.33333333332248946124e-03, -1.66666666666666324348e-01,
    ):  # fmt: skip
        s1 = coefficient + z * s1
    c1 = -1.13596475577881948265e-11
    for coefficient in (
        2.08757232129817482790e-09, -2.75573143513906633035e-07, 2.48015872894767294178e-05,
        -1.38888888888741095749e-03, 4.16666666666666019037e-02,
    ):  # fmt: skip
        c1 = coefficient + z * c1
    sine, cosine = x + (x * z) * s1, (1.0 - 0.5 * z) + (z * z) * c1
    if octant in (1, 2, 5, 6):
        sine, cosine = cosine, sine
    if octant in (2, 3, 4, 5):
        cosine = -cosine
    if octant >= 4:
        sine = -sine
    return radius * cosine, radius * sine


def test_key_stream_is_rfc_8439():
    """Section 2.3.2: nonce 00:00:00:09:00:00:00:4a:00:00:00:00, block counter 1."""
    n0, n1, n2 = struct.unpack("<3I", bytes.fromhex("000000090000004a00000000"))
    words = reference.random_words(key_of(COUNTING_KEY), step_of(n0 | n1 << 32), n2, 8, 8)
    assert words.numpy().astype("<i8").tobytes().hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def test_key_stream_of_zeros_is_rfc_8439():
    """Appendix A.1, vectors 1 and 2: key and nonce zero, block counters 0 and 1."""
    words = reference.random_words(key_of(bytes(32)), step_of(0), 0, 0, 16)
    data = words.numpy().astype("<i8").tobytes().hex()
    assert data.startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert data[128:].startswith("9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed")


@pytest.mark.parametrize(
    ("step", "stream", "first"),
    [
        (0, 0, 0),
        (1, 1, 5),  # not at a block's edge
        (2**32 - 1, 7, 2**32 - 4),  # words across 2^32
        (2**32, 2**32 - 1, 2**32 - 4),  # the step's high half, the largest stream
        (2**63 - 1, 3, 2**35 - 8),  # the last block of a nonce
    ],
)
def test_random_words_equal_python_integers(step, stream, first):
    key = bytes(b ^ 0xA5 for b in COUNTING_KEY)  # words with the top bit set: negative as int32
    words = reference.random_words(key_of(key), step_of(step), stream, first, 8)
    assert words.tolist() == signed(python_words(key, step, stream, first, 8)).tolist()


def test_random_words_do_not_depend_on_the_cut(monkeypatch):
    key, step = key_of(COUNTING_KEY), step_of(3)
    whole = reference.random_words(key, step, 0, 0, 1000)
    assert torch.equal(reference.random_words(key, step, 0, 123, 456), whole[123:579])
    monkeypatch.setattr(reference, "_BLOCKS_AT_ONCE", 16)
    assert torch.equal(reference.random_words(key, step, 0, 0, 1000), whole)
    assert reference.random_words(key, step, 0, 7, 0).shape == (0,)


def test_words_beyond_the_block_counter_are_refused():
    key, step = key_of(COUNTING_KEY), step_of(0)
    total = torch.zeros(8, dtype=torch.int64)
    assert reference.random_words(key, step, 0, 2**35 - 1, 1).shape == (1,)
    for call in (
        lambda: reference.random_words(key, step, 0, 2**35 - 1, 2),
        lambda: reference.random_words(key, step, 0, -1, 2),
        lambda: reference.random_words(key, step, 2**32, 0, 1),
        lambda: reference.random_words(key[:7], step, 0, 0, 1),
        lambda: reference.random_words(key, step.int(), 0, 0, 1),
        lambda: reference.noisy_sum(total, key, step, 0, 2**35 - 7, 1.0, 1.0),
        lambda: reference.noisy_sum(total, key, step, 0, 0, -1.0, 1.0),
        lambda: reference.noisy_sum(total, key, step, 0, 0, math.nan, 1.0),
    ):
        with pytest.raises(OpError):
            call()


def hard_words(count: int) -> list[int]:
    """Words at every power of two, at the octants' edges and at random, and a few of every magnitude."""
    rng = np.random.default_rng(5)
    edges = [min(max(2**k + d, 0), 2**64 - 1) for k in range(65) for d in (-2, -1, 0, 1)]
    octants = [(o << 61) + d for o in range(1, 8) for d in (-1, 0, 1)]
    roots = [int(mpmath.mpf(2) ** (k + mpmath.mpf(1) / 2)) + d for k in range(3, 63) for d in (-1, 0, 1)]
    small = [int(w) >> int(s) for w, s in zip(words64(rng, count), rng.integers(0, 64, count), strict=True)]
    return edges + octants + roots + small + words64(rng, count)


def words64(rng: np.random.Generator, count: int) -> list[int]:
    return [int(w) for w in rng.integers(0, 2**64, count, dtype=np.uint64)]


def test_log_is_accurate_and_exact_at_the_ends():
    """Against u itself, so rounding it to float64 is in the bound: relative in ln u from 3/4 on, 2^-52 of u before."""
    words = hard_words(800)
    words += [(3 << 62) + d for d in (-(2**11), -1, 0, 1, 2**11)]
    lows = [int(low) for low in np.random.default_rng(6).integers(0, 4096, len(words))]
    words, lows = words * 3, lows + [0] * len(words) + [4095] * len(words)
    computed = reference.log_uniform(signed(words), torch.tensor(lows)).tolist()
    with mpmath.workprec(200):
        for word, low, value in zip(words, lows, computed, strict=True):
            u = (mpmath.mpf(word) * 4096 + low + 1) / mpmath.mpf(2) ** 76
            exact = mpmath.log(u)
            of_u = mpmath.mpf(2) ** -52 * (1 if u < 0.75 else abs(exact) * mpmath.mpf("1.16"))
            assert abs(value - exact) <= abs(exact) * mpmath.mpf(2) ** -52 + of_u, (word, low)
    ends = reference.log_uniform(signed([0, 2**64 - 1, 2**64 - 1]), torch.tensor([0, 4095, 4094]))
    assert ends[0].item() == pytest.approx(-76 * math.log(2.0), rel=2.0**-52)
    assert ends[1].item() == 0.0
    assert ends[2].item() == -(2.0**-76)  # the smallest radius above 0, to its last bit


def test_sine_and_cosine_are_accurate_in_every_octant():
    words = hard_words(800)
    sine, cosine = (t.tolist() for t in reference.sin_cos(signed(words)))
    with mpmath.workprec(200):
        for word, s, c in zip(words, sine, cosine, strict=True):
            turns = mpmath.mpf(word - word % 4096) / 2**63  # in half turns: sinpi and cospi are exact at the zeros
            for value, exact in ((s, mpmath.sinpi(turns)), (c, mpmath.cospi(turns))):
                assert abs(value - exact) <= abs(exact) * mpmath.mpf(2) ** -51, word
    assert [abs(v) for v in reference.sin_cos(signed([0, 2**62, 2**63]))[0].tolist()] == [0.0, 1.0, 0.0]


def test_normals_err_by_no_more_than_the_docstring_says():
    """|z' - z| <= 2^-49 |z| + 1.75 * 2^-52 min(r, 1 / r) against exact arithmetic on the same words."""
    count = 1500
    key, step = key_of(COUNTING_KEY), step_of(11)
    words = python_words(COUNTING_KEY, 11, 0, 0, count)
    computed = reference.standard_normal(key, step, 0, 0, count).tolist()
    with mpmath.workprec(200):
        for i in range(0, count, 2):
            low = words[i + 1] % 4096
            radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(words[i] * 4096 + low + 1) / 2**76))
            turns = mpmath.mpf(words[i + 1] - low) / 2**63
            for value, exact in (
                (computed[i], radius * mpmath.cospi(turns)),
                (computed[i + 1], radius * mpmath.sinpi(turns)),
            ):
                allowed = abs(exact) * mpmath.mpf(2) ** -49 + mpmath.mpf(1.75) * 2**-52 * min(radius, 1 / radius)
                assert abs(value - exact) <= allowed


def test_tail_reaches_ten_sigma_in_the_release(monkeypatch):
    """The smallest u1 with u2 at each axis: nothing between the words and the release cuts the tail."""
    words = signed([w for quarter in range(4) for w in (0, quarter << 62)])
    monkeypatch.setattr(reference, "random_words", lambda key, step, stream, first, count: words[:count])
    total = torch.zeros(8, dtype=torch.int64)
    released = reference.noisy_sum(total, key_of(COUNTING_KEY), step_of(0), 0, 0, 2.0**20, 2.0**-20)
    largest = math.sqrt(152 * math.log(2.0))
    assert largest > 10.26
    assert released.tolist() == pytest.approx([largest, 0, 0, largest, -largest, 0, 0, -largest], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("first", [0, 1, 2**32 - 4])
def test_noisy_sum_is_the_contract_bit_for_bit(first):
    count, std, scale = 300, 1.7 * 2**20, 0.37e-6
    key, step = key_of(COUNTING_KEY), step_of(2**40 + 5)
    total = torch.arange(count, dtype=torch.int64) * 12345677 - 2**30
    even = first & ~1
    words = python_words(COUNTING_KEY, 2**40 + 5, 2, even, count + 2)
    normals = [z for i in range(0, len(words) - 1, 2) for z in python_normal(words[i], words[i + 1])]
    noise = [math.floor(std * z + 0.5) for z in normals[first - even :][:count]]
    expected = [np.float32(float(t + n) * scale) for t, n in zip(total.tolist(), noise, strict=True)]
    released = reference.noisy_sum(total, key, step, 2, first, std, scale)
    assert released.dtype == torch.float32
    assert np.array_equal(released.numpy().view(np.int32), np.array(expected).view(np.int32))


def test_noisy_sum_does_not_depend_on_the_cut(monkeypatch):
    key, step = key_of(COUNTING_KEY), step_of(9)
    total = torch.randint(-(2**40), 2**40, (999,))
    whole = reference.noisy_sum(total, key, step, 0, 17, 1e6, 1e-3)
    parts = [
        reference.noisy_sum(total[a:b], key, step, 0, 17 + a, 1e6, 1e-3) for a, b in ((0, 3), (3, 400), (400, 999))
    ]
    assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(reference, "_ELEMENTS_AT_ONCE", 128)
    assert torch.equal(reference.noisy_sum(total, key, step, 0, 17, 1e6, 1e-3), whole)


def test_no_noise_releases_the_sum_itself():
    total = torch.tensor([2**40 + 1, -7, 0])
    released = reference.noisy_sum(total, key_of(COUNTING_KEY), step_of(0), 0, 0, 0.0, 0.5)
    assert torch.equal(released, (total.double() * 0.5).float())
    assert reference.noisy_sum(total[:0], key_of(COUNTING_KEY), step_of(0), 0, 0, 1.0, 0.5).shape == (0,)
