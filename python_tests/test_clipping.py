"""Sensitivity on the integer grid: no row, however built, adds more than G to the sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dp_bitfit_kernels import clipping, reference
from dp_bitfit_kernels._validate import ClippingError
from dp_bitfit_kernels.clipping import GRID, Automatic, ClippingMethod, ClipPlan, Custom, Flat, PerLayer


def factors_of(plan: ClipPlan, rows: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """As the ledger computes them."""
    mask = torch.ones(rows.shape[0], dtype=torch.bool) if mask is None else mask
    bounds, grid = (torch.tensor(v, dtype=torch.float64) for v in (plan.bounds, plan.grid))
    factors, norms = reference.clip_factors(
        rows, torch.tensor(plan.offsets), mask, bounds, grid, None, scale, plan.gamma
    )
    if plan.factor_fn is not None:
        factors = clipping.custom_factors(plan, norms, mask, scale)
    return factors, norms


def contributions(plan: ClipPlan, rows: Tensor, scale: float = 1.0) -> list[Tensor]:
    """The integer vector [P] that each row adds."""
    factors, _ = factors_of(plan, rows, scale=scale)
    result = []
    for i in range(rows.shape[0]):
        total = torch.zeros(rows.shape[1], dtype=torch.int64)
        reference.clipped_sum_(total, rows[i : i + 1], torch.tensor(plan.offsets), factors[i : i + 1])
        result.append(total)
    return result


def square(vector: Tensor) -> int:
    """Sum of squares in Python integers: no rounding in the judge."""
    high, low = vector >> 16, vector & 0xFFFF
    return (int((high * high).sum()) << 32) + (int((high * low).sum()) << 17) + int((low * low).sum())


def split(elements: int, layers: int) -> list[tuple[str, int]]:
    """``layers`` groups of unequal size."""
    sizes = [max(1, elements * (i + 1) * 2 // (layers * (layers + 1))) for i in range(layers)]
    sizes[-1] += elements - sum(sizes)
    return [(f"layer{i}", size) for i, size in enumerate(sizes)]


METHODS: dict[str, ClippingMethod] = {
    "flat": Flat(0.7),
    "automatic": Automatic(0.7),
    "automatic, small gamma": Automatic(0.7, gamma=1e-6),
    "per layer": PerLayer(0.7),
    "per layer, unequal": PerLayer(5.0, bounds=[3.0, 4.0 * 0.6, 4.0 * 0.8]),
    "custom, clips less than it must": Custom(lambda norms: torch.full_like(norms, 1e6), 0.7),
    "custom, automatic": Custom(lambda norms: 0.7 / (norms + 0.01), 0.7),
}


def adversarial_rows(plan: ClipPlan) -> Tensor:
    """Rows [B, P] with norms far above every bound, most of whose elements round away from zero.

    The worst row of a group has one large element and all others just past a rounding edge, k + 1/2 grid cells:
    each of them gains half a cell. Which real size that is follows from the factor, which follows from the norm.
    """
    groups = [
        group_rows(end - begin, grid)
        for begin, end, grid in zip(plan.offsets, plan.offsets[1:], plan.grid, strict=False)
    ]
    return torch.cat(groups, 1)


def group_rows(elements: int, grid: float) -> Tensor:
    """Rows [27, elements] of norm 1 for one group; ``grid`` is the norm that they will be given."""
    rows = []
    for cells in (0.5, 1.5, 2.5):
        for nudge in (1.0, 1.0 + 1e-6, 1.0 - 1e-6, 1.0 + 1e-3):
            rest = cells * nudge * math.sqrt(elements - 1)
            for sign in (1.0, -1.0):
                row = torch.full((elements,), sign * cells * nudge, dtype=torch.float64)
                row[0] = math.sqrt(max(grid**2 - rest**2, 0.0))
                rows.append(row)
    rows.append(torch.ones(elements, dtype=torch.float64))
    rows.append(torch.full((elements,), 2.0**-12.6, dtype=torch.float64))
    rows[-1][0] = 1.0
    rows.append(torch.randn(elements, dtype=torch.float64))
    stacked = torch.stack(rows)
    return (stacked / stacked.norm(dim=1, keepdim=True)).float()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("elements", [3, 1000, 30_000])
def test_integer_norm_is_at_most_the_grid(name, elements):
    plan = METHODS[name].plan(split(elements, 3))
    rows = adversarial_rows(plan)
    largest = 0
    for magnitude in (1e-8, 1.0, 1e8):
        for scale in (1.0, 2.0**-16):
            for vector in contributions(plan, rows * magnitude, scale):
                largest = max(largest, square(vector))
                assert square(vector) <= GRID**2
    # the grid is used, not merely respected: rows this long lose at most sqrt(P) / 2 of it
    if name in ("flat", "custom, clips less than it must"):
        assert largest >= (GRID * (1 - 2.0**-15) - math.sqrt(elements)) ** 2


@pytest.mark.parametrize("name", ["flat", "automatic", "per layer"])
def test_integer_norm_is_at_most_the_grid_at_300000_elements(name):
    plan = METHODS[name].plan(split(300_000, 3))
    rows = adversarial_rows(plan)[1::5]
    for vector in contributions(plan, rows * 1e3):
        assert square(vector) <= GRID**2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-7, 1.0 - 1e-7, 1e-30])
def test_integer_norm_at_the_bound_itself(name, factor):
    """A row whose norm is R, one ulp more or less, or next to nothing."""
    method = METHODS[name]
    plan = method.plan([("a", 1), ("b", 2), ("c", 4)])
    rows = torch.eye(7) * method.sensitivity * factor
    assert all(square(v) <= GRID**2 for v in contributions(plan, rows))


def test_the_allowance_for_rounding_is_needed():
    """Without sqrt(P) / 2 the adversarial row does exceed the grid: the test above can fail."""
    elements = 300_000
    plan = Flat(1.0).plan([("all", elements)])
    careless = ClipPlan(plan.offsets, plan.bounds, [float(GRID)], None, None, 1.0, plan.names)
    row = torch.full((1, elements), 0.5 + 1e-6, dtype=torch.float64)
    row[0, 0] = math.sqrt(GRID**2 - 0.25 * elements)
    assert square(contributions(careless, row.float())[0]) > GRID**2


def test_per_layer_bounds_hold_layer_by_layer():
    method = PerLayer(13.0, bounds=[3.0, 4.0, 12.0])
    groups = [("a", 1000), ("b", 1), ("c", 5000)]
    plan = method.plan(groups)
    assert plan.offsets == [0, 1000, 1001, 6001] and plan.names == ["a", "b", "c"]
    assert plan.bounds == pytest.approx([3.0, 4.0, 12.0], rel=1e-15)
    for vector in contributions(plan, torch.randn(20, 6001) * 1e4):
        for layer, bound in enumerate(plan.bounds):
            part = vector[plan.offsets[layer] : plan.offsets[layer + 1]]
            share = GRID * bound / 13.0
            assert share * 0.995 < math.sqrt(square(part)) <= share
    small = torch.full((1, 6001), 1e-3)  # below every bound: nothing is clipped
    vector = contributions(plan, small)[0].double() * 13.0 / GRID
    assert (vector - 1e-3).abs().max() < 1e-5 + 13.0 / GRID


def test_per_layer_defaults_to_equal_bounds():
    plan = PerLayer(2.0).plan([("a", 3), ("b", 3), ("c", 3), ("d", 3)])
    assert plan.bounds == pytest.approx([1.0] * 4)
    assert math.fsum(b * b for b in plan.bounds) == pytest.approx(4.0)
    assert all(g < GRID / 2 for g in plan.grid)


@pytest.mark.parametrize("scale", [1.0, 2.0**-10])
def test_released_vector_is_the_clipped_gradient(scale):
    """In units of R / G the integer vector is the textbook's, to rounding and the 2^-16 margin."""
    true = torch.randn(8, 500, dtype=torch.float64) * torch.logspace(-4, 3, 8)[:, None].double()
    rows = (true / scale).float()
    norms = true.norm(dim=1, keepdim=True)
    for method, expected in (
        (Flat(0.7), true * (0.7 / norms).clamp(max=1.0)),
        (Automatic(0.7), true * 0.7 / (norms + 0.01)),
        (Custom(lambda n: 0.3 / (1.0 + n), 0.7), true * 0.3 / (1.0 + norms)),
        (Custom(lambda n: torch.ones_like(n), 0.7), true * (0.7 / norms).clamp(max=1.0)),
    ):
        got = torch.stack(contributions(method.plan([("a", 200), ("b", 300)]), rows, scale)).double() * 0.7 / GRID
        assert (got - expected).abs().max() < 0.7 / GRID + 4e-5 * expected.abs().max(), method


def test_sensitivity_is_r_for_every_method():
    for name, method in METHODS.items():
        assert method.sensitivity == (5.0 if "unequal" in name else 0.7)
        assert method.plan(split(30, 3)).sensitivity == method.sensitivity
        assert isinstance(method, ClippingMethod)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_custom_factors_that_are_no_factors_count_as_zero(value):
    plan = Custom(lambda norms: torch.full_like(norms, value), 1.0).plan([("a", 5)])
    assert not factors_of(plan, torch.randn(3, 5))[0].any()


def test_custom_never_sees_a_way_around_the_selection():
    plan = Custom(lambda norms: norms.fill_(1e300).to(torch.float32) * math.inf, 1.0).plan([("a", 4)])
    assert not factors_of(plan, torch.zeros(2, 4))[0].any()
    plan = Custom(lambda norms: torch.full_like(norms, 1e305), 1.0).plan([("a", 4)])
    rows = torch.tensor([[math.nan] * 4, [0.0] * 4, [1.0] * 4, [math.inf] * 4, [2.0] * 4])
    mask = torch.tensor([True, True, True, True, False])
    factors, _ = factors_of(plan, rows, mask)
    assert factors[[0, 3, 4]].tolist() == [[0.0]] * 3 and factors.isfinite().all()
    total = torch.zeros(4, dtype=torch.int64)
    reference.clipped_sum_(total, rows, torch.tensor([0, 4]), factors)
    assert square(total) <= GRID**2 and total.all()


def test_custom_functions_of_the_wrong_shape_are_refused():
    for fn in (lambda n: n.sum(), lambda n: n[:, None], lambda n: 1.0):
        with pytest.raises(ClippingError, match="must return a tensor"):
            factors_of(Custom(fn, 1.0).plan([("a", 4)]), torch.randn(3, 4))
    with pytest.raises(ClippingError, match="callable"):
        Custom(0.5, 1.0)
    with pytest.raises(ClippingError, match="no function"):
        clipping.custom_factors(Flat(1.0).plan([("a", 4)]), torch.ones(3, 1).double(), torch.ones(3).bool(), 1.0)


def test_resolve_names_and_objects():
    for name, kind in (("flat", Flat), ("automatic", Automatic), ("per_layer", PerLayer)):
        method = clipping.resolve(name, 0.5)
        assert isinstance(method, kind) and method.sensitivity == 0.5 and method.name == name
    given = Automatic(0.5, gamma=0.1)
    assert clipping.resolve(given, 0.5) is given
    for clip, bound, message in (
        ("Flat", 0.5, "not known"),
        (given, 1.0, "same number"),
        (Flat, 0.5, "object of"),
        (None, 0.5, "object of"),
        ("flat", 0.0, "max_grad_norm"),
        ("flat", -1.0, "max_grad_norm"),
        ("flat", math.nan, "max_grad_norm"),
        ("automatic", math.inf, "max_grad_norm"),
    ):
        with pytest.raises(ClippingError, match=message):
            clipping.resolve(clip, bound)


def test_invalid_methods_and_plans_are_refused():
    for build, message in (
        (lambda: Automatic(1.0, gamma=0.0), "gamma"),
        (lambda: PerLayer(1.0, bounds=[1.0, 1.0]), "sqrt"),
        (lambda: PerLayer(1.0, bounds=[1.0, 0.0]), "per-layer bound"),
        (lambda: PerLayer(5.0, bounds=[3.0, 4.0]).plan([("a", 1)]), "2 per-layer bounds were given for 1"),
        (lambda: Flat(1.0).plan([]), "nothing to clip"),
        (lambda: Flat(1.0).plan([("a", -1)]), "'a'"),
        (lambda: Flat(1.0).plan([("a", 2**41)]), "too coarse"),
    ):
        with pytest.raises(ClippingError, match=message):
            build()
