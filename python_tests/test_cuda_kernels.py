"""The CUDA kernels' own source, run on a CPU thread by thread (csrc/tests/cuda_on_cpu.h), against the reference.

What this lane can see: who sums what, indices, tails, alignment, barriers, rounding. What it cannot: races between
barriers, coalescing, speed; these are the GPU lane's (`pytest -m gpu`) and gpu-check's.
"""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import FLOAT_DTYPES, GRAD_CASES, GROUP_CASES, LAYOUTS, GradCase, GroupCase, make_grad, make_rows
from tolerances import FACTOR_RTOL, assert_sum_close
from torch import Tensor

from dp_bitfit_kernels import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc" / "tests"))
import native_internals

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

KEY = torch.tensor(struct.unpack("<8i", bytes(range(32))), dtype=torch.int32)
STEP = torch.tensor([0x1234_5678_9ABC_DEF0])


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return native_internals.load()


def plan(native: ModuleType, grad: Tensor) -> dict[str, object]:
    found: dict[str, object] = native.cuda_plan_bias_grad(
        *grad.shape, *grad.stride(), grad.element_size(), grad.data_ptr()
    )
    return found


def bias_grad_(native: ModuleType, rows: Tensor, grad: Tensor, accumulate: bool) -> int:
    """As csrc/cuda/bias_grad.cu launches it; returns the number of launches."""
    batch, steps, features = grad.shape
    if batch == 0 or features == 0:
        return 0
    splits = int(plan(native, grad)["splits"])  # type: ignore[call-overload]
    partial = torch.full((batch, splits, features), float("nan")) if splits > 1 else None
    out, split = (rows, 0) if partial is None else (partial, features)
    native.cuda_bias_grad(
        FLOAT_DTYPES.index(grad.dtype),
        grad.data_ptr(),
        *(batch, steps, features),
        *grad.stride(),
        out.data_ptr(),
        *(out.stride(0), split),
        accumulate and partial is None,
    )
    return 1 if partial is None else 1 + bias_grad_(native, rows, partial, accumulate)


def bias_grad(native: ModuleType, grad: Tensor) -> Tensor:
    rows = torch.full((grad.shape[0], grad.shape[2]), float("nan"))
    bias_grad_(native, rows, grad, accumulate=False)
    return rows


# Beyond the shared table: what the packets, lanes and splits of these kernels can get wrong.
CUDA_CASES = (
    GradCase(1, 2100, 64, "features last: T in two launches"),
    GradCase(2, 700, 72, "features last: the last block of columns is cut off"),
    GradCase(2, 260, 4, "few columns: one lane, 256 rows at a time"),
    GradCase(3, 196, 6, "14 x 14: packets of four"),
    GradCase(2, 3136, 3, "56 x 56: 64 lanes a channel, over two warps"),
    GradCase(1, 12_544, 2, "112 x 112: all 256 lanes on one channel"),
    GradCase(1, 140_000, 2, "channels first: T in two launches"),
)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", GRAD_CASES + CUDA_CASES, ids=str)
def test_bias_grad(native: ModuleType, case: GradCase, layout: str, dtype: torch.dtype) -> None:
    grad = make_grad(case, layout, dtype)
    assert_sum_close(bias_grad(native, grad), grad)


@pytest.mark.parametrize("layout", ["features_last", "channels_first"])
@pytest.mark.parametrize("case", [CUDA_CASES[0], CUDA_CASES[1], CUDA_CASES[3], CUDA_CASES[6]], ids=str)
def test_bias_grad_into_a_ledger_slice(native: ModuleType, case: GradCase, layout: str) -> None:
    grad = make_grad(case, layout, torch.float32)
    ledger = torch.randn((case.batch, case.features + 7), generator=torch.Generator().manual_seed(1))
    before, rows = ledger.clone(), ledger[:, 3 : 3 + case.features]
    bias_grad_(native, rows, grad, accumulate=True)
    assert torch.equal(rows, before[:, 3 : 3 + case.features] + bias_grad(native, grad))
    assert torch.equal(ledger[:, :3], before[:, :3])
    assert torch.equal(ledger[:, 3 + case.features :], before[:, 3 + case.features :])


@pytest.mark.parametrize("layout", ["features_last", "channels_first", "every_second"])
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_a_row_does_not_depend_on_its_batch_mates(native: ModuleType, case: GradCase, layout: str) -> None:
    grad = make_grad(GradCase(3, case.length, case.features, case.reason), layout, torch.bfloat16)
    rows = bias_grad(native, grad)
    for i in range(3):
        assert torch.equal(bias_grad(native, grad[i : i + 1]), rows[i : i + 1])


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "dtype", "want"),
    [
        ((64, 512, 768), None, 0, torch.bfloat16, ("features_last", 8, 8, 1)),
        ((64, 512, 768), None, 0, torch.float32, ("features_last", 4, 8, 1)),
        ((64, 512, 768), None, 1, torch.bfloat16, ("features_last", 1, 64, 4)),
        ((64, 512, 200), None, 0, torch.bfloat16, ("features_last", 8, 8, 1)),
        ((64, 512, 2), None, 0, torch.float32, ("features_last", 2, 1, 1)),
        ((1, 1_000_000, 768), None, 0, torch.bfloat16, ("features_last", 8, 8, 977)),
        ((64, 3136, 64), (3136 * 64, 1, 3136), 0, torch.bfloat16, ("channels_first", 8, 64, 1)),
        ((64, 49, 512), (49 * 512, 1, 49), 0, torch.bfloat16, ("channels_first", 1, 8, 1)),
        ((64, 512, 384), (512 * 768, 768, 2), 0, torch.bfloat16, ("strided", 1, 64, 4)),
        ((64, 512, 768), (0, 0, 0), 0, torch.bfloat16, ("strided", 1, 64, 4)),
        ((8, 1, 1), (1, 1, 1), 0, torch.float32, ("features_last", 1, 1, 1)),
    ],
)
def test_plan(native: ModuleType, shape, strides, offset, dtype, want) -> None:  # type: ignore[no-untyped-def]
    grad = torch.empty(64, dtype=dtype)[offset:]
    strides = strides or (shape[1] * shape[2], shape[2], 1)
    address = grad.data_ptr()
    found = native.cuda_plan_bias_grad(*shape, *strides, grad.element_size(), address)
    assert (found["layout"], found["packet"], found["lanes"], found["splits"]) == want
    for batch in (1, 7):
        alone = native.cuda_plan_bias_grad(batch, *shape[1:], *strides, grad.element_size(), address)
        assert batch == 1 or alone == found


@pytest.mark.parametrize("gamma", [None, 0.01], ids=["flat", "automatic"])
@pytest.mark.parametrize("extra", [False, True], ids=["", "extra_squares"])
@pytest.mark.parametrize(
    "case", [*GROUP_CASES, GroupCase(2, (0, 9000, 9003, 20_003), "groups of a block and of a warp")], ids=str
)
@pytest.mark.parametrize("odd", [None, float("nan"), float("inf")])
def test_clip_factors(native: ModuleType, case: GroupCase, extra: bool, gamma: float | None, odd: float | None) -> None:
    rows, offsets = make_rows(case)
    groups = len(offsets) - 1
    if odd is not None:
        rows[0, -1] = odd
    generator = torch.Generator().manual_seed(5)
    bounds = torch.rand(groups, generator=generator, dtype=torch.float64) + 0.1
    grid = torch.rand(groups, generator=generator, dtype=torch.float64) * 2.0**20
    mask = torch.ones(case.batch, dtype=torch.bool)
    mask[-1] = False
    squares = torch.rand((case.batch, groups), generator=generator, dtype=torch.float64) if extra else None
    factors, norms = torch.full((2, case.batch, groups), float("nan"), dtype=torch.float64)
    native.cuda_clip_factors(
        rows.data_ptr(),
        case.batch,
        rows.stride(0),
        offsets.data_ptr(),
        groups,
        *(t.data_ptr() if t is not None else 0 for t in (mask, bounds, grid, squares, factors, norms)),
        1.0 / 3.0,
        gamma or 0.0,
        gamma is None,
    )
    want_factors, want_norms = reference.clip_factors(rows, offsets, mask, bounds, grid, squares, 1.0 / 3.0, gamma)
    torch.testing.assert_close(norms, want_norms, rtol=FACTOR_RTOL, atol=0.0, equal_nan=True)
    torch.testing.assert_close(factors, want_factors, rtol=FACTOR_RTOL, atol=0.0)
    assert factors[-1].abs().max() == 0.0
    assert odd is None or factors[0].abs().max() == 0.0


@pytest.mark.parametrize("width", [None, 1024], ids=["", "packets"])
@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
def test_clipped_sum(native: ModuleType, case: GroupCase, width: int | None) -> None:
    if width is not None:
        case = GroupCase(case.batch, (*(min(o, width) for o in case.offsets[:-1]), width), case.reason)
    rows, offsets = make_rows(case)
    rows = rows.contiguous()
    generator = torch.Generator().manual_seed(6)
    factors = (torch.rand((case.batch, len(offsets) - 1), generator=generator, dtype=torch.float64) - 0.5) * 2.0**20
    factors[0] = 0.0
    rows[0] = float("nan")
    total = torch.randint(-(2**40), 2**40, (rows.shape[1],), generator=generator)
    want = total.clone()
    native.cuda_clipped_sum(
        total.data_ptr(),
        rows.data_ptr(),
        *rows.shape,
        rows.stride(0),
        offsets.data_ptr(),
        factors.data_ptr(),
        len(offsets) - 1,
    )
    reference.clipped_sum_(want, rows, offsets, factors)
    assert torch.equal(total, want)


@pytest.mark.parametrize("noise_std", [0.0, 0.3, 2.0**20, 2.0**40])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (13, 3), (0, 4096), (8, 2048), (7, 5001)])
def test_noisy_sum(native: ModuleType, first: int, count: int, noise_std: float) -> None:
    """Bit for bit the reference's: words, logarithm, sine, cosine, rounding."""
    total = torch.randint(-(2**50), 2**50, (count,), generator=torch.Generator().manual_seed(7))
    out = torch.full((count + 2,), float("nan"))
    native.cuda_noisy_sum(
        *(total.data_ptr(), KEY.data_ptr(), STEP.data_ptr()),
        *(5, first, count, noise_std, 1.0 / 3.0e6),
        out.data_ptr(),
    )
    assert torch.equal(out[:count], reference.noisy_sum(total, KEY, STEP, 5, first, noise_std, 1.0 / 3.0e6))
    assert out[count:].isnan().all()


@pytest.mark.parametrize("first", [0, 1, 7, 8, 255, 256, 2**35 - 1000])
@pytest.mark.parametrize("count", [1, 9, 1000])
def test_random_words(native: ModuleType, first: int, count: int) -> None:
    out = torch.full((count + 1,), -1, dtype=torch.int64)
    native.cuda_random_words(KEY.data_ptr(), STEP.data_ptr(), 2**32 - 1, first, count, out.data_ptr())
    assert torch.equal(out[:count], reference.random_words(KEY, STEP, 2**32 - 1, first, count))
    assert out[count] == -1
