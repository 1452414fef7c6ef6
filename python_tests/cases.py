"""Inputs that every backend must get right, each with the reason why it is here."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEY = torch.tensor(struct.unpack("<8i", bytes(range(32))), dtype=torch.int32)  # that of RFC 8439's examples
STEP = torch.tensor([0x1234_5678_9ABC_DEF0])


@dataclass(frozen=True)
class GradCase:
    """Shape of a gradient [B, T, p]."""

    batch: int
    length: int
    features: int
    reason: str

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.features}"


GRAD_CASES = (
    GradCase(3, 0, 5, "nothing to sum: zeros, no launch"),
    GradCase(4, 1, 70, "2-D input of a linear layer"),
    GradCase(3, 2, 64, "shortest real sum"),
    GradCase(2, 12, 200, "text; p a multiple of 8, not of 16"),
    GradCase(2, 300, 130, "several tiles in T and p, both cut off"),
    GradCase(2, 49, 33, "7 x 7 image: nothing divides anything"),
    GradCase(2, 300, 1, "one feature: contiguous along T in every layout"),
    GradCase(1, 5000, 3, "long T: partial sums in a second stage"),
    GradCase(0, 4, 8, "empty batch"),
    GradCase(2, 4, 0, "no features"),
)

LAYOUTS = ("features_last", "channels_first", "every_second", "expanded")


def make_grad(case: GradCase, layout: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A gradient of ``case`` in ``layout``, inside a larger buffer of NaN so that a read outside it shows."""
    generator = torch.Generator().manual_seed(seed)
    b, t, p = case.batch, case.length, case.features
    values = torch.randn((b, t, p), generator=generator).to(dtype)
    if layout == "expanded":  # what autograd hands back for a mean or a sum over T: stride 0
        return values[:, :1].expand(b, t, p) if t else values
    if layout == "features_last":
        buffer = torch.full((b, t + 2, p), float("nan"), dtype=dtype)
        view = buffer[:, 1 : t + 1]
    elif layout == "channels_first":
        buffer = torch.full((b, p + 2, t), float("nan"), dtype=dtype)
        view = buffer[:, 1 : p + 1].transpose(1, 2)
    else:
        buffer = torch.full((b, 2 * t, 2 * p), float("nan"), dtype=dtype)
        view = buffer[:, ::2, ::2]
    view.copy_(values)
    return view


@dataclass(frozen=True)
class GroupCase:
    """Clipping groups of ledger rows [B, P]."""

    batch: int
    offsets: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.batch}x{self.offsets[-1]}in{len(self.offsets) - 1}"


GROUP_CASES = (
    GroupCase(5, (0, 1), "one parameter"),
    GroupCase(3, (0, 5003), "one group over several tiles, nothing divides anything"),
    GroupCase(9, (0, 3, 3, 2048, 2050, 4096, 4100), "groups that are empty, tiny, at and across tile borders"),
    GroupCase(2, (0, 0, 7, 7), "empty groups at both ends"),
)


def make_rows(case: GroupCase, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Ledger rows [B, P] as a slice of a wider ledger of NaN, and the offsets [L + 1]."""
    width = case.offsets[-1]
    ledger = torch.full((case.batch, width + 3), float("nan"))
    rows = ledger[:, :width]
    rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(4)) * scale)
    return rows, torch.tensor(case.offsets)
