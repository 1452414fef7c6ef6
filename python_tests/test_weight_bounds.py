"""The sensitivity of trained weights: whatever a sample holds, its rounded part has norm at most GRID."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from probe import Probe, integer_norm, without
from torch import Tensor
from weight_cases import CASES, NORMS

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import backends
from dp_bitfit_kernels._precision import full_precision
from dp_bitfit_kernels.clipping import GRID, Flat
from dp_bitfit_kernels.functional_window import Window
from dp_bitfit_kernels.grams import gamma, gram_squares, gram_sum, served
from dp_bitfit_kernels.weight_uses import Convolution, Lookup, Product
from dp_bitfit_kernels.weights import WeightSink, Workshop

U = 2.0**-24


def workshop(norm: str, at_once: int | None = None) -> Workshop:
    made = Workshop(backends.select("auto", "cpu"), torch.device("cpu"), norm)
    made.at_once = at_once or made.at_once
    return made


def sink(
    norm: str, shape: tuple[int, ...], *uses: object, how: str | None = None, at_once: int | None = None
) -> WeightSink:
    made = WeightSink(workshop(norm, at_once), "weight", torch.Size(shape), 0, uses[0].batch)  # type: ignore[attr-defined]
    if how is not None:
        made.plan = lambda use: how  # type: ignore[method-assign, assignment]
    for use in uses:
        made.take(use)  # type: ignore[arg-type]
    return made


def summed(made: WeightSink, bound: float) -> Tensor:
    """[p * d] int64: the clipped sum of a batch that holds nothing else."""
    plan = Flat(bound).plan([("weight", made.height * made.width)])
    norms = made.squares().sqrt().unsqueeze(1)
    factors = torch.where(norms.isfinite(), plan.grid[0] / norms.clamp(min=bound), 0.0)
    total = torch.zeros(made.height * made.width, dtype=torch.int64)
    made.add_clipped(total, factors)
    return total


def length(total: Tensor) -> float:
    return math.sqrt(sum(int(v) ** 2 for v in total[total != 0].tolist()))


def opposed(terms: int, p: int, d: int, rest: float, spread: float = 0.0, scale: float = 1.0) -> Product:
    """Tokens that cancel in pairs but for ``rest``: M is far larger than the norm, a float32 Gram is all rounding."""
    generator = torch.Generator().manual_seed(terms + p)
    left, right = (torch.randn(1, terms, n, generator=generator) for n in (p, d))
    left[:, 1::2] = -left[:, ::2] * (1 + rest)
    right[:, 1::2] = right[:, ::2] * (1 + spread * torch.rand(1, terms // 2, 1, generator=generator))
    return Product(left * scale, right)


ADVERSARIES = {
    "opposed tokens": opposed(64, 20, 30, 1e-7),
    "opposed, many": opposed(1500, 8, 40, 3e-7),
    "opposed, wide": opposed(4, 1500, 60, 1e-6),
    "nearly opposed": opposed(64, 20, 30, 0.0, 1e-6),
    "tiny": opposed(64, 20, 30, 1e-7, scale=1e-18),
    "large": opposed(64, 20, 30, 1e-7, scale=1e15),
    "one token": opposed(2, 20, 30, 1e-3),
    "aligned": Product(torch.ones(1, 999, 10), torch.ones(1, 999, 11)),
    "one large among many": Product(
        torch.eye(1, 200).view(1, 200, 1).expand(1, 200, 12) * 1e6 + 1.0, torch.ones(1, 200, 9)
    ),
}


@pytest.mark.parametrize("bound", [1e-9, 1e-3, 1.0])
@pytest.mark.parametrize("how", ["ghost", "made", "kept"])
@pytest.mark.parametrize("use", ADVERSARIES.values(), ids=ADVERSARIES)
def test_a_sample_adds_at_most_the_grid(use, how, bound):
    total = summed(sink("mixed", (use.left.shape[2], use.right.shape[2]), use, how=how), bound)
    assert length(total) <= GRID


@pytest.mark.parametrize("use", ADVERSARIES.values(), ids=ADVERSARIES)
def test_norms_bound_what_any_order_of_float32_additions_makes(use):
    """Rows made with their terms in other orders, one by one, are no longer than the norm that is clipped by."""
    shape = (use.left.shape[2], use.right.shape[2])
    for how in ("ghost", "made"):
        bound = float(sink("mixed", shape, use, how=how).squares().sqrt())
        for seed in range(3):
            order = torch.randperm(use.terms, generator=torch.Generator().manual_seed(seed))
            row = torch.zeros(shape)
            for start in range(0, use.terms, 512):
                part = torch.zeros(shape)
                for t in order[start : start + 512]:
                    part += torch.outer(use.left[0, t], use.right[0, t])
                row += part
            assert float(row.double().norm()) <= bound


@pytest.mark.parametrize("rest", [1e-5, 1e-4, 3e-4, 1e-3, 1e-2])
def test_no_ghost_norm_is_below_the_exact_one(rest):
    """Where so much cancels that what is left has the size of a float32 Gram's rounding."""
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(2000, 2, 600, generator=generator), torch.randn(2000, 2, 24, generator=generator)
    left[:, 1::2] = -left[:, ::2] * (1 + rest * torch.rand(2000, 1, 1, generator=generator))
    right[:, 1::2] = right[:, ::2]
    exact = torch.einsum("btp,btd->bpd", left.double(), right.double()).flatten(1).norm(dim=1)
    assert (sink("mixed", (600, 24), Product(left, right), how="ghost").squares().sqrt() >= exact).all()


def test_a_gram_below_all_numbers_is_no_norm():
    """Opposed tokens so long that l_s . l_t leaves float32 below, while |l_s|^2 and |l_t|^2 just do not above."""
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(4096, 1, 384, generator=generator, dtype=torch.float64)
    left = torch.cat([left, -left * (1 + 2e-7 * torch.randn(left.shape, generator=generator, dtype=torch.float64))], 1)
    room = 1 - 2e-7 * torch.rand((4096, 1, 1), generator=generator, dtype=torch.float64)
    longest = left.norm(dim=2).amax(1)[:, None, None]
    left = (left / longest * (torch.finfo(torch.float32).max * room).sqrt()).float()
    right = torch.zeros(4096, 2, 40)
    right[:, 0, 0], right[:, 1, 0], right[:, 1, 1] = 1.0, 1e-3, 1.0
    exact = torch.einsum("btp,btd->bpd", left.double(), right.double()).flatten(1).square().sum(1)
    found = sink("mixed", (384, 40), Product(left, right), how="ghost").squares()
    assert (found >= exact).all()
    raw, _ = gram_squares(Product(left, right).factors(slice(0, 4096)), backends.serving("auto", "cpu"))
    assert raw.isneginf().any() or not found.isfinite().all()


def test_the_bound_costs_little_where_tokens_are_not_opposed():
    torch.manual_seed(0)
    use = Product(torch.randn(4, 300, 40), torch.randn(4, 300, 50))
    exact = torch.einsum("btp,btd->bpd", use.left.double(), use.right.double()).flatten(1).norm(dim=1)
    for how, most in (("ghost", 1.005), ("made", 1.005), ("kept", 1.005)):
        ratio = sink("mixed", (40, 50), use, how=how).squares().sqrt() / exact
        assert (ratio >= 1).all() and (ratio < most).all()


def test_the_length_of_others_moves_no_factor():
    """A sample's norm is the same, up to the float32 rounding of its own sums, however far its batch is padded, though
    the way of taking it changes: what the room left by the bound came to would multiply all samples of a batch."""
    torch.manual_seed(0)
    left, right = torch.randn(2, 20, 300), torch.randn(2, 20, 400)
    norms, plans = [], set()
    for terms in (20, 60, 120, 150, 512):
        padded = [torch.nn.functional.pad(x, (0, 0, 0, terms - 20)) for x in (left, right)]
        made = WeightSink(workshop("mixed"), "weight", torch.Size((300, 400)), 0, 2)
        plans.add(made.plan(Product(*padded)))
        made.take(Product(*padded))
        norms.append(made.squares().sqrt())
        norms.append(sink("mixed", (300, 400), Product(*padded), how="made").squares().sqrt())
    assert plans == {"ghost", "kept"}
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0], rtol=5e-7, atol=0)


def test_sizes_are_upper_bounds():
    """M is at least the norm of the sum of moduli, for every kind of use."""
    torch.manual_seed(0)
    window = Window((2, 1), (1, 0), (1, 2), 2)
    image, grad = torch.randn(3, 4, 7, 9), torch.randn(3, 6, 4, 5)
    uses = {
        "linear": Product(torch.randn(3, 9, 5), torch.randn(3, 9, 7)),
        "convolution": Convolution(grad, image, window, (2, 3)),
        "embedding": Lookup(torch.randint(0, 4, (3, 9)), torch.randn(3, 9, 5)),
    }
    for name, use in uses.items():
        positive = type(use)(
            **{k: v.abs() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in vars(use).items()}
        )
        rows = positive.rows(slice(0, 3), slice(0, 6 if name != "linear" else 5)).double().flatten(1).norm(dim=1)
        size, _, _ = use.sizes()
        assert (size * (1 + 1e-6) >= rows).all() and (size <= 40 * rows).all(), name


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_sizes_that_grams_tell_are_upper_bounds(name):
    """And within their room: of the square of a length that float32 holds, every other one is rounded down."""
    torch.manual_seed(0)
    window = Window((1, 1), (1, 0), (1, 1), 1)
    use = {
        "linear": Product(torch.randn(500, 1, 3), torch.randn(500, 1, 5)),
        "convolution": Convolution(torch.randn(500, 6, 2, 1), torch.randn(500, 1, 2, 2), window, (3, 2)),
    }[name]
    factors = use.factors(slice(0, 500))
    assert factors is not None and served([factors])
    _, sizes = gram_squares(factors, backends.serving("auto", "cpu"))
    left, right = (x.double().norm(dim=3).flatten(1) for x in (factors.left, factors.right))
    exact = torch.stack([left * right, left, right]).sum(2)
    assert (sizes >= exact).all() and (sizes <= exact * (1 + 2e-6)).all()


def test_grams_of_all_kinds_of_uses_together():
    """An embedding and linear layers on parts of one weight: cross terms as in the sum of their rows."""
    torch.manual_seed(0)
    ids = torch.randint(0, 7, (3, 5))
    uses = [
        Lookup(ids, torch.randn(3, 5, 4)),
        Product(torch.randn(3, 6, 7), torch.randn(3, 6, 4)),
        Product(torch.randn(3, 2, 3), torch.randn(3, 2, 4), first=2),
        Lookup(ids.flip(1), torch.randn(3, 5, 4)),
        Product(torch.randn(3, 4, 2), torch.randn(3, 4, 4), first=5),
    ]
    rows = sum(use.rows(slice(0, 3), slice(0, 7)).double() for use in uses)
    want = rows.flatten(1).square().sum(1)
    for at_once in (1, 50, 10**6):
        factors = [use.factors(slice(0, 3)) for use in uses]
        torch.testing.assert_close(gram_sum(factors, at_once), want, rtol=1e-5, atol=0)
        torch.testing.assert_close(gram_sum([f.double() for f in factors], at_once), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("at_once", [1, 7, 60, 10**6])
@pytest.mark.parametrize("name", ["linear", "embedding and linear", "convolution"])
def test_pieces_make_the_same_sum(name, at_once):
    """However few elements are made at a time."""
    torch.manual_seed(0)
    dense = Product(torch.randn(4, 5, 6), torch.randn(4, 5, 3))
    table = Lookup(torch.randint(0, 6, (4, 9)), torch.randn(4, 9, 3))
    window = Window((1, 1), (0, 0), (1, 1), 1)
    convolution = Convolution(torch.randn(4, 6, 2, 2), torch.randn(4, 3, 3, 2), window, (2, 1))
    uses, shape = {
        "linear": ((dense,), (6, 3)),
        "embedding and linear": ((table, dense), (6, 3)),
        "convolution": ((convolution,), (6, 3, 2, 1)),
    }[name]
    whole = summed(sink("mixed", shape, *uses, how="made", at_once=10**6), 1.0)
    pieces = summed(sink("mixed", shape, *uses, how="made", at_once=at_once), 1.0)
    assert whole.any() and (whole - pieces).abs().max() <= 4  # one cell a sample
    found = []
    for total, fresh in ((torch.zeros_like(whole), False), (torch.full_like(whole, 7), True)):
        again = sink("mixed", shape, *uses, how="made", at_once=at_once)
        again.add_clipped(total, torch.full((4, 1), float(GRID), dtype=torch.float64), fresh)
        found.append(total)
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(3, 5), (200, 500)], ids=str)
def test_kept_rows_begin_a_sum_in_pieces(shape):
    """A sum that is new is zeroed piece by piece, whatever its memory held, and no element is added to twice."""
    torch.manual_seed(0)
    use = Product(*(torch.randn(2, 4, n) for n in shape))
    rows = use.rows(slice(0, 2), slice(0, shape[0])).flatten(1)
    factors = torch.tensor([[3e3], [5e4]], dtype=torch.float64)
    before = torch.arange(rows.shape[1])
    want = (rows.double() * factors + 0.5).floor().to(torch.int64).sum(0)
    for fresh in (False, True):
        total = before.clone()
        sink("mixed", shape, use, how="kept").add_clipped(total, factors, fresh)
        assert torch.equal(total, want if fresh else want + before)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_images_with_channels_last(groups):
    """However images lie in memory; larger ones, which go through the library one at a time, too."""
    window, generator = Window((1, 1), (1, 1), (1, 1), groups), torch.Generator().manual_seed(0)
    for height, depth, side in ((6, 4, 3), (260, 40 * groups, 6), (16, 16, 40)):
        grad, x = (torch.randn(2, n, side, side, generator=generator) for n in (height, depth))
        want = Convolution(grad, x, window, (3, 3)).rows(slice(0, 2), slice(0, height))
        turned = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
        found = Convolution(*turned, window, (3, 3)).rows(slice(0, 2), slice(0, height))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3)


def test_plans_go_by_shapes():
    window = Window((1, 1), (3, 3), (1, 1), 1)
    plans = {
        "a head's weight is no larger than what makes it": (
            Product(torch.zeros(2, 128, 64), torch.zeros(2, 128, 64)),
            "kept",
        ),
        "short texts, wide layers": (Product(torch.zeros(2, 8, 512), torch.zeros(2, 8, 512)), "ghost"),
        "one vector a sample": (Product(torch.zeros(2, 1, 300), torch.zeros(2, 1, 300)), "ghost"),
        "longer texts": (Product(torch.zeros(2, 260, 512), torch.zeros(2, 260, 512)), "kept"),
        "small images, large windows": (Convolution(*[torch.zeros(2, 100, 7, 7)] * 2, window, (7, 7)), "ghost"),
        "larger images": (Convolution(*[torch.zeros(2, 100, 14, 14)] * 2, window, (7, 7)), "made"),
        "so long that the bound is dear": (
            Product(torch.zeros(1, 1, 1).expand(1, 10**6, 2000), torch.zeros(1, 1, 1).expand(1, 10**6, 2000)),
            "kept",
        ),
        "tokens": (Lookup(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, 8)), "tokens"),
    }
    for why, (use, plan) in plans.items():
        shapes = {Lookup: (50, 8), Convolution: (100, 100, 7, 7)}
        width = (use.left.shape[2], use.right.shape[2]) if isinstance(use, Product) else shapes[type(use)]
        made = WeightSink(workshop("mixed"), "weight", torch.Size(width), 0, use.batch)
        assert made.plan(use) == plan, why  # type: ignore[arg-type]
        for norm, same in (("ghost", "ghost"), ("instantiate", "kept")):
            forced = WeightSink(workshop(norm), "weight", torch.Size(width), 0, use.batch)
            assert forced.plan(use) == ("tokens" if plan == "tokens" else same)  # type: ignore[arg-type]


def test_gamma_is_highams():
    assert gamma(100, U) == 100 * U / (1 - 100 * U) and gamma(2**24, U) == math.inf


def test_half_precision_does_not_overflow_in_a_gram():
    """float16 products of 300 times 300 are infinite; norms are taken of float64 copies, rows of float32 ones."""
    left, right = torch.full((2, 3, 4), 300.0).half(), torch.full((2, 3, 5), 300.0).half()
    for how in ("ghost", "made", "kept"):
        made = sink("mixed", (4, 5), Product(left, right), how=how)
        torch.testing.assert_close(made.squares(), torch.full((2,), 20 * (3 * 9e4) ** 2).double(), rtol=3e-4, atol=0)
        assert length(summed(sink("mixed", (4, 5), Product(left[:1], right[:1]), how=how), 1.0)) <= GRID


def test_lower_precisions_are_off_and_put_back():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        modes = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul, torch.backends.cudnn.conv
        asked = [mode.fp32_precision for mode in modes]
        with full_precision():
            assert all(mode.fp32_precision == "ieee" for mode in modes)
        assert [mode.fp32_precision for mode in modes] == asked and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_tokens_are_summed_before_the_norm():
    """Equal and opposite gradients of one token are no gradient; padding's were taken out before."""
    ids, grad = torch.tensor([[2, 2, 1]]), torch.tensor([[[1.0, 2.0], [-1.0, -2.0], [3.0, 4.0]]])
    made = sink("mixed", (4, 2), Lookup(ids, grad))
    assert float(made.squares()) == 25.0
    total = summed(made, 10.0).view(4, 2)  # nothing is clipped: R = 10 stands for G'
    grid = Flat(10.0).plan([("weight", 8)]).grid[0]
    assert not total[[0, 2, 3]].any() and total[1].tolist() == [round(0.3 * grid), round(0.4 * grid)]


@pytest.mark.parametrize("norm, rows", [*((norm, False) for norm in NORMS), ("mixed", True)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sample_left_out_moves_the_release_by_at_most_the_bound(case, norm, rows, request):
    """Over all trained elements, by the weight of its loss as by the mask, where every gradient is far beyond R."""
    if not rows:
        request.getfixturevalue("no_rows")
    x, bound = case.batch(), 0.7
    model = dpk.convert_model(case.model(), train_modules=("*",), memory=case.memory)
    probe = Probe(model, bound=bound, expected=1.0, per_sample_norm=norm, loss_reduction="sum")
    assert bool(probe.ledger.sunk) is not rows or norm == "instantiate"  # whose linear layers have rows

    def loss(weights: Tensor):  # type: ignore[no-untyped-def]
        return lambda scores: (weights * F.cross_entropy(scores, torch.arange(len(x)) % 3, reduction="none")).sum()

    every = torch.full((len(x),), 1e4)
    whole, released = probe.step(x, loss(every)), probe.inner.releases[-1]
    for left in range(len(x)):
        without_it = probe.step(x, loss(every), without(len(x), left))
        assert GRID * 0.9 <= integer_norm(whole - without_it) <= GRID
        assert (released - probe.inner.releases[-1]).double().norm() <= bound * (1 + 1e-6)
        assert torch.equal(probe.step(x, loss(every.index_fill(0, torch.tensor([left]), 0.0))), without_it)
