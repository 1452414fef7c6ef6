"""The clipped sum of outer products, and of vectors with numbers, on a CPU: integer sums of rows that nobody keeps."""

from __future__ import annotations

import native_internals
import pytest
import torch
from torch import Tensor

from dp_bitfit_kernels import backends, reference, reference_weights

pytestmark = pytest.mark.skipif(backends.unavailable("native", "cpu") is not None, reason="no compiled backend")

# T, p, d: around blocks of 256, tiles of 12 or 6 rows and 32, 16 or 8 columns, depths of 128
SHAPES = [
    (0, 3, 3),
    (1, 1, 1),
    (2, 5, 7),
    (3, 300, 2),
    (7, 2, 513),
    (127, 13, 33),
    (128, 256, 32),
    (129, 12, 257),
    (400, 20, 31),
]


def native() -> backends.Backend:
    return backends.serving("native", "cpu")


def whole(shape: tuple[int, int, int], batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of whole numbers, whose sums and rounded multiples are exact in any order, and clip factors."""
    steps, p, d = shape
    generator = torch.Generator().manual_seed(sum(shape))
    left, right = (torch.randint(-8, 9, (batch, steps, n), generator=generator).float() for n in (p, d))
    return left, right, torch.rand(batch, generator=generator, dtype=torch.float64) * 1e4


def summed(left: Tensor, right: Tensor, factors: Tensor) -> Tensor:
    rows = torch.bmm(left.double().mT, right.double()).flatten(1)
    return (rows * factors.unsqueeze(1) + 0.5).floor().to(torch.int64).sum(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clipped_outer_sum(shape: tuple[int, int, int]) -> None:
    left, right, factors = whole(shape)
    before = torch.arange(shape[1] * shape[2])
    want = summed(left, right, factors)
    for make in (native(), reference_weights):
        for fresh in (False, True):
            total = before.clone()
            make.clipped_outer_sum_(total, left, right, factors, fresh)  # type: ignore[attr-defined]
            assert torch.equal(total, want if fresh else before + want)


def test_each_row_lies_near_its_sum() -> None:
    """Of any numbers: off by the roundings of sums of 128 terms, added up."""
    left, right = torch.randn(4, 700, 30), torch.randn(4, 700, 40)
    exact = torch.bmm(left.double().mT, right.double()).flatten(1)
    moduli = torch.bmm(left.abs().double().mT, right.abs().double()).flatten(1)
    for i in range(4):
        total = torch.zeros(1200, dtype=torch.int64)
        factors = torch.zeros(4, dtype=torch.float64)
        factors[i] = 2.0**24
        native().clipped_outer_sum_(total, left, right, factors, False)
        error = (total.double() / 2.0**24 - exact[i]).abs()
        assert (error <= (128 + 6) * 2.0**-24 * moduli[i] + 2.0**-24).all()


@pytest.mark.parametrize("kind", ["terms side by side", "a part of more", "one sample repeated"])
def test_any_layout(kind: str) -> None:
    left, right, factors = whole((130, 40, 70))
    if kind == "terms side by side":
        seen, other = left.mT.contiguous().mT, right.mT.contiguous().mT
    elif kind == "a part of more":
        seen, other = (torch.full((130, 3, 99), torch.nan)[:, :, 7 : 7 + x.shape[2]] for x in (left, right))
        seen, other = (to.copy_(x.transpose(0, 1)).transpose(0, 1) for to, x in ((seen, left), (other, right)))
    else:
        seen, other = (x[:1].expand(3, -1, -1) for x in (left, right))
        left, right = seen.contiguous(), other.contiguous()
    for pair in ((seen, right), (left, other), (seen, other)):
        total = torch.zeros(2800, dtype=torch.int64)
        native().clipped_outer_sum_(total, *pair, factors, False)
        assert torch.equal(total, summed(left, right, factors))


def test_a_factor_of_zero_selects_a_sample_away() -> None:
    left, right, factors = whole((20, 30, 40))
    left[1], right[2, 3] = torch.nan, torch.inf
    factors[1] = factors[2] = 0.0
    total = torch.zeros(1200, dtype=torch.int64)
    native().clipped_outer_sum_(total, left, right, factors, True)
    assert torch.equal(total, summed(left[:1], right[:1], factors[:1]))


def test_a_sample_is_the_same_whoever_is_beside_it_and_however_many_threads_there_are() -> None:
    left, right = torch.randn(3, 150, 300), torch.randn(3, 150, 280)
    factors = torch.tensor([0.0, 1e6, 0.0], dtype=torch.float64)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        total = torch.zeros(300 * 280, dtype=torch.int64)
        native().clipped_outer_sum_(total, left, right, factors, False)
        found.append(total)
    torch.set_num_threads(before)
    alone = torch.zeros(300 * 280, dtype=torch.int64)
    native().clipped_outer_sum_(alone, left[1:2], right[1:2], factors[1:2], True)
    assert all(torch.equal(total, alone) for total in found)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if max(shape[1:]) <= 256], ids=str)
def test_each_width(isa: str, shape: tuple[int, int, int]) -> None:
    """And what an int64 cannot hold becomes its smallest, as torch converts."""
    internals = native_internals.load()
    if isa not in internals.isas():
        pytest.skip(f"this processor lacks {isa}")
    left, right, factors = whole(shape, 1)
    for factor in (float(factors[0]), 1e19):
        total = torch.arange(shape[1] * shape[2])
        where = (left.data_ptr(), shape[1], right.data_ptr(), shape[2], shape[0])
        internals.add_outer_sum(isa, total.data_ptr(), *where, factor)
        want = torch.arange(shape[1] * shape[2])
        rows = torch.bmm(left.mT, right).flatten(1)
        reference.clipped_sum_(
            want, rows, torch.tensor([0, len(want)]), torch.full((1, 1), factor, dtype=torch.float64)
        )
        assert torch.equal(total, want)


def test_what_does_not_fit_is_refused() -> None:
    left, right, factors = whole((8, 4, 6))
    total = torch.zeros(24, dtype=torch.int64)
    bad = {
        "total of float32": (total.float(), left, right, factors),
        "total too short": (total[:23], left, right, factors),
        "total with gaps": (torch.zeros(48, dtype=torch.int64)[::2], left, right, factors),
        "factors of float32": (total, left, right, factors.float()),
        "factors of two": (total, left, right, factors[:2]),
        "left of float64": (total, left.double(), right, factors),
        "other samples": (total, left, right[:2], factors),
        "other terms": (total, left, right[:, :7], factors),
        "gaps everywhere": (total, left.repeat(1, 2, 2)[:, ::2, ::2], right, factors),
    }
    for why, arguments in bad.items():
        with pytest.raises(RuntimeError, match="clipped_outer_sum_"):
            native().clipped_outer_sum_(*arguments, False)
            pytest.fail(why)


def test_clipped_index_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (5, 30), generator=generator)
    vectors = torch.randn((5, 30, 130), generator=generator)
    factors = torch.rand(5, generator=generator, dtype=torch.float64) * 1e6
    vectors[3], factors[3] = torch.nan, 0.0
    want = torch.ones((9, 130), dtype=torch.int64)
    for i in (0, 1, 2, 4):
        for t in range(30):
            want[ids[i, t]] += (vectors[i, t].double() * factors[i] + 0.5).floor().to(torch.int64)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for make in (native(), reference_weights):
            total = torch.ones((9, 130), dtype=torch.int64)
            make.clipped_index_sum_(total, ids, vectors, factors)  # type: ignore[attr-defined]
            assert torch.equal(total, want)
    torch.set_num_threads(before)


def test_numbers_out_of_range_and_shapes_that_do_not_fit_are_refused() -> None:
    ids, vectors, factors = torch.tensor([[0, 3]]), torch.ones(1, 2, 4), torch.ones(1, dtype=torch.float64)
    total = torch.zeros((4, 4), dtype=torch.int64)
    bad = {
        "beyond the last": (total, ids + 1, vectors, factors),
        "negative": (total, ids - 1, vectors, factors),
        "other width": (total[:, :3].contiguous(), ids, vectors, factors),
        "other terms": (total, ids[:, :1], vectors, factors),
        "other samples": (total, ids, vectors, factors.repeat(2)),
        "float16": (total, ids, vectors.half(), factors),
    }
    for why, arguments in bad.items():
        with pytest.raises(RuntimeError, match="clipped_index_sum_"):
            native().clipped_index_sum_(*arguments)
            pytest.fail(why)
    assert not total.any()
