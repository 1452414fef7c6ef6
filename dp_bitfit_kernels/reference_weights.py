"""PyTorch specification of the ops for trained weights, which are compiled for CPUs alone, beside ``reference``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._validate import OpError, check_one_device
from .reference import clipped_sum_


def _check_factors(op: str, left: Tensor, right: Tensor) -> None:
    check_one_device(op, left, right)
    if left.dim() != 3 or right.dim() != 3 or left.shape[:2] != right.shape[:2]:
        raise OpError(f"{op}: left {tuple(left.shape)} and right {tuple(right.shape)} must be [B, T, ...]")


def ghost_squares(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of outer products added up, by Gram matrices: left [B, T, p], right [B, T, d], made in float64.

    Returns:
        |sum_t left_t right_t^T|^2 [B]; the sums over t of |left_t| |right_t|, of |left_t| and of |right_t|, [3, B].
    """
    _check_factors("ghost_squares", left, right)
    left, right = left.double(), right.double()
    products = (left @ left.transpose(1, 2)) * (right @ right.transpose(1, 2))
    a, b = left.norm(dim=2), right.norm(dim=2)
    return products.sum((1, 2)), torch.stack([a * b, a, b]).sum(2)


def clipped_index_sum_(total: Tensor, ids: Tensor, vectors: Tensor, factors: Tensor) -> None:
    """total [V, d] int64 += floor(factors_i vectors_it + 0.5) at row ids_it, for vectors [B, T, d] float32, ids [B, T].

    factors [B] float64, of which exactly 0 selects a sample away, whatever it holds.
    """
    check_one_device("clipped_index_sum_", total, ids, vectors, factors)
    if vectors.dim() != 3 or ids.shape != vectors.shape[:2] or factors.shape != ids.shape[:1]:
        raise OpError(
            f"clipped_index_sum_: ids {tuple(ids.shape)} and factors {tuple(factors.shape)} do not fit vectors "
            f"{tuple(vectors.shape)} [B, T, d]"
        )
    own = factors.view(-1, 1, 1)
    rounded = torch.where(own == 0.0, 0.0, vectors.double() * own).add_(0.5).floor_().to(torch.int64)
    total.index_add_(0, ids.reshape(-1), rounded.flatten(0, 1))


def clipped_outer_sum_(total: Tensor, left: Tensor, right: Tensor, factors: Tensor, fresh: bool) -> None:
    """total [p * d] int64 += sum_i floor(factors_i row_i + 0.5), row_i = sum_t left_it right_it^T made in float32.

    left [B, T, p], right [B, T, d]; factors [B] float64, of which exactly 0 selects a sample away, whatever it holds.
    fresh: what ``total`` holds is forgotten.
    """
    _check_factors("clipped_outer_sum_", left, right)
    if fresh:
        total.zero_()
    rows = torch.bmm(left.transpose(1, 2), right).flatten(1)
    clipped_sum_(total, rows, torch.tensor([0, rows.shape[1]], device=rows.device), factors.unsqueeze(1))


def scale_grad(grad: Tensor, x: Tensor, eps: float, centered: bool) -> Tensor:
    """Per-sample gradient of the scale of a LayerNorm (an RMSNorm where not ``centered``) over the last dimension.

    grad, x [B, T, p] of one floating dtype: rows [B, p] = sum_t grad_t n_t, n the normalised x, in float32 (float64
    where they are).
    """
    check_one_device("scale_grad", grad, x)
    if grad.dim() != 3 or x.shape != grad.shape or x.dtype != grad.dtype or not x.dtype.is_floating_point:
        raise OpError(
            f"scale_grad: grad {list(grad.shape)} {grad.dtype} and x {list(x.shape)} {x.dtype} must be alike, [B, T, p]"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = F.layer_norm if centered else F.rms_norm
    return (norm(x.to(wide), x.shape[2:], eps=eps) * grad).sum(1, dtype=torch.float64).to(wide)
