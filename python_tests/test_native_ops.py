"""Native CPU ops against the reference: integers, words and noise bit for bit, sums within torch's own error."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import FLOAT_DTYPES, GRAD_CASES, GROUP_CASES, LAYOUTS, GradCase, GroupCase, make_grad, make_rows
from tolerances import FACTOR_RTOL, assert_sum_close

from dp_bitfit_kernels import _extension, reference

reason = _extension.native_available("cpu")
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

ops = torch.ops.dp_bitfit_kernels
KEY = torch.tensor(struct.unpack("<8i", bytes(range(32))), dtype=torch.int32)
STEP = torch.tensor([0x1234_5678_9ABC_DEF0])

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


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def with_threads(count: int, call: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", GRAD_CASES + NATIVE_CASES, ids=str)
def test_bias_grad(case: GradCase, layout: str, dtype: torch.dtype) -> None:
    grad = make_grad(case, layout, dtype)
    assert_sum_close(ops.bias_grad(grad), grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", GRAD_CASES + NATIVE_CASES, ids=str)
def test_bias_grad_into_a_ledger_slice(case: GradCase, layout: str) -> None:
    """Adds to its own columns of a wider ledger, each once, and leaves the others alone."""
    grad = make_grad(case, layout, torch.float32)
    ledger = torch.randn((case.batch, case.features + 7), generator=torch.Generator().manual_seed(1))
    before = ledger.clone()
    rows = ledger[:, 3 : 3 + case.features]
    ops.bias_grad_(rows, grad)
    assert torch.equal(rows, before[:, 3 : 3 + case.features] + ops.bias_grad(grad))
    assert torch.equal(ledger[:, :3], before[:, :3])
    assert torch.equal(ledger[:, 3 + case.features :], before[:, 3 + case.features :])


@pytest.mark.parametrize(
    ("shape", "strides", "why"),
    [
        ((3, 40, 200), (0, 200, 1), "one sample for all"),
        ((3, 40, 200), (200, 0, 1), "gradient of a mean over T"),
        ((3, 40, 200), (40, 1, 0), "gradient of a sum over features"),
        ((3, 40, 200), (0, 0, 0), "gradient of a sum over everything"),
        ((3, 40, 200), (1, 600, 3), "the batch is innermost"),
        ((3, 40, 200), (24000, 600, 2), "every second feature, with gaps"),
        ((3, 40, 200), (200, 600, 1), "sequence first in memory"),
        ((300, 40, 2), (80, 2, 1), "two features: a head"),
        ((3, 5, 200), (1000, 1, 5), "channels first, shorter than a vector"),
    ],
)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bias_grad_of_any_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], why: str, dtype: torch.dtype
) -> None:
    memory = torch.randn(72_000, generator=torch.Generator().manual_seed(2)).to(dtype)
    grad = memory.as_strided(shape, strides)
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


@pytest.mark.parametrize("layout", ["features_last", "channels_first"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_an_odd_value_stays_in_its_own_row_and_column(layout: str, odd: float) -> None:
    grad = make_grad(GradCase(3, 23, 37, "masked tails in both layouts"), layout, torch.float32)
    want = ops.bias_grad(grad)
    for t, c in ((0, 0), (15, 20), (22, 36)):
        spoilt = grad.clone()
        spoilt[1, t, c] = odd
        got = ops.bias_grad(spoilt)
        assert not got[1, c].isfinite()
        got[1, c] = want[1, c]
        assert torch.equal(got, want)


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "time", "features"])
def test_bias_grad_beyond_32_bit_offsets(far: int) -> None:
    """Offsets of 2^31 elements and more; the untouched pages of the buffer cost no memory."""
    strides = [64, 4, 1]
    strides[far] = 2**30 + 8
    buffer = torch.empty(2 * (2**30 + 8) + 256, dtype=torch.float16)
    grad = buffer.as_strided((3, 3, 3), strides)
    grad.copy_(torch.randn((3, 3, 3), generator=torch.Generator().manual_seed(3)))
    assert_sum_close(ops.bias_grad(grad), grad)


@pytest.mark.parametrize("gamma", [None, 0.01], ids=["flat", "automatic"])
@pytest.mark.parametrize("extra", [False, True], ids=["", "extra_squares"])
@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_clip_factors(case: GroupCase, extra: bool, gamma: float | None) -> None:
    rows, offsets = make_rows(case)
    groups = len(offsets) - 1
    generator = torch.Generator().manual_seed(5)
    bounds = torch.rand(groups, generator=generator, dtype=torch.float64) + 0.1
    grid = torch.rand(groups, generator=generator, dtype=torch.float64) * 2.0**20
    mask = torch.ones(case.batch, dtype=torch.bool)
    mask[-1] = False
    squares = torch.rand((case.batch, groups), generator=generator, dtype=torch.float64) if extra else None
    arguments = (rows, offsets, mask, bounds, grid, squares, 1.0 / 3.0, gamma)
    factors, norms = ops.clip_factors(*arguments)
    want_factors, want_norms = reference.clip_factors(*arguments)
    torch.testing.assert_close(norms, want_norms, rtol=FACTOR_RTOL, atol=0.0)
    torch.testing.assert_close(factors, want_factors, rtol=FACTOR_RTOL, atol=0.0)
    assert factors[-1].abs().max() == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_norms_of_tiny_and_huge_rows_neither_vanish_nor_overflow(scale: float) -> None:
    rows, offsets = make_rows(GROUP_CASES[1], scale)
    one = torch.ones(1, dtype=torch.float64)
    _, norms = ops.clip_factors(rows, offsets, torch.ones(len(rows), dtype=torch.bool), one, one, None, 1.0, None)
    torch.testing.assert_close(norms[:, 0], rows.double().norm(dim=1), rtol=FACTOR_RTOL, atol=0.0)


@pytest.mark.parametrize("where", ["row", "extra_squares"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_selected_to_zero(odd: float, where: str) -> None:
    """In every group, and whole: the other rows are as if it were masked."""
    rows, offsets = make_rows(GROUP_CASES[2])
    groups = len(offsets) - 1
    squares = torch.zeros((len(rows), groups), dtype=torch.float64)
    if where == "row":
        rows[1, -1] = odd
    else:
        squares[1, 0] = odd
    mask = torch.ones(len(rows), dtype=torch.bool)
    ones = torch.ones(groups, dtype=torch.float64)
    factors, _ = ops.clip_factors(rows, offsets, mask, ones, ones * 2.0**20, squares, 1.0, None)
    mask[1] = False
    want, _ = ops.clip_factors(rows, offsets, mask, ones, ones * 2.0**20, squares, 1.0, None)
    assert torch.equal(factors, want)
    assert torch.equal(factors[1], torch.zeros(groups, dtype=torch.float64))
    total, without = torch.zeros((2, rows.shape[1]), dtype=torch.int64)
    ops.clipped_sum_(total, rows, offsets, factors)
    others = [0, *range(2, len(rows))]
    ops.clipped_sum_(without, rows[others], offsets, factors[others])
    assert torch.equal(total, without)


@pytest.mark.parametrize("magnitude", [1.0, 1e6, 2.0**50, 2.0**52, 1e18])
@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_clipped_sum(case: GroupCase, magnitude: float, threads: int) -> None:
    """The last three magnitudes leave the range of the vector loop's rounding."""
    rows, offsets = make_rows(case)
    generator = torch.Generator().manual_seed(6)
    factors = (torch.rand((case.batch, len(offsets) - 1), generator=generator, dtype=torch.float64) - 0.5) * magnitude
    factors[0] = 0.0
    rows[0] = float("nan")
    total = torch.randint(-(2**40), 2**40, (rows.shape[1],), generator=generator)
    want = total.clone()
    ops.clipped_sum_(total, rows, offsets, factors)
    reference.clipped_sum_(want, rows, offsets, factors)
    assert torch.equal(total, want)


def test_clipped_sum_rounds_ties_and_signs_as_floor() -> None:
    values = [-2.5, -2.0, -1.5, -0.75, -0.5, -0.25, -0.0, 0.0, 0.25, 0.49999997, 0.5, 0.75, 1.5, 2.5, 1e-45, -1e-45]
    rows = torch.tensor([values])
    total = torch.zeros(len(values), dtype=torch.int64)
    ops.clipped_sum_(total, rows, torch.tensor([0, len(values)]), torch.ones((1, 1), dtype=torch.float64))
    assert total.tolist() == [-2, -2, -1, -1, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 0, 0]


def test_clipped_sum_is_the_same_over_any_split() -> None:
    rows, offsets = make_rows(GROUP_CASES[2])
    factors = torch.full((len(rows), len(offsets) - 1), 12345.678, dtype=torch.float64)
    whole = torch.zeros(rows.shape[1], dtype=torch.int64)
    ops.clipped_sum_(whole, rows, offsets, factors)
    for size in (1, 2, 4):
        parts = torch.zeros_like(whole)
        for start in reversed(range(0, len(rows), size)):
            ops.clipped_sum_(parts, rows[start : start + size], offsets, factors[start : start + size])
        assert torch.equal(parts, whole)


RFC_8439 = [
    pytest.param(
        (0x09000000, 0x4A000000, 0),
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
        id="2.3.2",
    ),
    pytest.param(
        (0, 0x4A000000, 0),
        "224f51f3401bd9e12fde276fb8631ded8c131f823d2c06e27e4fcaec9ef3cf78"
        "8a3b0aa372600a92b57974cded2b9334794cba40c63e34cdea212c4cf07d41b7"
        "69a6749f3f630f4122cafe28ec4dc47e26d4346d70b98c73f3e9c53ac40c5945"
        "398b6eda1a832c89c167eacd901d7e2bf363",
        id="2.4.2",
    ),
]


@pytest.mark.parametrize(("nonce", "stream_hex"), RFC_8439)
def test_random_words_are_chacha20(nonce: tuple[int, int, int], stream_hex: str) -> None:
    """RFC 8439: key 00 01 ... 1f, block counter from 1. Section 2.4.2's text has 114 bytes: two blocks, cut off."""
    want = bytes.fromhex(stream_hex)
    step = torch.tensor([nonce[0] | nonce[1] << 32])
    count = 8 * (-(-len(want) // 64))
    words = ops.random_words(KEY, step, nonce[2], 8, count)
    assert struct.pack(f"<{count}q", *words.tolist())[: len(want)] == want


@pytest.mark.parametrize("first", [0, 1, 7, 8, 255, 256, 2**35 - 1000])
@pytest.mark.parametrize("count", [0, 1, 9, 1000])
def test_random_words(first: int, count: int, threads: int) -> None:
    stream = 2**32 - 1
    words = ops.random_words(KEY, STEP, stream, first, count)
    assert torch.equal(words, reference.random_words(KEY, STEP, stream, first, count))


@pytest.mark.parametrize("noise_std", [0.0, 0.3, 2.0**20, 2.0**40])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (13, 3), (0, 4096), (7, 50_001)])
def test_noisy_sum(first: int, count: int, noise_std: float, threads: int) -> None:
    total = torch.randint(-(2**50), 2**50, (count,), generator=torch.Generator().manual_seed(7))
    arguments = (total, KEY, STEP, 5, first, noise_std, 1.0 / 3.0e6)
    assert torch.equal(ops.noisy_sum(*arguments), reference.noisy_sum(*arguments))


def test_any_slice_of_the_noise_can_be_drawn_on_its_own() -> None:
    total = torch.zeros(1000, dtype=torch.int64)
    whole = ops.noisy_sum(total, KEY, STEP, 0, 0, 1e6, 1.0)
    for first, last in ((0, 3), (3, 10), (10, 999), (999, 1000)):
        assert torch.equal(ops.noisy_sum(total[first:last], KEY, STEP, 0, first, 1e6, 1.0), whole[first:last])


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
