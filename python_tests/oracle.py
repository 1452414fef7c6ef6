"""The oracle: one sample at a time, in float64, by plain autograd on an unconverted copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dp_bitfit_kernels as dpk


def plain_copy(model: nn.Module) -> nn.Module:
    """A float64 copy without conversion, in evaluation mode where a norm would use its batch or move its statistics."""
    twin = copy.deepcopy(model)
    if any(isinstance(m, dpk.layers.BiasLayer) for m in twin.modules()):
        twin = dpk.restore_model(twin)
    twin = twin.double()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    return twin


def rows(
    model: nn.Module, names: list[str], inputs: Tensor, loss: Callable[[Any], Tensor], mask: Tensor | None = None
) -> Tensor:
    """Per-sample gradients [B, P] float64 of ``loss(model(x_i))`` by the parameters ``names``, flat in that order."""
    twin = plain_copy(model)
    parameters = dict(twin.named_parameters())
    wanted = [parameters[n].requires_grad_(True) for n in names]
    out = []
    for i in range(inputs.shape[0]):
        x = inputs[i : i + 1]
        if x.is_floating_point():
            # PyTorch's channels_last group_norm_backward crashes on a CPU where no gradient of its input is asked for.
            x = x.double().requires_grad_()
        value = loss(twin(x))
        asked = [*wanted, x] if x.requires_grad else wanted
        grads = torch.autograd.grad(value, asked, allow_unused=True)[: len(wanted)]
        out.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for g, p in zip(grads, wanted, strict=True)
                ]
            )
        )
    stacked = torch.stack(out)
    return stacked if mask is None else stacked * mask.to(stacked.dtype).unsqueeze(1)


def clipped_sum(rows: Tensor, bound: float, gamma: float | None = None) -> Tensor:
    """Sum of clipped rows [P] float64: Abadi's min(1, R/|g|), or AUTO-S with ``gamma``."""
    norms = rows.norm(dim=1, keepdim=True)
    factors = bound / (norms + gamma) if gamma is not None else (bound / norms.clamp_min(1e-300)).clamp_max(1.0)
    return (rows * factors).sum(0)
