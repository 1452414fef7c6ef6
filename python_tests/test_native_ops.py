"""Native CPU ops beyond the common contract (test_ops.py): blocking of the loops, threads, saturation, messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FLOAT_DTYPES, GROUP_CASES, KEY, LAYOUTS, STEP, GradCase, GroupCase, make_grad, make_rows
from tolerances import assert_sum_close

from dp_bitfit_kernels import _extension, reference

reason = _extension.native_available("cpu")
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

ops = torch.ops.dp_bitfit_kernels

# Beyond the shared table: what the blocking of these loops can get wrong.
NATIVE_CASES = (
    GradCase(2, 1000, 1, "p = 1: contiguous along T whatever the strides say"),
    GradCase(2, 1000, 40, "several chunks of 128 rows, the last one cut off"),
    GradCase(3, 135, 16, "one vector of columns; groups of 8, 4, 2 and 1 rows"),
    GradCase(3, 20, 17, "the last vector overlaps all but one column of the first"),
    GradCase(1, 40, 2100, "one sample: cut into tiles of columns, two threads share it"),
    GradCase(2, 2070, 5, "channels first: a remainder shorter than a vector joins the chunk before it"),
    GradCase(9, 16, 9, "channels first: one vector a channel, eight channels and one more"),
)


def with_threads(count: int, call: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", NATIVE_CASES, ids=str)
def test_bias_grad_of_blocked_shapes(case: GradCase, layout: str, dtype: torch.dtype) -> None:
    grad = make_grad(case, layout, dtype)
    assert_sum_close(ops.bias_grad(grad), grad)


@pytest.mark.parametrize("layout", ["features_last", "channels_first", "every_second"])
@pytest.mark.parametrize("case", [NATIVE_CASES[1], GradCase(3, 700, 2100, "tiles for one sample alone")], ids=str)
def test_a_row_depends_neither_on_its_batch_mates_nor_on_the_threads(case: GradCase, layout: str) -> None:
    grad = make_grad(case, layout, torch.float32)
    rows = with_threads(1, lambda: ops.bias_grad(grad))
    assert torch.equal(with_threads(2, lambda: ops.bias_grad(grad)), rows)
    for count in (1, 2):
        alone = with_threads(count, lambda: torch.cat([ops.bias_grad(grad[i : i + 1]) for i in range(case.batch)]))
        assert torch.equal(alone, rows)


@pytest.mark.parametrize("magnitude", [2.0**52, 1e18])
@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_clipped_sum_beyond_the_fast_rounding(case: GroupCase, magnitude: float) -> None:
    """These magnitudes leave the range of the vector loop's rounding; what an int64 cannot hold is as in torch."""
    rows, offsets = make_rows(case)
    generator = torch.Generator().manual_seed(6)
    factors = (torch.rand((case.batch, len(offsets) - 1), generator=generator, dtype=torch.float64) - 0.5) * magnitude
    total = torch.randint(-(2**40), 2**40, (rows.shape[1],), generator=generator)
    want = total.clone()
    ops.clipped_sum_(total, rows, offsets, factors)
    reference.clipped_sum_(want, rows, offsets, factors)
    assert torch.equal(total, want)


def test_integers_words_and_noise_do_not_depend_on_the_threads() -> None:
    rows, offsets = make_rows(GroupCase(9, (0, 70_000), "work for two threads"))
    factors = torch.full((9, 1), 12345.678, dtype=torch.float64)

    def run() -> list[torch.Tensor]:
        total = torch.zeros(rows.shape[1], dtype=torch.int64)
        ops.clipped_sum_(total, rows, offsets, factors)
        words = ops.random_words(KEY, STEP, 0, 3, 70_000)
        return [total, words, ops.noisy_sum(total, KEY, STEP, 0, 3, 2.0**20, 1.0)]

    for one, two in zip(with_threads(1, run), with_threads(2, run), strict=True):
        assert torch.equal(one, two)


ROWS, OFFSETS = torch.zeros(2, 4), torch.tensor([0, 4])
MASK, ONE = torch.ones(2, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
TOTAL, FACTORS = torch.zeros(4, dtype=torch.int64), torch.ones((2, 1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.bias_grad(torch.zeros(2, 3)), r"bias_grad: grad must be \[B, T, p\]"),
        (lambda: ops.bias_grad(torch.zeros(2, 3, 4).double()), "bias_grad: grad must be float32, bfloat16 or float16"),
        (lambda: ops.bias_grad_(torch.zeros(2, 5), torch.zeros(2, 3, 4)), r"rows \[2, 5\] do not fit grad \[2, 3, 4\]"),
        (lambda: ops.bias_grad_(torch.zeros(4, 2).t(), torch.zeros(2, 3, 4)), "column stride 1"),
        (lambda: ops.bias_grad_(torch.zeros(4).expand(2, 4), torch.zeros(2, 3, 4)), "must not overlap"),
        (lambda: ops.clip_factors(ROWS, torch.tensor([0, 3]), MASK, ONE, ONE, None, 1.0, None), "offsets must rise"),
        (lambda: ops.clip_factors(ROWS, OFFSETS, MASK[:1], ONE, ONE, None, 1.0, None), "mask must have one element"),
        (lambda: ops.clip_factors(ROWS, OFFSETS, MASK, ONE.float(), ONE, None, 1.0, None), "bounds must be Double"),
        (lambda: ops.clip_factors(ROWS, OFFSETS, MASK, ONE, ONE, ONE, 1.0, None), "extra_squares must have 2 dim"),
        (lambda: ops.clipped_sum_(TOTAL.int(), ROWS, OFFSETS, FACTORS), "total must be Long"),
        (lambda: ops.clipped_sum_(TOTAL[:3], ROWS, OFFSETS, FACTORS), "total must have one element a column"),
        (lambda: ops.clipped_sum_(TOTAL, ROWS, OFFSETS, FACTORS[:1]), r"factors must be \[2, 1\]"),
        (lambda: ops.noisy_sum(TOTAL, KEY[:7], STEP, 0, 0, 1.0, 1.0), "key must have 8 elements"),
        (lambda: ops.noisy_sum(TOTAL, KEY, STEP, 0, 0, -1.0, 1.0), "noise_std must lie in"),
        (lambda: ops.noisy_sum(TOTAL, KEY, STEP, 0, 0, float("nan"), 1.0), "noise_std must lie in"),
        (lambda: ops.random_words(KEY, STEP, 2**32, 0, 1), "stream must be a 32-bit number"),
        (lambda: ops.random_words(KEY, STEP, -1, 0, 1), "stream must be a 32-bit number"),
        (lambda: ops.random_words(KEY, STEP, 0, 2**35 - 1, 2), r"leave the 2\^35 words"),
        (lambda: ops.random_words(KEY, STEP, 0, -1, 2), r"leave the 2\^35 words"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
