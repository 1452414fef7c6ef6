"""What the ops of every backend refuse: arguments of another shape, dtype or range, and tensors on two devices."""

from __future__ import annotations

import pytest
import torch
from cases import KEY, STEP
from lanes import Lane, make_lane

from dp_bitfit_kernels import reference
from dp_bitfit_kernels._validate import OpError

ROWS, GRAD, OFFSETS = torch.zeros(2, 4), torch.zeros(2, 3, 4), torch.tensor([0, 4])
MASK, ONE = torch.ones(2, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
TOTAL, FACTORS = torch.zeros(4, dtype=torch.int64), torch.ones((2, 1), dtype=torch.float64)
BAD_CALLS = {
    "grad of two dimensions": ("bias_grad", GRAD[0]),
    "grad of float64": ("bias_grad", GRAD.double()),
    "grad of int64": ("bias_grad", GRAD.long()),
    "rows of the wrong width": ("bias_grad_", ROWS[:, :3], GRAD),
    "rows of the wrong batch": ("bias_grad_", ROWS[:1], GRAD),
    "rows of bfloat16": ("bias_grad_", ROWS.bfloat16(), GRAD),
    "rows with column stride 2": ("bias_grad_", torch.zeros(2, 8)[:, ::2], GRAD),
    "rows that overlap": ("bias_grad_", torch.zeros(1, 4).expand(2, 4), GRAD),
    "mask of int64": ("clip_factors", ROWS, OFFSETS, MASK.long(), ONE, ONE, None, 1.0, None),
    "mask too short": ("clip_factors", ROWS, OFFSETS, MASK[:1], ONE, ONE, None, 1.0, None),
    "bounds of float32": ("clip_factors", ROWS, OFFSETS, MASK, ONE.float(), ONE, None, 1.0, None),
    "offsets too short": ("clip_factors", ROWS, OFFSETS[:1], MASK, ONE, ONE, None, 1.0, None),
    "extra squares [B]": ("clip_factors", ROWS, OFFSETS, MASK, ONE, ONE, ONE, 1.0, None),
    "scale of 0": ("clip_factors", ROWS, OFFSETS, MASK, ONE, ONE, None, 0.0, None),
    "scale of NaN": ("clip_factors", ROWS, OFFSETS, MASK, ONE, ONE, None, float("nan"), None),
    "infinite scale": ("clip_factors", ROWS, OFFSETS, MASK, ONE, ONE, None, float("inf"), 0.01),
    "gamma of 0": ("clip_factors", ROWS, OFFSETS, MASK, ONE, ONE, None, 1.0, 0.0),
    "negative gamma": ("clip_factors", ROWS, OFFSETS, MASK, ONE, ONE, None, 1.0, -1.0),
    "gamma of NaN": ("clip_factors", ROWS, OFFSETS, MASK, ONE, ONE, None, 1.0, float("nan")),
    "factors of float32": ("clipped_sum_", TOTAL, ROWS, OFFSETS, FACTORS.float()),
    "factors of one row": ("clipped_sum_", TOTAL, ROWS, OFFSETS, FACTORS[:1]),
    "total of int32": ("clipped_sum_", TOTAL.int(), ROWS, OFFSETS, FACTORS),
    "total too short": ("clipped_sum_", TOTAL[:3], ROWS, OFFSETS, FACTORS),
    "key of seven words": ("random_words", KEY[:7], STEP, 0, 0, 1),
    "step of int32": ("random_words", KEY, STEP.int(), 0, 0, 1),
    "stream too large": ("random_words", KEY, STEP, 2**32, 0, 1),
    "negative stream": ("random_words", KEY, STEP, -1, 0, 1),
    "counter past 2^32": ("random_words", KEY, STEP, 0, 2**35 - 1, 2),
    "negative first": ("noisy_sum", TOTAL, KEY, STEP, 0, -1, 1.0, 1.0),
    "noise past the counter": ("noisy_sum", TOTAL, KEY, STEP, 0, 2**35 - 3, 1.0, 1.0),
    "negative noise": ("noisy_sum", TOTAL, KEY, STEP, 0, 0, -1.0, 1.0),
    "noise of NaN": ("noisy_sum", TOTAL, KEY, STEP, 0, 0, float("nan"), 1.0),
    "release of float64": ("noisy_sum_", TOTAL.double(), TOTAL, KEY, STEP, 0, 0, 1.0, 1.0),
    "release too short": ("noisy_sum_", TOTAL.float()[:3], TOTAL, KEY, STEP, 0, 0, 1.0, 1.0),
    "release with gaps": ("noisy_sum_", TOTAL.float().repeat(2)[::2], TOTAL, KEY, STEP, 0, 0, 1.0, 1.0),
    "float total": ("noisy_sum", TOTAL.float(), KEY, STEP, 0, 0, 1.0, 1.0),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_refused_by_the_op(lane: Lane, name: str, request: pytest.FixtureRequest) -> None:
    if "cuda source" in request.node.callspec.id:
        pytest.skip("checks are the ops', not the kernels'")
    op, *arguments = BAD_CALLS[name]
    with pytest.raises((RuntimeError, OpError), match=str(op)):
        lane(str(op), *arguments)


GOOD_CALLS = {
    "bias_grad_": (ROWS, GRAD),
    "clip_factors": (ROWS, OFFSETS, MASK, ONE, ONE, FACTORS, 1.0, None),
    "clipped_sum_": (TOTAL, ROWS, OFFSETS, FACTORS),
    "noisy_sum": (TOTAL, KEY, STEP, 0, 0, 1.0, 1.0),
    "noisy_sum_": (TOTAL.float(), TOTAL, KEY, STEP, 0, 0, 1.0, 1.0),
    "random_words": (KEY, STEP, 0, 0, 1),
}


@pytest.mark.parametrize("op", GOOD_CALLS)
def test_one_tensor_on_another_device_is_refused(lane: Lane, op: str, request: pytest.FixtureRequest) -> None:
    """The meta device stands for any other; a result there would be silently nothing."""
    if "cuda source" in request.node.callspec.id:
        pytest.skip("checks are the ops', not the kernels'")
    arguments, call = [lane.put(value) for value in GOOD_CALLS[op]], getattr(lane.ops, op)
    call(*arguments)
    for place, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            changed = [*arguments[:place], value.to("meta"), *arguments[place + 1 :]]
            with pytest.raises((RuntimeError, OpError), match=op):
                call(*changed)


# Layouts and dtypes that only kernels cannot take.
TAKEN_BY_THE_REFERENCE = {
    "grad of float64",
    "rows of bfloat16",
    "rows with column stride 2",
    "rows that overlap",
}


@pytest.mark.parametrize("name", sorted(BAD_CALLS.keys() - TAKEN_BY_THE_REFERENCE))
def test_the_reference_refuses_the_same(name: str) -> None:
    op, *arguments = BAD_CALLS[name]
    with pytest.raises(OpError, match=str(op)):
        getattr(reference, str(op))(*arguments)


@pytest.mark.parametrize("op", GOOD_CALLS)
def test_the_reference_refuses_other_devices(op: str) -> None:
    for place, value in enumerate(GOOD_CALLS[op]):
        if isinstance(value, torch.Tensor):
            changed = [*GOOD_CALLS[op][:place], value.to("meta"), *GOOD_CALLS[op][place + 1 :]]
            with pytest.raises(OpError, match=op):
                getattr(reference, op)(*changed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native on cuda", "triton on cuda"])
def test_tensors_on_two_devices_are_refused(backend: str) -> None:
    ops = make_lane(backend).ops
    for call in (
        lambda: ops.bias_grad_(ROWS.clone(), GRAD.cuda()),
        lambda: ops.clip_factors(ROWS.cuda(), OFFSETS, MASK.cuda(), ONE.cuda(), ONE.cuda(), None, 1.0, None),
        lambda: ops.clipped_sum_(TOTAL.cuda(), ROWS.cuda(), OFFSETS.cuda(), FACTORS),
        lambda: ops.noisy_sum(TOTAL.cuda(), KEY.cuda(), STEP, 0, 0, 1.0, 1.0),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            call()
