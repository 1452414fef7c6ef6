"""ChaCha20 (RFC 8439) inside a kernel, shared by random_words and noisy_sum."""

from __future__ import annotations

import triton
import triton.language as tl

from dp_bitfit_kernels.kernels.plan import cdiv

WORDS = 8  # 64-bit words of one ChaCha block
BLOCKS = 128  # ChaCha blocks of one program, one a thread: its 16 words of state live in registers


@triton.jit
def quarter_round(a, b, c, d):
    """RFC 8439, section 2.1, on uint32 tensors."""
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def load_key_word(p_key, i):
    """Word ``i`` of the key [8] int32 as uint32."""
    return tl.load(p_key + i).to(tl.uint32, bitcast=True)


@triton.jit
def join_words(low, high):
    """64-bit words from their halves."""
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def chacha_words(p_key, p_step, stream, b_counter):
    """Key-stream blocks ``b_counter`` [N] uint32 as two uint64 tensors [N, 2, 2]: their even and odd 64-bit words.

    Element [n, i, j] is word ``2 * (2 * i + j)`` of block n, or the one after it. Nonce = step || stream.
    """
    zero = b_counter ^ b_counter
    k0 = zero + load_key_word(p_key, 0)
    k1 = zero + load_key_word(p_key, 1)
    k2 = zero + load_key_word(p_key, 2)
    k3 = zero + load_key_word(p_key, 3)
    k4 = zero + load_key_word(p_key, 4)
    k5 = zero + load_key_word(p_key, 5)
    k6 = zero + load_key_word(p_key, 6)
    k7 = zero + load_key_word(p_key, 7)
    step = tl.load(p_step)
    n0 = zero + step.to(tl.uint32)
    n1 = zero + (step >> 32).to(tl.uint32)
    n2 = zero + stream.to(tl.uint32)

    x0 = zero + 0x61707865
    x1 = zero + 0x3320646E
    x2 = zero + 0x79622D32
    x3 = zero + 0x6B206574
    x4, x5, x6, x7, x8, x9, x10, x11 = k0, k1, k2, k3, k4, k5, k6, k7
    x12, x13, x14, x15 = b_counter, n0, n1, n2
    for _ in range(10):
        x0, x4, x8, x12 = quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = quarter_round(x3, x4, x9, x14)

    w0 = join_words(x0 + 0x61707865, x1 + 0x3320646E)
    w1 = join_words(x2 + 0x79622D32, x3 + 0x6B206574)
    w2 = join_words(x4 + k0, x5 + k1)
    w3 = join_words(x6 + k2, x7 + k3)
    w4 = join_words(x8 + k4, x9 + k5)
    w5 = join_words(x10 + k6, x11 + k7)
    w6 = join_words(x12 + b_counter, x13 + n0)
    w7 = join_words(x14 + n1, x15 + n2)
    # join appends the new dimension: even = [[w0, w2], [w4, w6]] for every block.
    b_even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    b_odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return b_even, b_odd


@triton.jit
def interleave_words(b_even, b_odd, BLOCK: tl.constexpr):
    """Back to the order of the stream: two [BLOCK, 2, 2] tensors -> [BLOCK * 8]."""
    return tl.reshape(tl.join(b_even, b_odd), [BLOCK * 8])


def plan_words(first: int, count: int) -> tuple[int, int, int]:
    """Block of word ``first``, its place in that block, and the programs that cover ``count`` words from there on."""
    block, skew = divmod(first, WORDS)
    return block, skew, cdiv(skew + count, WORDS * BLOCKS)
