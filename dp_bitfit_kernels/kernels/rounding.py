"""One rounding to the dtype of a result."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter cuts a float32 off to bfloat16 where a GPU rounds: there the bits are rounded first.
CUTS_OFF = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(b_x, dtype: tl.constexpr):
    """float32 -> ``dtype``, to nearest even."""
    if CUTS_OFF and dtype == tl.bfloat16:
        bits = b_x.to(tl.uint32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        b_x = tl.where(b_x == b_x, near.to(tl.float32, bitcast=True), b_x)
    return b_x.to(dtype)
