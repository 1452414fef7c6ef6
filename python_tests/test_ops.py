"""One contract for the ops of every backend and device: equal to the reference, integers and words bit for bit."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from cases import FLOAT_DTYPES, GRAD_CASES, GROUP_CASES, KEY, LAYOUTS, STEP, GradCase, GroupCase, make_grad, make_rows
from lanes import Lane
from tolerances import FACTOR_RTOL, assert_sum_close
from torch import Tensor

from dp_bitfit_kernels import reference


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", GRAD_CASES, ids=str)
def test_bias_grad(lane: Lane, case: GradCase, layout: str, dtype: torch.dtype) -> None:
    grad = make_grad(case, layout, dtype)
    assert_sum_close(lane("bias_grad", grad), grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", GRAD_CASES, ids=str)
def test_bias_grad_into_a_ledger_slice(lane: Lane, case: GradCase, layout: str) -> None:
    """Adds to its own columns of a wider ledger, each once, and leaves the others alone."""
    grad = make_grad(case, layout, torch.float32)
    before = torch.randn((case.batch, case.features + 7), generator=torch.Generator().manual_seed(1))
    ledger = before.clone().to(lane.device)
    lane("bias_grad_", ledger[:, 3 : 3 + case.features], grad)
    after = ledger.cpu()
    assert_sum_close(after[:, 3 : 3 + case.features], grad, before[:, 3 : 3 + case.features])
    assert torch.equal(after[:, :3], before[:, :3])
    assert torch.equal(after[:, 3 + case.features :], before[:, 3 + case.features :])


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
        ((4, 1, 1), (1, 1, 1), "one step of one feature"),
    ],
)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bias_grad_of_any_strides(
    lane: Lane, shape: tuple[int, ...], strides: tuple[int, ...], why: str, dtype: torch.dtype
) -> None:
    # Few bits each: sums of equal elements, as expanded tensors hold, are exact in any order.
    memory = torch.randn(72_000, generator=torch.Generator().manual_seed(2)).bfloat16().to(dtype)
    grad = memory.as_strided(shape, strides)
    assert_sum_close(lane("bias_grad", grad), grad)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("layout", ["features_last", "channels_first"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bias_grad_from_any_address(lane: Lane, layout: str, dtype: torch.dtype, offset: int) -> None:
    memory = torch.randn(2 * 40 * 64 + 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    strides = (40 * 64, 64, 1) if layout == "features_last" else (40 * 64, 1, 40)
    grad = memory.as_strided((2, 40, 64), strides, offset)
    assert_sum_close(lane("bias_grad", grad), grad)


@pytest.mark.parametrize("layout", ["features_last", "channels_first", "every_second"])
@pytest.mark.parametrize("length", [196, 5000])
def test_a_row_does_not_depend_on_its_batch_mates(lane: Lane, layout: str, length: int) -> None:
    grad = make_grad(GradCase(3, length, 6, "long enough to be split"), layout, torch.bfloat16)
    rows = lane("bias_grad", grad)
    for i in range(3):
        assert torch.equal(lane("bias_grad", grad[i : i + 1]), rows[i : i + 1])
    again = lane("bias_grad", grad)
    assert torch.equal(again, rows)


@pytest.mark.parametrize("layout", ["features_last", "channels_first"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_an_odd_value_stays_in_its_own_row_and_column(lane: Lane, layout: str, odd: float) -> None:
    grad = make_grad(GradCase(3, 23, 37, "masked tails in both layouts"), layout, torch.float32)
    want = lane("bias_grad", grad)
    for t, c in ((0, 0), (15, 20), (22, 36)):
        spoilt = make_grad(GradCase(3, 23, 37, ""), layout, torch.float32)
        spoilt[1, t, c] = odd
        got = lane("bias_grad", spoilt)
        assert not got[1, c].isfinite()
        got[1, c] = want[1, c]
        assert torch.equal(got, want)


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "time", "features"])
def test_bias_grad_beyond_32_bit_offsets(lane: Lane, far: int) -> None:
    """Offsets of 2^31 elements and more; on a CPU the untouched pages of the buffer cost no memory."""
    strides = [64, 4, 1]
    strides[far] = 2**30 + 8
    values = torch.randn((3, 3, 3), generator=torch.Generator().manual_seed(3)).half()
    buffer = torch.empty(2 * (2**30 + 8) + 256, dtype=torch.float16, device=lane.device)
    grad = buffer.as_strided((3, 3, 3), strides)
    grad.copy_(values)
    assert_sum_close(lane("bias_grad", grad), values)


@pytest.mark.parametrize("gamma", [None, 0.01], ids=["flat", "automatic"])
@pytest.mark.parametrize("extra", [False, True], ids=["", "extra_squares"])
@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_clip_factors(lane: Lane, case: GroupCase, extra: bool, gamma: float | None) -> None:
    rows, offsets = make_rows(case)
    groups = len(offsets) - 1
    generator = torch.Generator().manual_seed(5)
    bounds = torch.rand(groups, generator=generator, dtype=torch.float64) + 0.1
    grid = torch.rand(groups, generator=generator, dtype=torch.float64) * 2.0**20
    mask = torch.ones(case.batch, dtype=torch.bool)
    mask[-1] = False
    squares = torch.rand((case.batch, groups), generator=generator, dtype=torch.float64) if extra else None
    arguments = (rows, offsets, mask, bounds, grid, squares, 1.0 / 3.0, gamma)
    factors, norms = lane("clip_factors", *arguments)
    want_factors, want_norms = reference.clip_factors(*arguments)
    torch.testing.assert_close(norms, want_norms, rtol=FACTOR_RTOL, atol=0.0)
    torch.testing.assert_close(factors, want_factors, rtol=FACTOR_RTOL, atol=0.0)
    assert factors[-1].abs().max() == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_norms_of_tiny_and_huge_rows_neither_vanish_nor_overflow(lane: Lane, scale: float) -> None:
    rows, offsets = make_rows(GROUP_CASES[1], scale)
    one = torch.ones(1, dtype=torch.float64)
    _, norms = lane("clip_factors", rows, offsets, torch.ones(len(rows), dtype=torch.bool), one, one, None, 1.0, None)
    torch.testing.assert_close(norms[:, 0], rows.double().norm(dim=1), rtol=FACTOR_RTOL, atol=0.0)


def summed(lane: Lane, start: Tensor, rows: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """The total after clipped_sum_ [P] int64, on the CPU."""
    total = start.clone().to(lane.device)
    lane("clipped_sum_", total, rows, offsets, factors)
    return total.cpu()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("where", ["row", "extra_squares"])
@pytest.mark.parametrize("case", [GROUP_CASES[1], GROUP_CASES[2]], ids=str)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_selected_to_zero(lane: Lane, odd: float, case: GroupCase, where: str) -> None:
    """In every group, and whole: the other rows are as if it were masked."""
    rows, offsets = make_rows(case)
    groups = len(offsets) - 1
    squares = torch.zeros((len(rows), groups), dtype=torch.float64)
    if where == "row":
        rows[1, -1] = odd
    else:
        squares[1, 0] = odd
    mask = torch.ones(len(rows), dtype=torch.bool)
    ones = torch.ones(groups, dtype=torch.float64)
    arguments = (ones, ones * 2.0**20, squares, 1.0, None)
    factors, _ = lane("clip_factors", rows, offsets, mask, *arguments)
    mask[1] = False
    want, _ = lane("clip_factors", rows, offsets, mask, *arguments)
    assert torch.equal(factors, want)
    assert torch.equal(factors[1], torch.zeros(groups, dtype=torch.float64))
    others = [0, *range(2, len(rows))]
    zero = torch.zeros(rows.shape[1], dtype=torch.int64)
    with_it = summed(lane, zero, rows, offsets, factors)
    assert torch.equal(with_it, summed(lane, zero, rows[others], offsets, factors[others]))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_norm_that_overflows_only_by_its_scale_is_dropped(lane: Lane) -> None:
    rows = torch.full((2, 4), 3e38)
    rows[1] = 1.0
    one, mask = torch.ones(1, dtype=torch.float64), torch.ones(2, dtype=torch.bool)
    factors, norms = lane("clip_factors", rows, torch.tensor([0, 4]), mask, one, one, None, 1e300, None)
    assert norms[0, 0] == math.inf
    assert factors[0, 0] == 0.0
    assert factors[1, 0] > 0.0


def test_factors_of_a_row_do_not_depend_on_the_batch(lane: Lane) -> None:
    rows, offsets = make_rows(GROUP_CASES[2])
    groups = torch.ones(len(offsets) - 1, dtype=torch.float64)
    mask = torch.ones(len(rows), dtype=torch.bool)
    factors, norms = lane("clip_factors", rows, offsets, mask, groups, groups, None, 1.0, 0.01)
    alone = lane("clip_factors", rows[2:3], offsets, mask[2:3], groups, groups, None, 1.0, 0.01)
    assert torch.equal(alone[0], factors[2:3])
    assert torch.equal(alone[1], norms[2:3])


@pytest.mark.parametrize("magnitude", [1.0, 1e6, 2.0**50])
@pytest.mark.parametrize("case", [*GROUP_CASES, GroupCase(5, (0, 3, 1024), "every row starts on 16 bytes")], ids=str)
def test_clipped_sum(lane: Lane, case: GroupCase, magnitude: float) -> None:
    rows, offsets = make_rows(case)
    if case.offsets[-1] % 4 == 0:
        rows = rows.contiguous()
    generator = torch.Generator().manual_seed(6)
    factors = (torch.rand((case.batch, len(offsets) - 1), generator=generator, dtype=torch.float64) - 0.5) * magnitude
    factors[0] = 0.0
    rows[0] = float("nan")
    start = torch.randint(-(2**40), 2**40, (rows.shape[1],), generator=generator)
    want = start.clone()
    reference.clipped_sum_(want, rows, offsets, factors)
    assert torch.equal(summed(lane, start, rows, offsets, factors), want)


def test_clipped_sum_rounds_ties_and_signs_as_floor(lane: Lane) -> None:
    values = [-2.5, -2.0, -1.5, -0.75, -0.5, -0.25, -0.0, 0.0, 0.25, 0.49999997, 0.5, 0.75, 1.5, 2.5, 1e-45, -1e-45]
    rows, offsets = torch.tensor([values]), torch.tensor([0, len(values)])
    zero = torch.zeros(len(values), dtype=torch.int64)
    total = summed(lane, zero, rows, offsets, torch.ones((1, 1), dtype=torch.float64))
    assert total.tolist() == [-2, -2, -1, -1, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 0, 0]


def test_clipped_sum_is_the_same_over_any_split(lane: Lane) -> None:
    rows, offsets = make_rows(GROUP_CASES[2])
    factors = torch.full((len(rows), len(offsets) - 1), 12345.678, dtype=torch.float64)
    whole = summed(lane, torch.zeros(rows.shape[1], dtype=torch.int64), rows, offsets, factors)
    for size in (1, 2, 4):
        parts = torch.zeros_like(whole)
        for start in reversed(range(0, len(rows), size)):
            parts = summed(lane, parts, rows[start : start + size], offsets, factors[start : start + size])
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
def test_random_words_are_chacha20(lane: Lane, nonce: tuple[int, int, int], stream_hex: str) -> None:
    """RFC 8439: key 00 01 ... 1f, block counter from 1. Section 2.4.2's text has 114 bytes: two blocks, cut off."""
    want = bytes.fromhex(stream_hex)
    step = torch.tensor([nonce[0] | nonce[1] << 32])
    count = 8 * (-(-len(want) // 64))
    words = lane("random_words", KEY, step, nonce[2], 8, count)
    assert struct.pack(f"<{count}q", *words.tolist())[: len(want)] == want


@pytest.mark.parametrize("first", [0, 1, 7, 8, 255, 2**32 - 4, 2**35 - 1030])
@pytest.mark.parametrize("count", [0, 1, 9, 1030])
def test_random_words(lane: Lane, first: int, count: int) -> None:
    words = lane("random_words", KEY, STEP, 2**32 - 1, first, count)
    assert torch.equal(words, reference.random_words(KEY, STEP, 2**32 - 1, first, count))


@pytest.mark.parametrize("noise_std", [0.0, 0.3, 2.0**20, 2.0**40])
@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 0), (0, 1), (1, 1), (13, 3), (0, 4096), (8, 2048), (7, 5001), (2**32 - 4, 9), (2**35 - 3, 3)],
)
def test_noisy_sum(lane: Lane, first: int, count: int, noise_std: float) -> None:
    """Bit for bit the reference's: words, logarithm, sine, cosine, rounding."""
    total = torch.randint(-(2**50), 2**50, (count,), generator=torch.Generator().manual_seed(7))
    arguments = (total, KEY, STEP, 5, first, noise_std, 1.0 / 3.0e6)
    assert torch.equal(lane("noisy_sum", *arguments), reference.noisy_sum(*arguments))


@pytest.mark.parametrize(("first", "begin", "count"), [(0, 0, 4096), (16, 8, 64), (3, 1, 1000), (8, 3, 24), (0, 5, 0)])
def test_noisy_sum_into_a_part(lane: Lane, first: int, begin: int, count: int) -> None:
    """The same bits, wherever the part lies, and nothing beside it."""
    total = torch.randint(-(2**50), 2**50, (count,), generator=torch.Generator().manual_seed(7))
    arguments = (KEY, STEP, 5, first, 2.0**20, 1.0 / 3.0e6)
    release = lane.put(torch.full((begin + count + 7,), 3.0))
    lane("noisy_sum_", release[begin : begin + count], total, *arguments)
    want = torch.full((begin + count + 7,), 3.0)
    want[begin : begin + count] = reference.noisy_sum(total, *arguments)
    assert torch.equal(release.cpu(), want)
    into = torch.full_like(want, 3.0)
    reference.noisy_sum_(into[begin : begin + count], total, *arguments)
    assert torch.equal(into, want)


def test_any_slice_of_the_noise_can_be_drawn_on_its_own(lane: Lane) -> None:
    total = torch.zeros(1000, dtype=torch.int64)
    whole = lane("noisy_sum", total, KEY, STEP, 0, 0, 1e6, 1.0)
    for first, last in ((0, 3), (3, 10), (10, 999), (999, 1000)):
        piece = lane("noisy_sum", total[first:last].clone(), KEY, STEP, 0, first, 1e6, 1.0)
        assert torch.equal(piece, whole[first:last])
