"""The reference ops on rows and sums against their definitions in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dp_bitfit_kernels import reference
from dp_bitfit_kernels._validate import OpError

LAYOUTS = {
    "features last": lambda b, t, p: torch.randn(b, t, p),
    "channels first": lambda b, t, p: torch.randn(b, p, t).transpose(1, 2),
    "broadcast over T": lambda b, t, p: torch.randn(b, 1, p).expand(b, t, p),
    "batch innermost": lambda b, t, p: torch.randn(t, p, b).permute(2, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("length", [0, 1, 37])
def test_bias_grad_sums_over_t(layout, dtype, length):
    grad = LAYOUTS[layout](3, length, 5).to(dtype)
    rows = reference.bias_grad(grad)
    exact = grad.double().sum(1)
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(rows, exact.to(rows.dtype))
    slab = torch.ones(3, 9, dtype=rows.dtype)
    reference.bias_grad_(slab[:, 2:7], grad)
    assert torch.equal(slab[:, 2:7], rows + 1)
    assert torch.equal(slab[:, [0, 1, 7, 8]], torch.ones(3, 4, dtype=rows.dtype))


def test_bias_grad_is_traced_whole():
    compiled = torch.compile(reference.bias_grad, fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 5, 3)
    assert torch.equal(compiled(grad), reference.bias_grad(grad))


def clip(rows, offsets, bounds, grid, *, mask=None, extra=None, scale=1.0, gamma=None):
    return reference.clip_factors(
        rows,
        torch.tensor(offsets),
        torch.ones(rows.shape[0], dtype=torch.bool) if mask is None else mask,
        torch.tensor(bounds, dtype=torch.float64),
        torch.tensor(grid, dtype=torch.float64),
        extra,
        scale,
        gamma,
    )


@pytest.mark.parametrize("gamma", [None, 0.01])
@pytest.mark.parametrize("scale", [1.0, 2.0**-16])
def test_clip_factors_equal_their_definition(gamma, scale, monkeypatch):
    rows = torch.randn(6, 20) * torch.logspace(-3, 3, 6)[:, None] / scale
    extra = torch.rand(6, 3, dtype=torch.float64) / scale**2
    offsets, bounds, grid = [0, 4, 4, 20], [1.0, 0.5, 2.0], [100.0, 200.0, 300.0]
    factors, norms = clip(rows, offsets, bounds, grid, extra=extra, scale=scale, gamma=gamma)
    assert factors.dtype == norms.dtype == torch.float64
    for i in range(6):
        for group in range(3):
            part = rows[i, offsets[group] : offsets[group + 1]].double()
            norm = scale * math.sqrt(math.fsum([*(part**2).tolist(), extra[i, group].item()]))
            below = max(norm, bounds[group]) if gamma is None else norm + gamma
            assert norms[i, group].item() == pytest.approx(norm, rel=1e-14)
            assert factors[i, group].item() == pytest.approx(grid[group] * scale / below, rel=1e-14)
    monkeypatch.setattr(reference, "_VALUES_AT_ONCE", 40)  # two rows at once
    again = clip(rows, offsets, bounds, grid, extra=extra, scale=scale, gamma=gamma)
    assert torch.equal(again[0], factors) and torch.equal(again[1], norms)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_selected_to_zero_and_its_mates_do_not_notice(bad):
    rows = torch.randn(4, 10)
    mask = torch.tensor([True, True, False, True])
    clean_total = torch.zeros(10, dtype=torch.int64)
    factors, _ = clip(rows, [0, 3, 10], [1.0, 1.0], [1e6, 1e6], mask=torch.tensor([True, False, False, True]))
    reference.clipped_sum_(clean_total, rows, torch.tensor([0, 3, 10]), factors)

    rows[1, 7] = bad  # one group of row 1: the other group must vanish too
    rows[2, 0] = bad
    factors, norms = clip(rows, [0, 3, 10], [1.0, 1.0], [1e6, 1e6], mask=mask)
    assert torch.equal(factors[1], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(factors[2], torch.zeros(2, dtype=torch.float64))
    assert not norms[1].isfinite().all() and norms[1, 0].isfinite()
    total = torch.zeros(10, dtype=torch.int64)
    reference.clipped_sum_(total, rows, torch.tensor([0, 3, 10]), factors)
    assert torch.equal(total, clean_total)


def test_a_norm_that_overflows_is_selected_to_zero():
    rows = torch.full((2, 4), 3e38)
    factors, norms = clip(rows, [0, 4], [1.0], [1e6], extra=torch.tensor([[math.inf], [0.0]]).double())
    assert factors[:, 0].tolist() == [0.0, 1e6 / norms[1, 0].item()]
    assert clip(rows.double() * 1e300, [0, 4], [1.0], [1e6])[0].tolist() == [[0.0], [0.0]]


def test_a_row_of_zeros_adds_zeros():
    rows = torch.zeros(2, 5)
    for gamma in (None, 0.01):
        factors, norms = clip(rows, [0, 5], [1.0], [1e6], gamma=gamma)
        total = torch.zeros(5, dtype=torch.int64)
        reference.clipped_sum_(total, rows, torch.tensor([0, 5]), factors)
        assert factors.isfinite().all() and not norms.any() and not total.any()


def test_clipped_sum_is_floor_of_x_plus_a_half_in_integers():
    rows = torch.tensor([[0.5, -0.5, 1.5, -1.5, 2.49, -2.51, 0.0]])
    total = torch.full((7,), 10)
    reference.clipped_sum_(total, rows, torch.tensor([0, 7]), torch.ones(1, 1, dtype=torch.float64))
    assert total.tolist() == [11, 10, 12, 9, 12, 7, 10]

    rows, offsets = torch.randn(5, 30), [0, 11, 12, 30]
    factors = torch.rand(5, 3, dtype=torch.float64) * 2**40
    total = torch.zeros(30, dtype=torch.int64)
    reference.clipped_sum_(total, rows, torch.tensor(offsets), factors)
    group = np.repeat(range(3), np.diff(offsets))
    for j in range(30):
        terms = [math.floor(float(rows[i, j]) * float(factors[i, group[j]]) + 0.5) for i in range(5)]
        assert total[j].item() == sum(terms)


def test_clipped_sum_is_equal_over_any_order_and_split(monkeypatch):
    rows = torch.randn(64, 101) * torch.logspace(-8, 8, 64)[:, None]
    offsets = torch.tensor([0, 50, 101])
    factors, _ = clip(rows, [0, 50, 101], [1.0, 1.0], [7e5, 7e5])

    def total(order: Tensor, sizes: list[int]) -> Tensor:
        result = torch.zeros(101, dtype=torch.int64)
        for part in order.split(sizes):
            reference.clipped_sum_(result, rows[part], offsets, factors[part])
        return result

    whole = total(torch.arange(64), [64])
    for sizes in ([1] * 64, [3, 61], [32, 32]):
        assert torch.equal(total(torch.randperm(64), sizes), whole)
    monkeypatch.setattr(reference, "_VALUES_AT_ONCE", 101 * 5)
    assert torch.equal(total(torch.arange(64), [64]), whole)


def test_ops_read_no_tensor_value():
    """On fake tensors a host synchronisation or a data-dependent shape raises."""
    with FakeTensorMode():
        rows = torch.randn(4, 10)
        factors, _ = clip(rows, [0, 3, 10], [1.0, 1.0], [1e6, 1e6])
        total = torch.zeros(10, dtype=torch.int64)
        reference.clipped_sum_(total, rows, torch.tensor([0, 3, 10]), factors)
        key, step = torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
        assert reference.noisy_sum(total, key, step, 0, 1, 1e6, 1.0).shape == (10,)
        assert reference.bias_grad(torch.randn(4, 7, 10)).shape == (4, 10)


def test_wrong_shapes_are_refused():
    rows, offsets = torch.zeros(2, 5), torch.tensor([0, 5])
    factors = torch.ones(2, 1, dtype=torch.float64)
    total = torch.zeros(5, dtype=torch.int64)
    for call in (
        lambda: reference.bias_grad(torch.zeros(2, 3)),
        lambda: reference.bias_grad(torch.zeros(2, 3, 4, dtype=torch.int64)),
        lambda: reference.bias_grad_(torch.zeros(2, 3), torch.zeros(2, 3, 4)),
        lambda: clip(rows, [0, 2, 5], [1.0], [1.0]),
        lambda: clip(rows, [0, 5], [1.0], [1.0, 2.0]),
        lambda: clip(rows, [0, 5], [1.0], [1.0], mask=torch.ones(3, dtype=torch.bool)),
        lambda: clip(rows, [0, 5], [1.0], [1.0], extra=torch.zeros(2, 2)),
        lambda: reference.clipped_sum_(total[:4], rows, offsets, factors),
        lambda: reference.clipped_sum_(total.int(), rows, offsets, factors),
        lambda: reference.clipped_sum_(total, rows, offsets, factors.float()),
        lambda: reference.clipped_sum_(total, rows, offsets, factors[:1]),
    ):
        with pytest.raises(OpError):
            call()
