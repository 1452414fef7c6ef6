"""Triton kernels on the CPU, by Triton's interpreter, against the reference.

The interpreter is chosen when Triton is imported: ``TRITON_INTERPRET=1 pytest -m interpreter``. It computes in
NumPy, one program after the other; bfloat16 serves as storage only, there and in the kernels.
"""

from __future__ import annotations

import os
import struct

import pytest
import torch
from cases import FLOAT_DTYPES, GRAD_CASES, GROUP_CASES, LAYOUTS, GradCase, GroupCase, make_grad
from tolerances import FACTOR_RTOL, assert_sum_close

from dp_bitfit_kernels import reference
from dp_bitfit_kernels._validate import OpError

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
]

from dp_bitfit_kernels import kernels  # noqa: E402
from dp_bitfit_kernels.kernels.noisy_sum import cos_sin_turn, log_uniform  # noqa: E402

KEY = torch.tensor(struct.unpack("<8i", bytes(range(32))), dtype=torch.int32)
STEP = torch.tensor([0x1234_5678_9ABC_DEF0])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", GRAD_CASES, ids=str)
def test_bias_grad(case: GradCase, layout: str, dtype: torch.dtype) -> None:
    grad = make_grad(case, layout, dtype)
    assert_sum_close(kernels.bias_grad(grad), grad)


@pytest.mark.parametrize("case", GRAD_CASES, ids=str)
def test_bias_grad_into_a_ledger_slice(case: GradCase) -> None:
    """Adds to its own columns of a wider ledger and leaves the others alone."""
    grad = make_grad(case, "features_last", torch.float32)
    ledger = torch.randn((case.batch, case.features + 7), generator=torch.Generator().manual_seed(1))
    before = ledger.clone()
    rows = ledger[:, 3 : 3 + case.features]
    kernels.bias_grad_(rows, grad)
    assert_sum_close(rows, grad, before[:, 3 : 3 + case.features])
    assert torch.equal(ledger[:, :3], before[:, :3])
    assert torch.equal(ledger[:, 3 + case.features :], before[:, 3 + case.features :])


@pytest.mark.parametrize("layout", ["features_last", "channels_first"])
def test_bias_grad_of_a_sample_does_not_depend_on_the_batch(layout: str) -> None:
    grad = make_grad(GradCase(3, 5000, 3, "long enough to be split"), layout, torch.float32)
    rows = kernels.bias_grad(grad)
    for i in range(3):
        assert torch.equal(kernels.bias_grad(grad[i : i + 1]), rows[i : i + 1])


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "time", "features"])
def test_bias_grad_beyond_32_bit_offsets(far: int) -> None:
    """Offsets of 2^31 elements and more; the untouched pages of the buffer cost no memory."""
    strides = [64, 4, 1]
    strides[far] = 2**30 + 8
    buffer = torch.empty(2 * (2**30 + 8) + 256, dtype=torch.float16)
    grad = buffer.as_strided((3, 3, 3), strides)
    grad.copy_(torch.randn((3, 3, 3), generator=torch.Generator().manual_seed(2)))
    assert_sum_close(kernels.bias_grad(grad), grad)


def make_rows(case: GroupCase, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ledger rows [B, P] as a slice of a wider ledger of NaN, and the offsets."""
    width = case.offsets[-1]
    ledger = torch.full((case.batch, width + 3), float("nan"))
    rows = ledger[:, :width]
    rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(3)) * scale)
    return rows, torch.tensor(case.offsets)


@pytest.mark.parametrize("gamma", [None, 0.01], ids=["flat", "automatic"])
@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_clip_factors(case: GroupCase, gamma: float | None) -> None:
    rows, offsets = make_rows(case)
    groups = len(offsets) - 1
    generator = torch.Generator().manual_seed(4)
    bounds = torch.rand(groups, generator=generator, dtype=torch.float64) + 0.1
    grid = torch.rand(groups, generator=generator, dtype=torch.float64) * 2.0**20
    mask = torch.ones(case.batch, dtype=torch.bool)
    mask[-1] = False
    extra = None if gamma is None else torch.rand((case.batch, groups), generator=generator, dtype=torch.float64)
    arguments = (rows, offsets, mask, bounds, grid, extra, 1.0 / 3.0, gamma)
    factors, norms = kernels.clip_factors(*arguments)
    want_factors, want_norms = reference.clip_factors(*arguments)
    torch.testing.assert_close(norms, want_norms, rtol=FACTOR_RTOL, atol=0.0)
    torch.testing.assert_close(factors, want_factors, rtol=FACTOR_RTOL, atol=0.0)
    assert factors[-1].abs().max() == 0.0


@pytest.mark.parametrize(
    ("case", "odd"), [(GROUP_CASES[1], float("nan")), (GROUP_CASES[1], float("-inf")), (GROUP_CASES[2], float("inf"))]
)
def test_a_row_that_is_not_finite_is_selected_to_zero(case: GroupCase, odd: float) -> None:
    """In every group, and whole: the other rows are as if it were masked."""
    rows, offsets = make_rows(case)
    rows[1, -1] = odd
    groups = len(offsets) - 1
    mask = torch.ones(case.batch, dtype=torch.bool)
    ones = torch.ones(groups, dtype=torch.float64)
    factors, norms = kernels.clip_factors(rows, offsets, mask, ones, ones * 2.0**20, None, 1.0, None)
    want, want_norms = reference.clip_factors(rows, offsets, mask, ones, ones * 2.0**20, None, 1.0, None)
    torch.testing.assert_close(factors, want, rtol=FACTOR_RTOL, atol=0.0)
    torch.testing.assert_close(norms, want_norms, rtol=FACTOR_RTOL, atol=0.0, equal_nan=True)
    assert torch.equal(factors[1], torch.zeros(groups, dtype=torch.float64))

    total, masked = torch.zeros(rows.shape[1], dtype=torch.int64), torch.zeros(rows.shape[1], dtype=torch.int64)
    kernels.clipped_sum_(total, rows, offsets, factors)
    keep = torch.tensor([i != 1 for i in range(case.batch)])
    kernels.clipped_sum_(masked, rows[keep], offsets, factors[keep])
    assert torch.equal(total, masked)


def test_factors_of_a_row_do_not_depend_on_the_batch() -> None:
    rows, offsets = make_rows(GROUP_CASES[1])
    one, mask = torch.ones(1, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    factors, norms = kernels.clip_factors(rows, offsets, mask, one, one, None, 1.0, 0.01)
    alone = kernels.clip_factors(rows[2:], offsets, mask[2:], one, one, None, 1.0, 0.01)
    assert torch.equal(alone[0], factors[2:]) and torch.equal(alone[1], norms[2:])


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_norm_that_overflows_only_by_its_scale_is_dropped() -> None:
    rows = torch.full((2, 4), 3e38)
    rows[1] = 1.0
    one = torch.ones(1, dtype=torch.float64)
    factors, norms = kernels.clip_factors(
        rows, torch.tensor([0, 4]), torch.tensor([True, True]), one, one, None, 1e300, None
    )
    assert norms[0, 0] == float("inf") and factors[0, 0] == 0.0 and factors[1, 0] > 0.0


@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_clipped_sum(case: GroupCase) -> None:
    """Bit for bit, halves included: factors are chosen so that many products end in .5."""
    rows, offsets = make_rows(case, scale=64.0)
    rows.copy_(rows.round())
    groups = len(offsets) - 1
    generator = torch.Generator().manual_seed(5)
    factors = torch.randint(-3, 4, (case.batch, groups), generator=generator).double() / 2.0
    factors[0] = 12345.678
    want = torch.randint(-(2**60), 2**60, (rows.shape[1],), generator=generator)
    got = want.clone()
    reference.clipped_sum_(want, rows, offsets, factors)
    kernels.clipped_sum_(got, rows, offsets, factors)
    assert torch.equal(got, want)


def test_random_words_rfc_8439() -> None:
    """Section 2.3.2: key 00 .. 1f, counter 1, nonce 00:00:00:09:00:00:00:4a:00:00:00:00."""
    step = torch.tensor([0x4A000000_09000000])
    state = kernels.random_words(KEY, step, 0, 8, 8).numpy().tobytes()
    assert state == bytes.fromhex(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


@pytest.mark.parametrize(
    ("stream", "first", "count"),
    [(0, 0, 1), (1, 5, 1030), (2**32 - 1, 2**32 - 4, 9), (2**31, 2**35 - 9, 9), (3, 17, 0)],
    ids=["first", "two_programs", "stream_max", "last_word", "none"],
)
def test_random_words(stream: int, first: int, count: int) -> None:
    got = kernels.random_words(KEY, STEP, stream, first, count)
    assert torch.equal(got, reference.random_words(KEY, STEP, stream, first, count))


@pytest.mark.parametrize(
    ("first", "count", "noise_std"),
    [(0, 1040, 2.0**20), (2**32 - 4, 9, 3.7e5), (2**35 - 3, 3, 2.0**40), (1, 1, 0.3), (0, 40, 0.0), (7, 0, 1.0)],
    ids=["two_programs", "across_2^32", "last_element", "single_odd", "no_noise", "none"],
)
def test_noisy_sum(first: int, count: int, noise_std: float) -> None:
    total = torch.randint(-(2**40), 2**40, (count,), generator=torch.Generator().manual_seed(6))
    got = kernels.noisy_sum(total, KEY, STEP, 5, first, noise_std, 1.0 / 3.0)
    assert torch.equal(got, reference.noisy_sum(total, KEY, STEP, 5, first, noise_std, 1.0 / 3.0))


@triton.jit
def box_muller_kernel(p_word, p_log, p_cos, p_sin, BLOCK: tl.constexpr):
    o_word = tl.arange(0, BLOCK)
    b_word = tl.load(p_word + o_word).to(tl.uint64, bitcast=True)
    b_cos, b_sin = cos_sin_turn(b_word)
    tl.store(p_log + o_word, log_uniform(b_word))
    tl.store(p_cos + o_word, b_cos)
    tl.store(p_sin + o_word, b_sin)


def test_log_and_sine_of_edge_words() -> None:
    """Where an octant or a binade begins or ends, and what rounding to float64 does just there."""
    octants = [o * 2**61 + d for o in range(9) for d in (-(2**10), -1, 0, 1, 2**8)]
    binades = [round(2.0**e) + d for e in range(54, 64) for d in (-2, -1, 0)]
    halves = [int(2.0**64 * 2.0**-0.5) + d for d in (-(2**11), -1, 0, 1, 2**11)]
    edges = [w for w in octants + binades + halves if 0 <= w < 2**64]
    generator = torch.Generator().manual_seed(7)
    random = torch.randint(-(2**63), 2**63 - 1, (256 - len(edges),), generator=generator)
    words = torch.cat([torch.tensor([w - 2**64 if w >= 2**63 else w for w in edges]), random])
    log, cos, sin = (torch.empty(256, dtype=torch.float64) for _ in range(3))
    box_muller_kernel[(1,)](words, log, cos, sin, BLOCK=256)
    want_sin, want_cos = reference.sin_cos(words)
    assert torch.equal(log, reference.log_uniform(words))
    assert torch.equal(cos, want_cos)
    assert torch.equal(sin, want_sin)


def bad_calls() -> dict[str, tuple[object, ...]]:
    rows, grad = torch.zeros(2, 4), torch.zeros(2, 3, 4)
    offsets, mask = torch.tensor([0, 4]), torch.ones(2, dtype=torch.bool)
    one, factors, total = torch.ones(1).double(), torch.ones(2, 1).double(), torch.zeros(4, dtype=torch.int64)
    return {
        "grad of two dimensions": (kernels.bias_grad, grad[0]),
        "grad of float64": (kernels.bias_grad, grad.double()),
        "rows of the wrong width": (kernels.bias_grad_, rows[:, :3], grad),
        "rows of bfloat16": (kernels.bias_grad_, rows.bfloat16(), grad),
        "rows with column stride 2": (kernels.bias_grad_, torch.zeros(2, 8)[:, ::2], grad),
        "rows that overlap": (kernels.bias_grad_, torch.zeros(1, 4).expand(2, 4), grad),
        "rows on another device": (kernels.bias_grad_, rows.to("meta"), grad),
        "mask of int64": (kernels.clip_factors, rows, offsets, mask.long(), one, one, None, 1.0, None),
        "bounds of float32": (kernels.clip_factors, rows, offsets, mask, one.float(), one, None, 1.0, None),
        "offsets too short": (kernels.clip_factors, rows, offsets[:1], mask, one, one, None, 1.0, None),
        "extra squares [B]": (kernels.clip_factors, rows, offsets, mask, one, one, one, 1.0, None),
        "factors of float32": (kernels.clipped_sum_, total, rows, offsets, factors.float()),
        "factors of one row": (kernels.clipped_sum_, total, rows, offsets, factors[:1]),
        "total too short": (kernels.clipped_sum_, total[:3], rows, offsets, factors),
        "key of seven words": (kernels.random_words, KEY[:7], STEP, 0, 0, 1),
        "step of int32": (kernels.random_words, KEY, STEP.int(), 0, 0, 1),
        "stream too large": (kernels.random_words, KEY, STEP, 2**32, 0, 1),
        "counter past 2^32": (kernels.random_words, KEY, STEP, 0, 2**35 - 1, 2),
        "negative first": (kernels.noisy_sum, total, KEY, STEP, 0, -1, 1.0, 1.0),
        "noise past the counter": (kernels.noisy_sum, total, KEY, STEP, 0, 2**35 - 3, 1.0, 1.0),
        "negative noise": (kernels.noisy_sum, total, KEY, STEP, 0, 0, -1.0, 1.0),
        "noise of NaN": (kernels.noisy_sum, total, KEY, STEP, 0, 0, float("nan"), 1.0),
        "float total": (kernels.noisy_sum, total.float(), KEY, STEP, 0, 0, 1.0, 1.0),
    }


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_arguments_are_refused(name: str) -> None:
    function, *arguments = bad_calls()[name]
    with pytest.raises(OpError, match=function.__name__):  # type: ignore[attr-defined]
        function(*arguments)  # type: ignore[operator]
