"""How far a kernel may be from the float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

# Norms and factors are float64 everywhere; only the order of the additions differs.
FACTOR_RTOL = 1e-13
ORDERS = 8  # of the addends, to see how wrong torch.sum can be


def assert_sum_close(got: Tensor, grad: Tensor, before: Tensor | None = None) -> None:
    """``got`` [B, p] is ``before`` + the sum of ``grad`` [B, T, p] over T, at most twice as wrong as torch.sum.

    Torch's own error is the largest over the tensor and over a few orders of its addends (a few outputs alone can
    be right by luck), and at least what rounding the exact sum, or the largest of its partial sums, costs once.
    """
    start = torch.zeros(()) if before is None else before
    exact = grad.double().sum(1) + start.double()
    assert got.shape == exact.shape and got.dtype == torch.float32
    if exact.numel() == 0:
        return
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(grad.shape[1], generator=generator) for _ in range(ORDERS)]
    torchs = [exact.float(), *(grad[:, order].float().sum(1) + start for order in orders)]
    partial = grad.double().cumsum(1).abs().max().item() if grad.shape[1] else 0.0
    allowed = 2.0 * max(2.0**-24 * partial, *((t.double() - exact).abs().max().item() for t in torchs))
    error = (got.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
