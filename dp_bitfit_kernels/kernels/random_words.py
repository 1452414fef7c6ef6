"""64-bit words of the ChaCha20 key stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_bitfit_kernels.kernels.chacha import BLOCKS, chacha_words, interleave_words, plan_words
from dp_bitfit_kernels.kernels.checks import check_stream
from dp_bitfit_kernels.kernels.plan import alignment, on_device_of


@triton.jit(do_not_specialize=["stream", "block", "count"])
def random_words_kernel(
    p_key,  # [8] int32
    p_step,  # [1] int64
    p_out,  # [count] int64
    stream,
    block,
    skew,
    count,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes the words of ``BLOCK`` key-stream blocks; ``skew`` words of the first one precede p_out."""
    i_block = tl.program_id(0).to(tl.int64) * BLOCK
    b_counter = (block.to(tl.int64) + i_block + tl.arange(0, BLOCK)).to(tl.uint32)
    b_even, b_odd = chacha_words(p_key, p_step, stream, b_counter)
    b_word = interleave_words(b_even, b_odd, BLOCK)
    o_word = i_block * 8 + tl.arange(0, BLOCK * 8) - skew
    m_word = (o_word >= 0) & (o_word < count // ALIGN * ALIGN)
    tl.store(p_out + o_word, b_word.to(tl.int64, bitcast=True), mask=m_word)


def random_words(key: Tensor, step: Tensor, stream: int, first: int, count: int) -> Tensor:
    """Words ``first`` to ``first + count`` of the stream (``key`` [8] int32, ``step`` [1] int64) -> [count] int64."""
    check_stream("random_words", key, step, stream, first, count)
    block, skew, programs = plan_words(first, count)
    words = torch.empty((count,), dtype=torch.int64, device=key.device)
    if count > 0:
        with on_device_of(key):
            random_words_kernel[(programs,)](
                key,
                step,
                words,
                stream,
                block,
                skew,
                count,
                ALIGN=alignment(words.element_size(), count),
                BLOCK=BLOCKS,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return words
