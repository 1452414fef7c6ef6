"""Parts of the Triton kernels by themselves, in Triton's interpreter; whole ops are tested in test_ops.py.

The interpreter is chosen when Triton is imported: ``TRITON_INTERPRET=1 pytest -m interpreter``. It computes in
NumPy, one program after the other; bfloat16 serves as storage only, there and in the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch

from dp_bitfit_kernels import reference

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
]

from dp_bitfit_kernels.kernels.noisy_sum import cos_sin_turn, log_uniform  # noqa: E402


@triton.jit
def box_muller_kernel(p_word, p_log, p_cos, p_sin, BLOCK: tl.constexpr):
    o_word = tl.arange(0, BLOCK)
    b_word = tl.load(p_word + o_word).to(tl.uint64, bitcast=True)
    b_cos, b_sin = cos_sin_turn(b_word)
    tl.store(p_log + o_word, log_uniform(b_word, b_word * 977))
    tl.store(p_cos + o_word, b_cos)
    tl.store(p_sin + o_word, b_sin)


def test_log_and_sine_of_edge_words() -> None:
    """Where an octant or a binade begins or ends, and what rounding to float64 does just there."""
    octants = [o * 2**61 + d for o in range(9) for d in (-(2**10), -1, 0, 1, 2**8)]
    binades = [round(2.0**e) + d for e in range(54, 64) for d in (-2, -1, 0)]
    halves = [int(2.0**64 * 2.0**-0.5) + d for d in (-(2**11), -1, 0, 1, 2**11)]
    quarters = [(3 << 62) + d for d in (-(2**11), -1, 0, 1, 2**11)]  # from here on, by the distance from 1
    edges = [w for w in octants + binades + halves + quarters if 0 <= w < 2**64]
    generator = torch.Generator().manual_seed(7)
    random = torch.randint(-(2**63), 2**63 - 1, (256 - len(edges),), generator=generator)
    words = torch.cat([torch.tensor([w - 2**64 if w >= 2**63 else w for w in edges]), random])
    log, cos, sin = (torch.empty(256, dtype=torch.float64) for _ in range(3))
    box_muller_kernel[(1,)](words, log, cos, sin, BLOCK=256)
    want_sin, want_cos = reference.sin_cos(words)
    assert torch.equal(log, reference.log_uniform(words, (words * 977) & 0xFFF))
    assert torch.equal(cos, want_cos)
    assert torch.equal(sin, want_sin)
