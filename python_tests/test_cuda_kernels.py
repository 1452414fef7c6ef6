"""The CUDA kernels' own source, run on a CPU fiber by fiber (csrc/tests/cuda_on_cpu.h), beyond the common contract.

What this lane can see: who sums what, indices, tails, alignment, barriers, rounding. What it cannot: races between
barriers, coalescing, speed; these are the GPU lanes' of test_ops.py and gpu-check's.
"""

from __future__ import annotations

import native_internals
import pytest
import torch
from backward_cases import GRAD_CALLS, BackwardCase, make_data
from cases import FLOAT_DTYPES, LAYOUTS, GradCase, GroupCase, make_grad, make_rows
from lanes import Lane, make_lane
from test_backward_ops import check_grad_call
from tolerances import FACTOR_RTOL, assert_sum_close

from dp_bitfit_kernels import reference


@pytest.fixture(scope="module")
def lane() -> Lane:
    return make_lane("cuda source")


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
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_bias_grad(lane: Lane, case: GradCase, layout: str, dtype: torch.dtype) -> None:
    grad = make_grad(case, layout, dtype)
    assert_sum_close(lane("bias_grad", grad), grad)


@pytest.mark.parametrize("layout", ["features_last", "channels_first", "every_second"])
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_a_row_does_not_depend_on_its_batch_mates(lane: Lane, case: GradCase, layout: str) -> None:
    grad = make_grad(GradCase(3, case.length, case.features, case.reason), layout, torch.bfloat16)
    rows = lane("bias_grad", grad)
    for i in range(3):
        assert torch.equal(lane("bias_grad", grad[i : i + 1]), rows[i : i + 1])


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
def test_plan(lane: Lane, shape, strides, offset, dtype, want) -> None:  # type: ignore[no-untyped-def]
    grad = torch.empty(64, dtype=dtype)[offset:]
    strides = strides or (shape[1] * shape[2], shape[2], 1)
    address = grad.data_ptr()
    native = native_internals.load()
    found = native.cuda_plan_bias_grad(*shape, *strides, grad.element_size(), address)
    assert (found["layout"], found["packet"], found["lanes"], found["splits"]) == want
    for batch in (1, 7):
        alone = native.cuda_plan_bias_grad(batch, *shape[1:], *strides, grad.element_size(), address)
        assert batch == 1 or alone == found


def test_groups_of_a_block_and_of_a_warp(lane: Lane) -> None:
    rows, offsets = make_rows(GroupCase(2, (0, 9000, 9003, 20_003), "two wide groups, a narrow one between them"))
    bounds = torch.full((3,), 0.5, dtype=torch.float64)
    arguments = (rows, offsets, torch.tensor([True, True]), bounds, bounds, None, 1.0, None)
    for got, want in zip(lane("clip_factors", *arguments), reference.clip_factors(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=FACTOR_RTOL, atol=0.0)


# Shape, and the op (in the dtypes and sums named) whose cut it is about.
BACKWARD_CASES = (
    (BackwardCase(1, 2100, 64, "features last: partial sums in two launches"), "bit_scale of dropout", 1),
    (BackwardCase(2, 3, 3136, "56 x 56: 64 lanes a channel, over two warps"), "level_scale", 2),
    (BackwardCase(1, 2, 140_000, "channels first: partial sums in two launches"), "affine_grad", 2),
    (BackwardCase(2, 6, 196, "14 x 14: packets of four of 16 bits"), "activation_grad of silu", 2),
    (BackwardCase(1, 40, 768, "a team of two warps a row, two blocks a sample"), "layer_norm_grad", 1),
    (BackwardCase(1, 33, 4096, "a team is a whole block"), "layer_norm_grad of int8", 1),
    (BackwardCase(1, 3, 8192, "a block of 512, where a packet is 16 bytes; the widest"), "layer_norm_grad", 1),
    (BackwardCase(1, 3, 8200, "too wide for a block"), "layer_norm_grad", 1),
    (BackwardCase(2, 2, 4099, "too wide for a block without packets"), "layer_norm_grad of int8", 0),
    (BackwardCase(2, 8, 784, "28 x 28: 32 lanes a channel"), "group_norm_grad", 2),
    (BackwardCase(1, 2, 3136, "lanes of a channel over two warps"), "group_norm_grad of int8", 2),
    (BackwardCase(1, 2, 300_000, "more packets a lane than one float32 chain may add"), "group_norm_grad", 2),
    (BackwardCase(2, 600, 1, "channels of one position, more than the block has threads"), "group_norm_grad", 2),
)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("case", "name", "reduce"), BACKWARD_CASES, ids=str)
def test_backward(lane: Lane, case: BackwardCase, name: str, reduce: int, dtype: torch.dtype) -> None:
    check_grad_call(lane, GRAD_CALLS[name], make_data(case, dtype, reduce))
