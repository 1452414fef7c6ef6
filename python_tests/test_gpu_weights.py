"""Trained weights on a CUDA device: every way of taking norms and sums gives one step of the oracle."""

from __future__ import annotations

import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat, names_of
from captured import PADDED
from torch import Tensor
from weight_cases import CASES, METHODS, WeightCase

import dp_bitfit_kernels as dpk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("no_rows"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def rows_on_the_cpu(case: WeightCase, x: Tensor, y: Tensor) -> Tensor:
    model = dpk.convert_model(case.model(), train_modules=("*",))
    loss = lambda i: lambda o: F.cross_entropy(o, y[i : i + 1])  # noqa: E731
    return torch.cat([oracle.rows(model, names_of(model), x[i : i + 1], loss(i)) for i in range(len(x))])


def step(case: WeightCase, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """The update times E[B] on the device, [P] float64 on the CPU, and the batch."""
    x, y = case.batch(), torch.arange(6) % 3
    model = dpk.convert_model(case.model(), train_modules=("*",), memory=case.memory).cuda()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="clipped_sum='second_backward'")
        engine, model, optimizer, _ = attach(model, x, y, bound=0.1, **options)  # type: ignore[arg-type]
    before = flat(model)
    with engine.batch(6):
        F.cross_entropy(model(x.cuda()), y.cuda()).backward()
        assert optimizer.step()
    return (before - flat(model)).double().cpu() * 6, x, y


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("norm, total", METHODS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "positions"])  # which counts on the CPU
def test_a_step_equals_the_oracle(name: str, norm: str, total: str, tf32: bool) -> None:
    """With TF32 allowed, forward and backward are less exact; norms and sums are in float32 all the same."""
    if name == "conv1d of transformers":
        pytest.importorskip("transformers")
    case = CASES[name]
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        got, x, y = step(case, per_sample_norm=norm, clipped_sum=total)
    finally:
        torch.set_float32_matmul_precision("highest")
    rows = rows_on_the_cpu(case, x, y)
    room = 1e-3 * oracle.clipped_sum(rows.abs(), 0.1) + 1e-5
    assert ((got - oracle.clipped_sum(rows, 0.1)).abs() <= room * (100 if tf32 else 1)).all()


def test_the_release_is_the_cpus() -> None:
    for name in ("linear of tokens", "tied", "conv2d", "self-attention"):
        case, releases = CASES[name], []
        for device in ("cpu", "cuda"):
            x, y = case.batch(), torch.arange(6) % 3
            model = dpk.convert_model(case.model(), train_modules=("*",)).to(device)
            engine = dpk.PrivacyEngine(unsafe_deterministic_seed=1)
            _, model, optimizer, _ = attach(model, x, y, bound=0.1, sigma=1.0, engine=engine)
            before = flat(model)
            with engine.batch(6):
                F.cross_entropy(model(x.to(device)), y.to(device)).backward()
                assert optimizer.step()
            releases.append((before - flat(model)).cpu())
        torch.testing.assert_close(*releases, rtol=1e-3, atol=1e-5)


def test_captured_steps_are_eager_ones() -> None:
    case, runs = CASES["tied"], []
    x, y = case.batch(24), torch.arange(24) % 3
    for captured in (False, True):
        model = dpk.convert_model(case.model(), train_modules=("*",)).cuda()
        engine = dpk.PrivacyEngine(unsafe_deterministic_seed=1)
        _, _, optimizer, loader = attach(model, x, y, engine=engine, lr=0.1, sigma=0.1, **PADDED)
        loss = lambda x, y, model=model: F.cross_entropy(model(x), y)  # noqa: E731
        run = dpk.capture_step(optimizer, loss) if captured else None
        for _ in range(4):
            for own, labels in loader:
                own, labels = own.cuda(), labels.cuda()
                if run is not None:
                    run(own, labels)
                else:
                    loss(own, labels).backward()
                    optimizer.step()
        runs.append(flat(model).cpu())
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-4)
