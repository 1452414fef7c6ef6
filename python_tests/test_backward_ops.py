"""One contract for the ops that keep little for backward, on every backend and device (lanes.py).

Integers, bits and single products equal the reference bit for bit. What has room is held against float64: at most
twice the reference's own float32 error, and one rounding to the dtype of the result.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backward_cases import (
    CASES,
    CLAMPS,
    COUNTS,
    GRAD_CALLS,
    INF,
    KINDS,
    LONG_MATES,
    MATES,
    NAN,
    BackwardCase,
    Data,
    GradCall,
    activation_inputs,
    inside,
    make_data,
)
from cases import FLOAT_DTYPES
from lanes import Lane
from tolerances import assert_sum_close
from torch import Tensor

from dp_bitfit_kernels import reference_backward
from dp_bitfit_kernels._validate import OpError

CALLS = [
    pytest.param(call, dtype, reduce, id=f"{name}-{str(dtype)[6:]}-{reduce}")
    for name, call in GRAD_CALLS.items()
    for dtype in call.dtypes
    for reduce in call.reduces
]
FLOAT32_CALLS = [p for p in CALLS if p.values[1] == torch.float32]
# A dtype changes loads, stores and their vectors, not how a shape is cut: the short ones take part of the shapes.
SHAPED_CALLS = [
    pytest.param(*call.values, case, id=f"{call.id}-{case}")
    for call in CALLS
    for case in CASES
    if call.values[1] == torch.float32 or case.every_dtype
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(got: Tensor, want: Tensor) -> None:
    """Equal shapes, dtypes and values; NaN equals NaN."""
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0, equal_nan=True)


def widened(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.dtype.is_floating_point else a for a in arguments)


def assert_near_oracle(got: Tensor, call: GradCall, arguments: tuple[Any, ...]) -> None:
    op = getattr(reference_backward, call.op)
    exact = op(*widened(arguments, torch.float64))[0]
    if exact.numel() == 0:
        return
    own = (op(*widened(arguments, torch.float32))[0].double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    # A few elements alone can be right by luck: one float32 rounding of the largest is always allowed.
    info = torch.finfo(got.dtype)
    allowed = 2.0 * max(own, 2.0**-24 * largest) + 0.5 * info.eps * exact.abs() + 0.5 * info.tiny * info.eps
    worst = ((got.double() - exact).abs() - allowed).max().item()
    assert worst <= 0.0, f"{worst:.3e} beyond twice {own:.3e} and one rounding"


def assert_rows(rows: Tensor, summed: Tensor, reduce: int) -> None:
    if reduce == 0:
        assert rows.shape == (0,)
        assert rows.dtype == torch.float32
    else:
        assert_sum_close(rows, summed if reduce == 1 else summed.transpose(1, 2))


def check_grad_call(lane: Lane, call: GradCall, data: Data) -> None:
    arguments = call.make(data)
    dx, rows = lane(call.op, *arguments)
    assert dx.shape == data.grad.shape
    assert dx.dtype == data.grad.dtype
    if call.exact:
        same(dx, getattr(reference_backward, call.op)(*arguments)[0])
    else:
        assert_near_oracle(dx, call, arguments)
    assert_rows(rows, data.grad if call.sums_grad else dx, data.reduce)


@pytest.mark.parametrize(("call", "dtype", "reduce", "case"), SHAPED_CALLS)
def test_grad_and_rows(lane: Lane, call: GradCall, dtype: torch.dtype, reduce: int, case: BackwardCase) -> None:
    case.skip_where_interpreted()
    check_grad_call(lane, call, make_data(case, dtype, reduce))


@pytest.mark.parametrize("offset", [3])
@pytest.mark.parametrize(("call", "dtype", "reduce"), CALLS)
def test_from_any_address(lane: Lane, call: GradCall, dtype: torch.dtype, reduce: int, offset: int) -> None:
    check_grad_call(lane, call, make_data(BackwardCase(2, 6, 72, "vectors, were it aligned"), dtype, reduce, offset))


@pytest.mark.parametrize("case", [MATES, LONG_MATES], ids=str)
@pytest.mark.parametrize(("call", "dtype", "reduce"), FLOAT32_CALLS)
def test_a_sample_does_not_depend_on_its_batch_mates(
    lane: Lane, call: GradCall, dtype: torch.dtype, reduce: int, case: BackwardCase
) -> None:
    case.skip_where_interpreted()
    data = make_data(case, dtype, reduce)
    dx, rows = lane(call.op, *call.make(data))
    for i in range(case.batch):
        alone, own_rows = lane(call.op, *call.make(data.sample(i)))
        same(alone, dx[i : i + 1])
        if reduce:
            same(own_rows, rows[i : i + 1])
    again, rows_again = lane(call.op, *call.make(data))
    same(again, dx)
    same(rows_again, rows)


@pytest.mark.parametrize("odd", [NAN, INF])
@pytest.mark.parametrize(("call", "dtype", "reduce"), FLOAT32_CALLS)
def test_an_odd_gradient_stays_in_its_place(
    lane: Lane, call: GradCall, dtype: torch.dtype, reduce: int, odd: float
) -> None:
    """In its element, its row of a layer norm or its group of a group norm, and in its own sum."""
    data = make_data(BackwardCase(3, 6, 37, "six channels: three groups of two"), dtype, reduce)
    dx, rows = lane(call.op, *call.make(data))
    for r, c in ((0, 0), (3, 20), (5, 36)):
        data.mask[1, r, c], data.slopes[1, r, c], data.x[1, r, c] = True, 2**23, 0.25
        before, rows_before = lane(call.op, *call.make(data))
        kept = data.grad[1, r, c].item()
        data.grad[1, r, c] = odd
        got, got_rows = lane(call.op, *call.make(data))
        data.grad[1, r, c] = kept
        reached = torch.zeros(dx.shape, dtype=torch.bool)
        width = 6 // data.groups
        where = {"element": (r, c), "row": (r,), "group": (slice(r // width * width, r // width * width + width),)}
        reached[(1, *where[call.spread])] = True
        same(got[~reached], before[~reached])
        assert not got[1, r, c].isfinite()
        if reduce:
            place = (1, c if reduce == 1 else r)
            assert not got_rows[place].isfinite()
            got_rows[place] = rows_before[place]
            same(got_rows, rows_before)


def test_a_bit_that_is_off_selects_zero(lane: Lane) -> None:
    x = normal(2, 3, 40)
    mask = torch.arange(x.numel()).view(x.shape) % 3 != 0
    x[~mask] = NAN
    y, rows = lane("bit_scale", inside(x), reference_backward.pack_bits(mask), 2.0, 0.0, 1)
    same(y, torch.where(mask, 2.0 * x, 0.0))
    assert rows.isfinite().all()
    assert lane("bit_scale", inside(x), reference_backward.pack_bits(mask), 2.0, 0.5, 0)[0][~mask].isnan().all()


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_an_odd_input_of_an_activation_stays_in_its_element(lane: Lane, kind: int) -> None:
    x = normal(2, 5, 33)
    want, _ = lane("activation_grad", torch.ones_like(x), x, kind, 0)
    spoilt = x.clone()
    spoilt[1, 2, 3] = NAN
    got, _ = lane("activation_grad", torch.ones_like(x), spoilt, kind, 0)
    assert got[1, 2, 3].isnan()
    got[1, 2, 3] = want[1, 2, 3]
    same(got, want)
    y, codes = lane("slope_pack", spoilt, kind)
    want_y, want_codes = lane("slope_pack", x, kind)
    place = (1 * 5 + 2) * 33 + 3
    assert y[1, 2, 3].isnan()
    assert codes[:, place].tolist() == [0, 0, 0]
    y[1, 2, 3], codes[:, place] = want_y[1, 2, 3], want_codes[:, place]
    same(y, want_y)
    same(codes, want_codes)


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_the_derivative_over_its_whole_range(lane: Lane, kind: int) -> None:
    x = torch.cat([torch.linspace(-12.0, 12.0, 4001), activation_inputs(59, torch.Generator().manual_seed(1))])
    x = x.view(1, 4, -1)
    got, _ = lane("activation_grad", torch.ones_like(x), x, kind, 0)
    exact, own = reference_backward.derivative(x.double(), kind), reference_backward.derivative(x, kind)
    error, own_error = ((d.double() - exact).abs().max().item() for d in (got, own))
    assert error <= max(2.4e-7, 2.0 * own_error), f"error {error:.3e}, the reference's {own_error:.3e}"


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("count", COUNTS)
def test_pack_bits(lane: Lane, count: int, offset: int) -> None:
    mask = inside(normal(count) > 0.0, offset)
    same(lane("pack_bits", mask), reference_backward.pack_bits(mask))


def odd_values(count: int, limits: tuple[float, ...]) -> Tensor:
    x = normal(count) * 2.0
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, *limits])
    x[: len(special)] = special[:count]
    return x


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", CLAMPS)
def test_clamp_pack(lane: Lane, name: str, count: int, dtype: torch.dtype, offset: int) -> None:
    limits = CLAMPS[name]
    x = inside(odd_values(count, limits[:2]).to(dtype), offset)
    want, want_bits = reference_backward.clamp_pack(x, *limits)
    y, bits = lane("clamp_pack", x, *limits)
    same(y, want)
    same(bits, want_bits)
    place = lane.put(x.clone())
    same(lane("clamp_pack_", place, *limits), want_bits)
    same(place.cpu(), want)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_level_pack(lane: Lane, count: int, dtype: torch.dtype, offset: int) -> None:
    edges = torch.tensor([-2.0, -1.5, -0.7000123, 0.0, 0.1, 1.0, INF])
    x = inside(odd_values(count, tuple(edges.tolist())).to(dtype), offset)
    same(lane("level_pack", x, edges), reference_backward.level_pack(x, edges))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_slope_pack(lane: Lane, kind: int, count: int, offset: int) -> None:
    x = inside(activation_inputs(count, torch.Generator().manual_seed(2)), offset)
    want_codes = reference_backward.slope_pack(x, kind)[1].double()
    exact = reference_backward._value(x.double(), kind)
    y, codes = lane("slope_pack", x, kind)
    assert y.shape == x.shape
    assert codes.shape == (3, count)
    assert codes.dtype == torch.uint8
    # Torch's own float32 value is 1.5 to 4 of these units off, by kind.
    largest = torch.maximum(x.abs(), y.abs())
    ulp = (torch.nextafter(largest, torch.tensor(INF)) - largest).double()
    assert ((y.double() - exact).abs() <= 2.0 * ulp).all()
    weights = torch.tensor([[1.0], [256.0], [65536.0]], dtype=torch.float64)
    assert ((codes.double() - want_codes) * weights).sum(0).abs().le(2.0).all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (7, 33), (3, 1), (1, 1100), (0, 8), (4, 0), (2, 5000)], ids=str)
def test_quantize_norm(lane: Lane, shape: tuple[int, int], dtype: torch.dtype, offset: int) -> None:
    x = inside((normal(*shape) * 3.0).to(dtype), offset)
    mean = inside(normal(shape[0], seed=1), offset)
    rstd = inside(normal(shape[0], seed=2).abs() + 0.5, offset)
    if shape == (5, 64):
        x[0], mean[0] = 0.25, 0.25  # a row of equal values: largest is 0
        x[1, 3], x[2, 5], x[2, 6] = NAN, INF, -INF
    want, want_scale = reference_backward.quantize_norm(x, mean, rstd)
    codes, scale = lane("quantize_norm", x, mean, rstd)
    assert codes.dtype == torch.int8
    assert codes.shape == want.shape
    assert (codes.int() - want.int()).abs().le(1).all()
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0.0)


def test_packed_rows_give_the_gradient_of_torch(lane: Lane) -> None:
    """Both halves of an op pair together: what is packed in forward scales the gradient in backward."""
    x, grad = normal(2, 5, 29) * 3.0, normal(2, 5, 29, seed=1)
    _, bits = lane("clamp_pack", x, 0.0, 6.0, 0.0)
    same(lane("bit_scale", grad, bits, 1.0, 0.0, 0)[0], grad * ((x > 0.0) & (x < 6.0)))
    for kind in range(len(KINDS)):
        y, codes = lane("slope_pack", x, kind)
        dx, _ = lane("slope_scale", grad, codes, 0)
        want = grad.double() * reference_backward.derivative(x.double(), kind)
        assert (dx.double() - want).abs().max().item() <= 3e-7 * grad.abs().max().item()
    edges = torch.linspace(-3.0, 3.0, 7)
    planes = lane("level_pack", x, edges)
    levels = normal(8, seed=2)
    code = (x.unsqueeze(-1) > edges).sum(-1)
    same(lane("level_scale", grad, planes, levels, 0)[0], grad * levels[code])


G, X = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
BITS, COLUMN, ROW = torch.zeros(6, dtype=torch.uint8), torch.ones(6), torch.ones(8)
GROUPED = torch.ones(2, 3)
PLANES, EDGES, LEVELS = torch.zeros(3, 6, dtype=torch.uint8), torch.arange(7.0), torch.ones(8)
CODES = torch.zeros(3, 48, dtype=torch.uint8)
BAD_CALLS: dict[str, tuple[Any, ...]] = {
    "mask of uint8": ("pack_bits", BITS),
    "mask that is not contiguous": ("pack_bits", torch.zeros(4, 6, dtype=torch.bool).t()),
    "x of int64": ("clamp_pack", G.long(), 0.0, 1.0, 0.0),
    "x that is not contiguous": ("clamp_pack", G.transpose(1, 2), 0.0, 1.0, 0.0),
    "x of int64, in place": ("clamp_pack_", G.long(), 0.0, 1.0, 0.0),
    "x that is not contiguous, in place": ("clamp_pack_", G.transpose(1, 2), 0.0, 1.0, 0.0),
    "bits too short": ("bit_scale", G, BITS[:5], 1.0, 0.0, 0),
    "bits of int8": ("bit_scale", G, BITS.to(torch.int8), 1.0, 0.0, 0),
    "grad of two dimensions": ("bit_scale", G[0], BITS[:3], 1.0, 0.0, 0),
    "grad that is not contiguous": ("bit_scale", G.transpose(1, 2), BITS, 1.0, 0.0, 0),
    "grad of int64": ("bit_scale", G.long(), BITS, 1.0, 0.0, 0),
    "reduce of 3": ("bit_scale", G, BITS, 1.0, 0.0, 3),
    "negative reduce": ("activation_grad", G, X, 0, -1),
    "x of another shape": ("activation_grad", G, X[:1], 0, 0),
    "x of another dtype": ("activation_grad", G, X.half(), 0, 0),
    "kind of 4": ("activation_grad", G, X, 4, 0),
    "negative kind": ("slope_pack", X, -1),
    "x of bfloat16": ("slope_pack", X.bfloat16(), 0),
    "grad of bfloat16": ("slope_scale", G.bfloat16(), CODES, 0),
    "codes too short": ("slope_scale", G, CODES[:, :47].contiguous(), 0),
    "two code bytes": ("slope_scale", G, CODES[:2], 0),
    "six edges": ("level_pack", X, EDGES[:6]),
    "edges of float64": ("level_pack", X, EDGES.double()),
    "two planes": ("level_scale", G, PLANES[:2], LEVELS, 0),
    "seven levels": ("level_scale", G, PLANES, LEVELS[:7], 0),
    "levels of float64": ("level_scale", G, PLANES, LEVELS.double(), 0),
    "x of three dimensions": ("quantize_norm", X, GROUPED, GROUPED),
    "mean too short": ("quantize_norm", X.view(6, 8), COLUMN[:5], COLUMN),
    "x too short": ("layer_norm_grad", G, X[:1], None, COLUMN, COLUMN, None, 1),
    "shift too short": ("layer_norm_grad", G, X, COLUMN[:5], COLUMN, COLUMN, None, 1),
    "scale [B, R]": ("layer_norm_grad", G, X, None, GROUPED, COLUMN, None, 1),
    "rstd too short": ("layer_norm_grad", G, X, None, COLUMN, COLUMN[:5], None, 1),
    "weight [R]": ("layer_norm_grad", G, X, None, COLUMN, COLUMN, COLUMN[:3], 1),
    "sums over the normalised dimension": ("layer_norm_grad", G, X, None, COLUMN, COLUMN, None, 2),
    "x of half the size": ("group_norm_grad", G, X[:, :, :4].contiguous(), None, GROUPED, GROUPED, None),
    "two groups of three channels": ("group_norm_grad", G, X, None, GROUPED[:, :2], GROUPED[:, :2], None),
    "no groups": ("group_norm_grad", G, X, None, GROUPED[:, :0], GROUPED[:, :0], None),
    "shift of one group": ("group_norm_grad", G, X, GROUPED[:, :1], GROUPED, GROUPED, None),
    "weight [S]": ("group_norm_grad", G, X, None, GROUPED, GROUPED, ROW),
    "scale of the other dimension": ("affine_grad", G, ROW, 2),
    "affine without a dimension": ("affine_grad", G, ROW, 0),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_refused_by_the_op(lane: Lane, name: str, request: pytest.FixtureRequest) -> None:
    if "cuda source" in request.node.callspec.id:
        pytest.skip("checks are the ops', not the kernels'")
    op, *arguments = BAD_CALLS[name]
    with pytest.raises((RuntimeError, OpError), match=str(op).rstrip("_")):
        lane(str(op), *arguments)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_the_reference_refuses_the_same(name: str) -> None:
    op, *arguments = BAD_CALLS[name]
    with pytest.raises(OpError, match=str(op).rstrip("_")):
        getattr(reference_backward, str(op))(*arguments)


@pytest.mark.parametrize(("call", "dtype", "reduce"), CALLS)
def test_the_fake_has_the_same_shapes(lane: Lane, call: GradCall, dtype: torch.dtype, reduce: int) -> None:
    arguments = call.make(make_data(MATES, dtype, reduce))
    real = lane(call.op, *arguments)
    fake = getattr(torch.ops.dp_bitfit_kernels, call.op)(
        *(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)
    )
    assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_the_derivative_of_the_specification_is_torchs(kind: int) -> None:
    x = torch.linspace(-12.0, 12.0, 1001, dtype=torch.float64, requires_grad=True)
    reference_backward._value(x, kind).sum().backward()
    torch.testing.assert_close(reference_backward.derivative(x.detach(), kind), x.grad, rtol=0.0, atol=1e-14)


def test_the_norms_of_the_specification_are_torchs() -> None:
    grad, x = normal(2, 6, 10).double(), normal(2, 6, 10, seed=1).double().requires_grad_()
    for groups in (None, 3):
        shape = (12, 10) if groups is None else (2, 3, 20)
        seen = x.detach().reshape(shape)
        mean, rstd = seen.mean(-1), 1.0 / (seen.var(-1, unbiased=False) + 1e-5).sqrt()
        weight = normal(10 if groups is None else 6, seed=2).double()
        if groups is None:
            y = torch.nn.functional.layer_norm(x, (10,), weight)
            dx, rows = reference_backward.layer_norm_grad(grad, x.detach(), mean, rstd, rstd, weight, 1)
        else:
            y = torch.nn.functional.group_norm(x, groups, weight)
            dx, rows = reference_backward.group_norm_grad(grad, x.detach(), mean, rstd, rstd, weight)
        (want,) = torch.autograd.grad(y, x, grad)
        torch.testing.assert_close(dx, want, rtol=0.0, atol=1e-13)
        torch.testing.assert_close(rows, grad.sum(1 if groups is None else 2))
