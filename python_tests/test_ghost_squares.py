"""Squared norms by Gram matrices, on a CPU: equal to the reference in float64, each sample by itself."""

from __future__ import annotations

import native_internals
import pytest
import torch
from torch import Tensor

from dp_bitfit_kernels import backends, grams, reference_weights

pytestmark = pytest.mark.skipif(backends.unavailable("native", "cpu") is not None, reason="no compiled backend")

# T, p, d: around squares of 256, tiles of 12 or 6 rows and 32, 16 or 8 columns, depths of 128, turned blocks of 8
SHAPES = [
    (0, 4, 4),
    (1, 1, 1),
    (2, 3, 5),
    (5, 8, 0),
    (7, 385, 9),
    (47, 33, 384),
    (48, 16, 100),
    (49, 5, 1),
    (130, 1000, 70),
    (256, 7, 128),
    (257, 129, 8),
    (520, 40, 33),
]


def ghost_squares(left: Tensor, right: Tensor) -> Tensor:
    return backends.serving("native", "cpu").ghost_squares(left, right)[0]


def factors(batch: int, steps: int, *widths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(steps)
    return [torch.randn((batch, steps, width), generator=generator) for width in widths]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ghost_squares(shape: tuple[int, int, int]) -> None:
    steps, *widths = shape
    left, right = factors(3, steps, *widths)
    rows = torch.bmm(left.double().transpose(1, 2), right.double())
    want = rows.square().sum((1, 2))
    ideal, ideal_sizes = reference_weights.ghost_squares(left, right)
    torch.testing.assert_close(ideal, want)
    found, sizes = backends.serving("native", "cpu").ghost_squares(left, right)
    torch.testing.assert_close(sizes, ideal_sizes, rtol=1e-6, atol=0)
    largest = (left.double().norm(dim=2) * right.double().norm(dim=2)).sum(1)
    error = grams.gram_error(max(1, widths[0]), max(1, widths[1]), steps * steps, double=False)
    assert ((found - want).abs() <= error * largest.square()).all()
    assert ((found - want).abs() <= 2e-6 * largest.square()).all()


def test_any_strides_of_samples_and_terms() -> None:
    left, right = factors(4, 50, 20, 30)
    want = ghost_squares(left, right)
    wide = torch.full((50, 4, 37), torch.nan)
    wide[:, :, 5:25] = left.transpose(0, 1)
    assert torch.equal(ghost_squares(wide[:, :, 5:25].transpose(0, 1), right), want)
    assert torch.equal(ghost_squares(left[:1].expand(4, -1, -1), right)[:1], want[:1])


def test_terms_may_lie_side_by_side() -> None:
    """As the windows of an image do: [B, p, T] seen as [B, T, p]."""
    for steps, width in ((50, 20), (300, 130), (1, 5), (6, 1)):
        left, right = factors(2, steps, width, 30)
        turned = left.mT.contiguous().mT
        assert torch.equal(ghost_squares(turned, right), ghost_squares(left, right))
        assert torch.equal(ghost_squares(right, turned), ghost_squares(right, left))


def test_a_sample_that_is_not_finite_is_alone_with_it() -> None:
    left, right = factors(4, 60, 40, 40)
    want = ghost_squares(left, right)
    left[1, 30, 7], right[2, 59, 39] = torch.nan, torch.inf
    found = ghost_squares(left, right)
    assert not found[1].isfinite() and not found[2].isfinite()
    assert torch.equal(found[[0, 3]], want[[0, 3]])


def test_threads_change_no_bit() -> None:
    left, right = factors(3, 300, 65, 17)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ghost_squares(left, right))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_does_not_fit_is_refused() -> None:
    left, right = factors(2, 8, 4, 4)
    doubled, wide = (left.double(), right), (left.repeat(1, 2, 2)[:, ::2, ::2], right)
    for bad in [(left, right[:1]), (left, right[:, :7]), (left[0], right), doubled, wide]:
        with pytest.raises(RuntimeError, match="ghost_squares"):
            ghost_squares(*bad)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_width(isa: str, shape: tuple[int, int, int]) -> None:
    """Sums of other lanes, within the same bound: what fuses multiplication and addition is not asked for bits."""
    internals = native_internals.load()
    if isa not in internals.isas():
        pytest.skip(f"this processor lacks {isa}")
    steps, *widths = shape
    left, right = factors(1, steps, *widths)
    found = internals.ghost_squares(isa, left.data_ptr(), right.data_ptr(), steps, *widths)
    squares, sizes = reference_weights.ghost_squares(left, right)
    want = torch.cat([squares, sizes[:, 0]])
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), want, rtol=1e-5, atol=1e-6)
