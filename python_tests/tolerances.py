"""How far a kernel may be from the float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

# Norms and factors are float64 everywhere; only the order of the additions differs.
FACTOR_RTOL = 1e-13


def assert_sum_close(got: Tensor, grad: Tensor, before: Tensor | None = None) -> None:
    """``got`` [B, p] is ``before`` + the sum of ``grad`` [B, T, p] over T, at most twice as wrong as torch.sum.

    Torch's own error is the largest over the tensor, and at least what rounding the exact sum costs.
    """
    exact = grad.double().sum(1)
    torchs = grad.float().sum(1)
    if before is not None:
        exact = exact + before.double()
        torchs = torchs + before
    assert got.shape == exact.shape and got.dtype == torch.float32
    if exact.numel() == 0:
        return
    unavoidable = (exact.float().double() - exact).abs().max().item()
    allowed = 2.0 * max((torchs.double() - exact).abs().max().item(), unavoidable)
    error = (got.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
