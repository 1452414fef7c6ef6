"""A private step on a CUDA device: equal to the one-sample oracle, and to the CPU where integers decide."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat, names_of, small_model
from torch import nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import backends, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if (reason := backends.unavailable(request.param, "cuda")) is not None:
        pytest.skip(reason)
    return str(request.param)


def data(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((n, 6), generator=generator), torch.randint(0, 3, (n,), generator=generator)


def converted(backend: str) -> nn.Module:
    return dpk.convert_model(small_model(), train_modules=("5",), backend=backend).cuda()


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_step_equals_oracle(backend: str, clipping: str) -> None:
    x, y = data()
    model = converted(backend)
    _, model, optimizer, loader = attach(model, x, y, bound=0.05, clipping=clipping, sample_rate=1.0)
    names, before = names_of(model), flat(model).cpu()
    plain = dpk.convert_model(small_model(), train_modules=("5",))
    one = [oracle.rows(plain, names, x[i : i + 1], lambda o, i=i: F.cross_entropy(o, y[i : i + 1])) for i in range(12)]
    ((xs, ys),) = list(loader)
    F.cross_entropy(model(xs.cuda()), ys.cuda()).backward()
    assert optimizer.step()
    rows = torch.cat(one)  # [12, P] float64
    if clipping == "flat":
        clipped = rows * (0.05 / rows.norm(dim=1).clamp(min=0.05))[:, None]
        moved = before.double() - flat(model).cpu().double()
        torch.testing.assert_close(moved, clipped.sum(0) / 12, rtol=2e-4, atol=1e-6)
    assert torch.isfinite(flat(model)).all()
    assert not torch.equal(flat(model).cpu(), before)


def test_the_same_rows_give_the_cpus_release(backend: str) -> None:
    """Integers bit for bit; what the noise adds differs by at most one step of the grid."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn((64, 5000), generator=generator)
    rows[3] = float("nan")
    offsets, one = torch.tensor([0, 5000]), torch.ones(1, dtype=torch.float64)
    mask = torch.ones(64, dtype=torch.bool)
    key, step = torch.arange(8, dtype=torch.int32), torch.tensor([7])
    ops, reference = backends.select(backend, "cuda"), backends.select("reference", "cpu")
    factors, _ = reference.clip_factors(rows, offsets, mask, one, one * 2.0**20, None, 1.0, None)
    want = torch.zeros(5000, dtype=torch.int64)
    reference.clipped_sum_(want, rows, offsets, factors)
    total = torch.zeros(5000, dtype=torch.int64, device="cuda")
    ops.clipped_sum_(total, rows.cuda(), offsets.cuda(), factors.cuda())
    assert torch.equal(total.cpu(), want)
    release = ops.noisy_sum(total, key.cuda(), step.cuda(), 0, 0, 2.0**20, 1.0).cpu().double()
    wanted = reference.noisy_sum(want, key, step, 0, 0, 2.0**20, 1.0).double()
    assert (release - wanted).abs().max() <= 1.0
    assert (release != wanted).double().mean() <= 1e-3


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_draws_of_all_sizes_are_released(backend: str, autocast: torch.dtype | None) -> None:
    x, y = data(48)
    engine, model, optimizer, loader = attach(
        converted(backend), x, y, batch=8, sigma=1.0, bound=0.5, max_physical_batch_size=4
    )
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        for _ in range(3):
            for xs, ys in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(xs.cuda()).float(), ys.cuda()).backward()
                optimizer.step()
    assert engine.accountant.history.total_steps == 3 * len(loader) == engine._session.noise_steps
    assert torch.isfinite(flat(model)).all()


def test_a_step_after_the_first_waits_for_nothing(backend: str) -> None:
    x, y = data()
    _, model, optimizer, loader = attach(converted(backend), x, y, sigma=1.0, sample_rate=1.0)
    xs, ys = x.cuda(), y.cuda()
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")
        try:
            for _ in loader:
                torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")
                F.cross_entropy(model(xs), ys).backward()
                optimizer.step()
                torch.cuda.set_sync_debug_mode("default")
        finally:
            torch.cuda.set_sync_debug_mode("default")


PADDED = {"batch": 8, "sigma": 1.0, "bound": 0.5, "max_physical_batch_size": 4, "pad_physical_batches": True}


class Dropped(nn.Module):
    """Masks must be fresh at each replay, as they are in eager steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(F.dropout(x, 0.5, self.training))


def run_padded(
    backend: str, captured: bool, make: type = torch.optim.SGD, compiler: str | None = None, epochs: int = 4
):
    """Parameters after some epochs of seeded noise, losses, and the step."""
    torch._dynamo.reset()
    torch.cuda.manual_seed(0)
    x, y = data(40)
    model = dpk.convert_model(Dropped(), train_modules=("*5",), backend=backend).cuda()
    engine = dpk.PrivacyEngine(unsafe_deterministic_seed=4)
    engine, model, optimizer, loader = attach(model, x, y, engine=engine, optimizer=make, lr=0.05, **PADDED)
    called = model if compiler is None else torch.compile(model, fullgraph=True, mode=compiler)
    step = dpk.capture_step(optimizer, lambda x, y: F.cross_entropy(called(x), y))
    losses = []
    for _ in range(epochs):
        for xs, ys in loader:
            if captured:
                step(xs, ys)
                losses.append(step.loss.clone())
            else:
                loss = F.cross_entropy(called(xs.cuda()), ys.cuda())
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
    assert step.captured == captured
    assert engine._session.noise_steps == engine.accountant.history.total_steps == epochs * len(loader)
    return flat(model).cpu(), torch.stack(losses).cpu()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_captured_step_equals_the_eager_one(backend: str, make: type) -> None:
    (parameters, losses), (wanted, wanted_losses) = (run_padded(backend, c, make) for c in (True, False))
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(parameters, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compiler", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_as_the_eager_one(compiler: str) -> None:
    """No break, and CUDA graphs of the compiler's own; masks differ, so only that it trains and stays finite."""
    parameters, losses = run_padded("auto", False, compiler=compiler)
    assert torch.isfinite(parameters).all() and torch.isfinite(losses).all()


def test_a_compiled_model_is_captured() -> None:
    parameters, losses = run_padded("auto", True, compiler="default")
    assert torch.isfinite(parameters).all() and torch.isfinite(losses).all()


def test_replays_draw_the_references_noise_and_wait_for_nothing(backend: str) -> None:
    """Rows of zeros: the k-th release is z of step k. In replays every synchronisation of the host is an error."""
    x, y = data(40)
    options = {**PADDED, "bound": 1.0}
    engine, model, optimizer, loader = attach(converted(backend), x, y, optimizer=torch.optim.SGD, lr=1.0, **options)
    step = dpk.capture_step(optimizer, lambda x, y: (model(x) * 0.0).sum())
    moved, inputs = [], (x[:4].cuda(), y[:4].cuda())
    for epoch in range(4):
        for _ in loader:
            before = flat(model)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if epoch > 2 else "default")
            try:
                released = step(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if released:
                moved.append((before - flat(model)).cpu().double())
    assert step.captured
    key = engine._session.keys.key_tensor("cpu")
    for number, change in enumerate(moved, 1):
        z = reference.standard_normal(key, torch.tensor([number]), 0, 0, len(change))
        torch.testing.assert_close(change, z / 8, rtol=0, atol=4e-6)


@pytest.mark.parametrize("layers", [3, 40])
def test_a_step_is_few_launches_however_many_biases_there_are(backend: str, layers: int) -> None:
    """Clip, sum and noise one each, one fused update; the rest, counters and zeroing, test_flat_update.py names."""
    if backend == "reference":
        pytest.skip("made of PyTorch operations")
    x, y = data()
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)), nn.Linear(6, 3))
    model = dpk.convert_model(model, backend=backend).cuda()
    engine, model, optimizer, _ = attach(model, x, y, optimizer=torch.optim.AdamW, lr=0.1, sigma=1.0)
    kernels: list[str] = []
    for number in range(4):
        with engine.batch(12):
            F.cross_entropy(model(x.cuda()), y.cuda()).backward()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                optimizer.step()
                torch.cuda.synchronize()
        if number == 3:
            kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) <= 9, kernels


def test_after_a_capture_that_was_broken_off_the_next_one_works(backend: str) -> None:
    """The stream, the memory pool and the generator are as if it had not been begun."""
    x, y = data(40)
    torch.manual_seed(0)
    model = dpk.convert_model(Dropped(), train_modules=("*5",), backend=backend).cuda()
    engine, model, optimizer, loader = attach(model, x, y, lr=0.05, **PADDED)
    reads = True

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = F.cross_entropy(model(x), y)
        return value * (1.0 + 0.0 * float(value.detach())) if reads else value

    step, stream = dpk.capture_step(optimizer, loss), torch.cuda.current_stream()
    with pytest.raises(dpk.EngineError, match="cannot be captured"):
        for _ in range(4):
            for xs, ys in loader:
                step(xs, ys)
    assert torch.cuda.current_stream() == stream
    reads = False
    assert torch.isfinite(F.dropout(torch.ones(100, device="cuda"), 0.5)).all()
    for _ in range(3):
        for xs, ys in loader:
            step(xs, ys)
    assert step.captured
    assert torch.isfinite(flat(model)).all()
