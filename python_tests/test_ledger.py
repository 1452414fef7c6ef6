"""Contributions: what a layer knows only through norms and sums is clipped with the dense rows, by one factor."""

from __future__ import annotations

import pytest
import torch
from attach import private, small_model
from torch import Tensor

from dp_bitfit_kernels.clipping import GRID


class Outside:
    """Rows of the first columns that the ledger does not hold."""

    def __init__(self, rows: Tensor):
        self.rows = rows.double()

    def squared_norms(self) -> Tensor:
        return self.rows.square().sum(1, keepdim=True)

    def add_clipped(self, total: Tensor, factors: Tensor) -> None:
        rounded = torch.where(factors == 0.0, 0.0, (self.rows * factors + 0.5).floor())
        total[: self.rows.shape[1]] += rounded.to(torch.int64).sum(0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_a_contribution_is_clipped_with_the_dense_rows(scale):
    engine, _, _, _ = private(small_model(), bound=0.5)
    ledger = engine._session.ledger
    torch.manual_seed(0)
    rows = torch.randn(1, ledger.width) * scale
    held = rows.clone()
    held[:, :5] = 0
    totals = []
    for dense, apart in ((rows, None), (held, Outside(rows[:, :5]))):
        ledger.total.zero_()
        ledger.open(1)
        ledger._slab.rows.copy_(dense)
        if apart is not None:
            ledger.contribute(apart)
        assert ledger.dirty
        ledger.absorb(1.0)
        totals.append(ledger.total.clone())
    assert (totals[0] - totals[1]).abs().max() <= 1  # the order of float64 sums may move a rounding
    assert all(int(t.square().sum()) <= GRID**2 for t in totals)


def test_a_contribution_of_a_masked_or_bad_row_is_selected_out():
    engine, _, _, _ = private(small_model(), bound=0.5)
    ledger = engine._session.ledger
    rows = torch.ones(2, 5)
    rows[1, 0] = float("nan")
    ledger.open(2, torch.tensor([False, True]))
    ledger.contribute(Outside(rows))
    ledger.absorb(1.0)
    assert not ledger.total.any()
