"""The captured step against the eager one: the same numbers, whatever changes between two calls.

Graphs are recorded operations here (recorded.py), so that what a replay cannot repeat is seen without a GPU; the same
step on CUDA graphs is in test_gpu_step.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat, small_model
from recorded import RecordedGraph
from torch import Tensor, nn, optim

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import capture
from dp_bitfit_kernels.flat_update import FlatUpdate

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn((40, 6), generator=GENERATOR), torch.randint(0, 3, (40,), generator=GENERATOR)
PADDED: dict[str, Any] = {"batch": 8, "max_physical_batch_size": 4, "pad_physical_batches": True}

pytestmark = pytest.mark.filterwarnings("ignore:this batch does not come from the private loader")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Graphs on the CPU; the class counts how many were recorded."""
    monkeypatch.setitem(capture.GRAPHS, "cpu", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "captures", 0)
    return RecordedGraph


class Dropped(nn.Module):
    """A dropout whose masks must be fresh at each replay, and a buffer that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.dropout(x + self.shift, 0.5, self.training))


class Training:
    """One private run of a given kind: ``eager``, or the captured step."""

    def __init__(self, captured: bool, model: Any = small_model, optimizer: Any = optim.AdamW, **options: Any):
        torch.manual_seed(0)
        self.model = dpk.convert_model(model(), train_modules=("*5",))
        self.engine, _, self.optimizer, self.loader = attach(
            self.model,
            X,
            Y,
            **{
                "engine": dpk.PrivacyEngine(unsafe_deterministic_seed=1),
                "optimizer": optimizer,
                "lr": 0.1,
                "sigma": 1.0,
                **PADDED,
                **options,
            },
        )
        self.step = dpk.capture_step(self.optimizer, self.loss) if captured else None
        self.losses: list[float] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def __call__(self, x: Tensor, y: Tensor) -> bool:
        if self.step is not None:
            released = self.step(x, y)
            assert self.step.loss is not None
            self.losses.append(float(self.step.loss))
            return released
        loss = self.loss(x, y)
        loss.backward()
        self.losses.append(float(loss.detach()))
        return bool(self.optimizer.step())

    def epochs(self, count: int = 1) -> Training:
        for _ in range(count):
            for x, y in self.loader:
                self(x, y)
        return self

    @property
    def outcome(self) -> tuple[Any, ...]:
        history = [(s.count, s.noise_multiplier, s.sample_rate) for s in self.engine.accountant.history.segments]
        return flat(self.model).tolist(), self.losses, history, self.engine._session.noise_steps


def both(**options: Any) -> Iterator[Training]:
    for captured in (False, True):
        yield Training(captured, **options)


@pytest.mark.parametrize("model", [small_model, Dropped])
@pytest.mark.parametrize("make", [optim.SGD, optim.AdamW, optim.Rprop])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_equals_the_eager_run_bit_for_bit(graphs: Any, model: Any, make: Any, clipping: str) -> None:
    """Draws of none to several physical batches, pads, dropout masks, noise, charges, parameters."""
    eager, captured = (run.epochs(4) for run in both(model=model, optimizer=make, clipping=clipping))
    assert graphs.captures == 2 and captured.step.captured
    assert eager.outcome == captured.outcome
    sizes = [len(list(part)) for _, part in itertools.groupby(eager.losses)]
    assert sum(sizes) > 20  # there were more batches than draws


def test_without_graphs_the_same_step_runs_eagerly() -> None:
    eager, captured = (run.epochs(4) for run in both(model=Dropped))
    assert eager.outcome == captured.outcome


def test_every_release_draws_noise_of_its_own(graphs: Any) -> None:
    """The counter on the device moves at each replay; the noise is the reference's stream at that number."""
    run = Training(True, sigma=1.0, optimizer=optim.SGD).epochs(2)
    seen = []
    original = run.engine._session.noisy_sum
    for _ in range(2):
        before = flat(run.model).clone()
        run.epochs(1)
        seen.append(flat(run.model) - before)
    assert graphs.captures == 2
    assert original is not None and not torch.equal(*seen)
    assert run.engine._session.noise_steps == run.engine.accountant.history.total_steps == 4 * len(run.loader)


def test_noise_alone_is_the_references_stream(graphs: Any) -> None:
    """Rows of zeros: what is released is z of steps 1, 2, 3 ..., by the reference."""
    from dp_bitfit_kernels import reference

    run = Training(True, optimizer=optim.SGD, lr=1.0, loss_scale=1.0)
    run.loss = lambda x, y: (run.model(x) * 0.0).sum()  # type: ignore[method-assign]
    run.step = dpk.capture_step(run.optimizer, run.loss)
    session = run.engine._session
    moved = []
    for x, y in itertools.chain(run.loader, run.loader):
        before = flat(run.model).double()
        if run(x, y):
            moved.append(before - flat(run.model).double())
    key = session.keys.key_tensor("cpu")
    assert graphs.captures == 2 and len(moved) == 10
    for step, change in enumerate(moved, 1):
        z = reference.standard_normal(key, torch.tensor([step]), 0, 0, len(change))
        torch.testing.assert_close(change, z / 8, rtol=0, atol=2e-6)


def test_a_scheduler_and_a_noise_schedule_are_followed(graphs: Any) -> None:
    runs = []
    for run in both():
        runs.append(run)
        scheduler = optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.7)
        for x, y in itertools.chain.from_iterable(run.loader for _ in range(3)):
            if run(x, y):
                scheduler.step()
                run.optimizer.noise_multiplier *= 0.9
    assert runs[0].outcome == runs[1].outcome
    assert graphs.captures == 1  # a release whose noise has another size each time runs eagerly


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.AdamW])
def test_an_update_inside_the_release_reads_its_rate_and_counters_there(
    graphs: Any, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    """As on a CUDA device: a fused kernel, whose learning rate is a tensor that a scheduler's change reaches."""
    eager = Training(False, optimizer=lambda ps, lr: make(ps, lr=lr, fused=True))
    monkeypatch.setattr(FlatUpdate, "capturable", True)
    captured = Training(True, optimizer=lambda ps, lr: make(ps, lr=lr, fused=True))
    for run in (eager, captured):
        scheduler = optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.7)
        for x, y in itertools.chain.from_iterable(run.loader for _ in range(3)):
            if run(x, y):
                scheduler.step()
    assert graphs.captures == 2
    assert (
        captured.optimizer.param_groups[0]["lr"]
        == eager.optimizer.param_groups[0]["lr"]
        == pytest.approx(0.1 * 0.7**15)
    )
    torch.testing.assert_close(flat(captured.model), flat(eager.model), rtol=1e-6, atol=1e-7)
    for one, other in zip(captured.optimizer.state.values(), eager.optimizer.state.values(), strict=True):
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-7)
    captured.step.close()
    captured.step = None
    captured.epochs(1)  # the optimizer goes on eagerly from the same state
    eager.epochs(1)
    torch.testing.assert_close(flat(captured.model), flat(eager.model), rtol=1e-5, atol=1e-6)


def test_another_hyperparameter_is_captured_anew(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = Training(False, optimizer=lambda ps, lr: optim.AdamW(ps, lr=lr, fused=True))
    monkeypatch.setattr(FlatUpdate, "capturable", True)
    captured = Training(True, optimizer=lambda ps, lr: optim.AdamW(ps, lr=lr, fused=True))
    for run in (eager, captured):
        run.epochs(2)
        run.optimizer.param_groups[0]["weight_decay"] = 0.5
        run.epochs(1)
        run.optimizer.load_state_dict(run.optimizer.state_dict())
        run.epochs(1)
    torch.testing.assert_close(flat(captured.model), flat(eager.model), rtol=1e-5, atol=1e-6)


def test_other_training_modes_run_eagerly_until_proven_then_are_captured(graphs: Any) -> None:
    runs = []
    for run in both(model=Dropped):
        runs.append(run)
        run.epochs(2)
        run.model.eval()
        run.epochs(2)
        run.model.train()
        run.epochs(1)
    assert runs[0].outcome == runs[1].outcome
    assert runs[1].step.captured


@pytest.mark.parametrize("what", ["frozen", "trained", "buffer", "loaded"])
def test_memory_that_moved_is_followed(graphs: Any, what: str) -> None:
    runs = []
    for run in both(model=Dropped):
        runs.append(run)
        run.epochs(2)
        first = run.model.inner[0]
        if what == "frozen":
            first.weight.data = first.weight.data * 2.0
        elif what == "trained":
            first.bias.data = first.bias.data + 1.0
        elif what == "buffer":
            run.model.shift = torch.full((6,), 3.0)
        else:
            run.model.load_state_dict({k: v + 0.5 for k, v in run.model.state_dict().items()})
        run.epochs(1)
    assert runs[0].outcome == runs[1].outcome


def test_lengths_get_a_graph_each_up_to_a_limit(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6)
            self.inner = small_model()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(self.embed(ids).mean(1))

    def run(captured: bool, lengths: int) -> Training:
        training = Training(captured, model=Lengths)
        for number, (x, y) in enumerate(itertools.chain.from_iterable(training.loader for _ in range(6))):
            ids = (x.abs() * 4).long().clamp(max=8).repeat(1, 3)[:, : 2 + number % lengths]
            training(ids, y)
        return training

    assert run(False, 3).outcome == run(True, 3).outcome
    assert graphs.captures == 4
    monkeypatch.setattr(capture, "MOST_KINDS", 2)
    with pytest.warns(UserWarning, match="kinds of batches"):
        captured = run(True, 4)
    assert run(False, 4).outcome == captured.outcome


def test_nested_batches_and_plain_values(graphs: Any) -> None:
    class Twofold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_model()

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.inner(batch["x"]) * batch["factor"]

    outcomes = []
    for captured in (False, True):
        run = Training(captured, model=Twofold)
        loss = lambda batch, y, run=run: F.cross_entropy(run.model(batch), y)  # noqa: E731
        step = dpk.capture_step(run.optimizer, loss)
        for number, (x, y) in enumerate(itertools.chain.from_iterable(run.loader for _ in range(4))):
            batch = {"x": x, "factor": 1.0 if number < 25 else 0.5}
            if captured:
                step(batch, y=y)
            else:
                loss(batch, y).backward()
                run.optimizer.step()
        outcomes.append(run.outcome)
    assert outcomes[0] == outcomes[1]
    with pytest.raises(dpk.EngineError, match="tensors and plain values, got object"):
        step({"x": x, "factor": object()}, y)


def test_batches_without_sampling_are_charged_in_full(graphs: Any) -> None:
    runs = []
    for run in both(poisson_sampling=False, max_physical_batch_size=None, pad_physical_batches=None):
        runs.append(run)
        run.epochs(3)
    assert runs[0].outcome == runs[1].outcome
    assert runs[1].outcome[2] == [(15, 0.0, 1.0)]  # a seeded run is charged as noise 0
    for run in runs:  # the last batch of an epoch is smaller
        for size in (3, 8, 8, 3, 3, 8, 8):
            run(X[:size], Y[:size])
    assert runs[0].outcome == runs[1].outcome


def test_a_poisoned_sample_is_selected_out(graphs: Any) -> None:
    runs = []
    for run in both(sample_rate=1.0):
        runs.append(run)
        run.epochs(1)
        for number, (x, y) in enumerate(itertools.chain.from_iterable(run.loader for _ in range(2))):
            run(x.clone().index_fill_(0, torch.tensor([1]), float("nan")) if number % 2 else x, y)
    assert torch.isfinite(flat(runs[1].model)).all()
    assert runs[0].outcome[0] == runs[1].outcome[0]


def test_a_forward_beside_the_captured_step_is_refused_and_close_allows_it(graphs: Any) -> None:
    run = Training(True).epochs(2)
    batches = iter(run.loader)
    x, y = next(batches)
    with torch.no_grad():
        run.model(x)  # evaluation
    with pytest.raises(dpk.EngineError, match=r"close\(\) it first"):
        run.loss(x, y).backward()
    run.step.close()
    run.loss(x, y).backward()  # the open batch goes on
    run.optimizer.step()
    with pytest.raises(dpk.EngineError, match="was closed"):
        run.step(x, y)
    again = dpk.capture_step(run.optimizer, run.loss)
    for x, y in batches:
        again(x, y)
    assert run.engine.accountant.history.total_steps == 3 * len(run.loader)


def test_of_two_captured_steps_the_one_that_is_called_holds_the_model(graphs: Any) -> None:
    runs = []
    for run in both():
        runs.append(run)
        steps = [run.step, dpk.capture_step(run.optimizer, run.loss)] if run.step else [None]
        for epoch in range(6):
            run.step = steps[epoch // 2 % len(steps)]
            run.epochs(1)
    assert runs[0].outcome == runs[1].outcome


def test_a_step_that_was_forgotten_locks_nothing(graphs: Any) -> None:
    run = Training(True).epochs(2)
    assert run.step.captured
    run.step = None
    run.epochs(1)  # eagerly
    assert run.engine.accountant.history.total_steps == 3 * len(run.loader)


def test_a_batch_is_stepped_on_once(graphs: Any) -> None:
    run = Training(True).epochs(2)
    x, y = next(iter(run.loader))
    run.step(x, y)
    with pytest.raises(dpk.EngineError, match="ticket"):
        run.step(x, y)


def test_what_a_graph_cannot_hold_is_an_error_that_says_so(graphs: Any) -> None:
    run = Training(True)
    reads = lambda x, y: F.cross_entropy(run.model(x), y) * (2.0 if float(x.sum()) > 0 else 1.0)  # noqa: E731
    step = dpk.capture_step(run.optimizer, reads)
    charged = 0
    with pytest.raises(dpk.EngineError, match="reads a tensor's value in Python"):
        for x, y in itertools.chain(run.loader, run.loader):
            charged += step(x, y)
    assert run.engine.accountant.history.total_steps == charged >= 2
    assert run.engine._session.draw is None and run.engine._session.ledger.batch is None


def test_a_failing_charge_releases_nothing(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(True).epochs(2)
    before, steps = flat(run.model).clone(), run.engine._session.noise_steps

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(run.engine.accountant, "charge", fail)
    with pytest.raises(OSError, match="disk full"):
        run.epochs(1)
    assert torch.equal(flat(run.model), before)
    assert run.engine._session.noise_steps == steps
    assert not run.engine._session.ledger.total.any()


def test_a_checkpoint_goes_on_under_capture(graphs: Any, tmp_path: Any) -> None:
    path = str(tmp_path / "c.pt")
    straight = Training(True).epochs(2)
    straight.engine.save_checkpoint(path)
    resumed = Training(True)
    resumed.engine.load_checkpoint(path)
    for run in (straight, resumed):
        run.losses.clear()
        run.epochs(2)
    assert straight.losses == resumed.losses
    assert flat(straight.model).tolist() == flat(resumed.model).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_physical_batches": False}, "pad_physical_batches=True"),
        ({"max_physical_batch_size": None, "pad_physical_batches": None}, "pad_physical_batches=True"),
    ],
)
def test_batches_of_no_fixed_size_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(dpk.EngineError, match=message):
        Training(True, **options)


def test_bad_arguments_are_named() -> None:
    run = Training(False)
    with pytest.raises(dpk.EngineError, match="the optimizer of make_private, got AdamW"):
        dpk.capture_step(run.optimizer.original_optimizer, run.loss)
    with pytest.raises(dpk.EngineError, match="must be a function"):
        dpk.capture_step(run.optimizer, None)  # type: ignore[arg-type]
    x, y = next(iter(run.loader))
    step = dpk.capture_step(run.optimizer, lambda x, y: F.cross_entropy(run.model(x), y, reduction="none"))
    with pytest.raises(dpk.EngineError, match=r"without dimensions, got a tensor \(4,\)"):
        step(x, y)
    with torch.no_grad(), pytest.raises(dpk.EngineError, match="no_grad"):
        step(x, y)
    run.engine.detach()
    with pytest.raises(dpk.EngineError, match="detached engine"):
        step(x, y)


class Rprop(optim.Rprop):
    """Steps parameter by parameter, on whatever has a gradient."""


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("make", [optim.AdamW, Rprop])
@pytest.mark.parametrize("early", [True, False])
def test_a_parameter_that_was_unfrozen_gets_no_raw_gradient(
    monkeypatch: pytest.MonkeyPatch, recorded: bool, make: Any, early: bool
) -> None:
    """Before its first capture or after, the call in which it happens refuses, as the eager step does."""
    if recorded:
        monkeypatch.setitem(capture.GRAPHS, "cpu", RecordedGraph)
    run = Training(True)
    run.engine.detach()
    everything = make(run.model.parameters(), lr=0.1)
    with pytest.warns(UserWarning):
        _, run.model, run.optimizer, run.loader = attach(
            run.model, X, Y, **PADDED, sigma=1.0, optimizer=lambda params, lr: everything
        )
    run.step = dpk.capture_step(run.optimizer, run.loss)
    batches = itertools.chain.from_iterable(run.loader for _ in range(4))
    while not run.step.captured:
        run.step(*next(batches))
    if not early:
        for _ in range(5):
            run.step(*next(batches))
    weight, x_y = run.model[3].weight, next(batches)
    before, biases, charged = weight.clone(), flat(run.model), run.optimizer.session.releases
    weight.requires_grad_(True)
    with pytest.raises(dpk.EngineError, match=r"a raw gradient reached parameter '3\.weight'"):
        run.step(*x_y)
    assert torch.equal(weight, before) and weight.grad is None
    assert run.optimizer.session.releases == charged and not run.optimizer.session.ledger.total.any()
    weight.requires_grad_(False)
    assert torch.equal(flat(run.model), biases)
    for x_y in batches:  # and it goes on, once that is undone
        run.step(*x_y)
    assert torch.equal(weight, before)


def test_a_penalty_on_the_parameters_is_refused_at_every_call(graphs: Any) -> None:
    run = Training(True).epochs(2)
    penalised = dpk.capture_step(
        run.optimizer, lambda x, y: run.loss(x, y) + sum(p.square().sum() for p in run.model.parameters())
    )
    before = flat(run.model)
    for x, y in run.loader:
        with pytest.raises(dpk.EngineError, match="a raw gradient reached"):
            penalised(x, y)
    assert torch.equal(flat(run.model), before)


STATES: dict[str, Any] = {
    "cleared": lambda o: o.state.clear(),
    "fresh": lambda o: o.load_state_dict(type(o)(o.param_groups[0]["params"], lr=0.1, fused=True).state_dict()),
    "hyperparameter": lambda o: o.param_groups[0].update(weight_decay=0.3),
    "momentum on": lambda o: o.param_groups[0].update(momentum=0.9) if "momentum" in o.param_groups[0] else None,
}


@pytest.mark.parametrize("change", STATES)
@pytest.mark.parametrize("make", ["adamw", "sgd", "momentum"])
def test_a_state_that_is_not_there_yet_is_not_built_into_the_release(
    graphs: Any, monkeypatch: pytest.MonkeyPatch, change: str, make: str
) -> None:
    makes: dict[str, Any] = {
        "adamw": lambda ps, lr: optim.AdamW(ps, lr=lr, fused=True),
        "sgd": lambda ps, lr: optim.SGD(ps, lr=lr, fused=True),
        "momentum": lambda ps, lr: optim.SGD(ps, lr=lr, momentum=0.9, fused=True),
    }
    eager = Training(False, optimizer=makes[make])
    monkeypatch.setattr(FlatUpdate, "capturable", True)
    captured = Training(True, optimizer=makes[make])
    for run in (eager, captured):
        run.epochs(3)
        STATES[change](run.optimizer.original_optimizer)
        run.epochs(2)
    torch.testing.assert_close(flat(captured.model), flat(eager.model), rtol=1e-5, atol=1e-6)
    for one, other in zip(captured.optimizer.state.values(), eager.optimizer.state.values(), strict=True):
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-7)


def test_the_first_release_of_a_process_is_eager(graphs: Any, tmp_path: Any) -> None:
    """Also in a run that goes on from a checkpoint, with draws of many batches: the key comes to the device there."""
    path = str(tmp_path / "c.pt")
    options: dict[str, Any] = {"batch": 40, "sample_rate": 1.0, "expected_batch_size": 40.0}
    Training(False, **options).epochs(3).engine.save_checkpoint(path)
    resumed = Training(True, **options)
    resumed.engine.load_checkpoint(path)
    first = []
    monkey = resumed.engine._session.noisy_sum

    def noisy_sum() -> Tensor:
        first.append(torch.utils._python_dispatch._get_current_dispatch_mode() is None)
        return monkey()

    resumed.engine._session.noisy_sum = noisy_sum  # type: ignore[method-assign]
    resumed.epochs(4)
    assert resumed.step.captured and first[0] and not first[-1]


@pytest.mark.parametrize("place", ["close", "end_batch", "charge", "noisy_sum"])
def test_an_interrupt_never_lets_a_batch_count_twice(graphs: Any, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    run = Training(True, sigma=0.0).epochs(3)
    session = run.engine._session
    owner = session.ledger if place == "close" else session
    real = getattr(owner, place)

    def interrupted(*args: Any) -> Any:
        monkeypatch.setattr(owner, place, real)
        raise KeyboardInterrupt

    batches = iter(run.loader)
    x, y = next(batches)
    if place == "noisy_sum":
        run.optimizer.noise_multiplier = 0.5  # so that the release runs eagerly
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(owner, place, interrupted)
        for _ in range(20):
            run.step(x, y)
            x, y = next(batches)
    with pytest.raises(dpk.EngineError, match="ticket"):
        run.step(x, y)
    assert session.draw is None and not session.ledger.total.any()


def test_arguments_of_other_leading_sizes(graphs: Any) -> None:
    runs = []
    for run in both(poisson_sampling=False, max_physical_batch_size=None, pad_physical_batches=None):
        runs.append(run)
        loss = lambda x, y, w, run=run: F.cross_entropy(run.model(x), y, weight=w, reduction="sum") / len(x)  # noqa: E731
        step = dpk.capture_step(run.optimizer, loss)
        for x, y in itertools.chain.from_iterable(run.loader for _ in range(3)):
            weights = torch.tensor([1.0, 2.0, 0.5])
            if run.step is not None:
                step(x, y, weights)
            else:
                loss(x, y, weights).backward()
                run.optimizer.step()
    assert runs[0].outcome == runs[1].outcome


@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD])
def test_a_schedule_of_momentum_releases_eagerly(graphs: Any, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    """OneCycleLR changes beta1 or momentum at every step: a graph made for each would be worse than none."""

    def made(ps: Any, lr: float) -> Any:
        return make(ps, lr=lr, fused=True, **({"momentum": 0.9} if make is optim.SGD else {}))

    eager = Training(False, optimizer=made)
    monkeypatch.setattr(FlatUpdate, "capturable", True)
    captured = Training(True, optimizer=made)
    for run in (eager, captured):
        scheduler = optim.lr_scheduler.OneCycleLR(run.optimizer, 0.1, total_steps=30)
        for x, y in itertools.chain.from_iterable(run.loader for _ in range(5)):
            if run(x, y):
                scheduler.step()
    torch.testing.assert_close(flat(captured.model), flat(eager.model), rtol=1e-5, atol=1e-6)
    assert captured.step.captured and graphs.captures == 1


class Attributes(nn.Module):
    """Numbers that a graph has built in."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.square = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.drop = nn.Dropout(0.0)
        self.act: nn.Module = nn.Tanh()
        self.inner = small_model()
        self.kept = self.act.register_forward_hook(_thrice)
        self.pair, self.settings, self.function, self.shift = (1.0, 1.0), {"scale": 1.0}, torch.tanh, torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(x * self.pair[1] + self.shift)
        return self.inner(self.drop(self.act(self.norm(self.square(x))))) * self.scale * self.settings["scale"]


def _thrice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 3.0


def _twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2.0


CHANGES: dict[str, Any] = {
    "turned": lambda m: setattr(m.square.weight, "data", m.square.weight.data.t()),
    "attribute": lambda m: setattr(m, "scale", 0.5),
    "dropout": lambda m: setattr(m.drop, "p", 0.5),
    "eps": lambda m: setattr(m.norm, "eps", 0.3),
    "module": lambda m: setattr(m, "act", nn.ReLU()),
    "hook": lambda m: m.act.register_forward_hook(_twice),
    "another hook": lambda m: (m.kept.remove(), m.act.register_forward_hook(_twice)),
    "forward of an instance": lambda m: setattr(m.act, "forward", torch.sin),
    "tuple": lambda m: setattr(m, "pair", (0.5, 2.0)),
    "dict": lambda m: m.settings.update(scale=3.0),
    "function": lambda m: setattr(m, "function", torch.relu),
    "plain tensor": lambda m: setattr(m, "shift", torch.ones(6)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_are_followed(graphs: Any, change: str) -> None:
    runs = []
    for run in both(model=Attributes):
        runs.append(run)
        run.epochs(3)
        CHANGES[change](run.model)
        run.epochs(2)
    assert runs[0].outcome == runs[1].outcome
    assert runs[1].step.captured


def test_a_number_that_changes_is_followed_and_warned_of_in_the_end(graphs: Any) -> None:
    runs = []
    for run in both():
        runs.append(run)
        loss = lambda x, y, a, run=run: F.cross_entropy(run.model(x), y) * a  # noqa: E731
        step = dpk.capture_step(run.optimizer, loss)
        with pytest.warns(UserWarning, match="kinds of batches") if run.step else contextlib.nullcontext():
            for epoch in range(20):
                for x, y in run.loader:
                    if run.step is not None:
                        step(x, y, 0.9**epoch)
                    else:
                        loss(x, y, 0.9**epoch).backward()
                        run.optimizer.step()
    assert runs[0].outcome == runs[1].outcome


def test_a_scheduler_made_late_sees_the_steps(graphs: Any, recwarn: pytest.WarningsRecorder) -> None:
    run = Training(True).epochs(3)
    scheduler = optim.lr_scheduler.StepLR(run.optimizer, 1)
    for x, y in run.loader:
        if run.step(x, y):
            scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_a_parameter_outside_the_model_gets_no_raw_gradient(graphs: Any) -> None:
    """Frozen when the engine came, unfrozen later: refused by the eager step and by the captured one alike."""
    for captured in (False, True):
        outside = nn.Parameter(torch.ones(3), requires_grad=False)
        made = lambda ps, lr, outside=outside: Rprop([*ps, outside], lr=lr)  # noqa: E731
        with pytest.warns(UserWarning, match="frozen parameter"):
            run = Training(captured, optimizer=made)
        inner = run.loss
        run.loss = lambda x, y, run=run, o=outside: F.cross_entropy(run.model(x) * o, y)  # type: ignore[method-assign]
        if captured:
            run.step = dpk.capture_step(run.optimizer, run.loss)
        run.epochs(3)
        outside.requires_grad_(True)
        with pytest.raises(dpk.OptimizerError, match="not part of the module was unfrozen"):
            run.epochs(1)
        assert torch.equal(outside, torch.ones(3)) and inner is not None


def test_graphs_of_two_physical_sizes_read_the_mask_that_is_written(graphs: Any) -> None:
    """A smaller last batch must not leave the larger one's graph on memory that was given back."""
    runs = []
    for run in both(poisson_sampling=False, max_physical_batch_size=None, pad_physical_batches=None):
        runs.append(run)
        masks = set()
        for _ in range(5):
            for x, y in ((X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:20], Y[16:20])):
                run(x, y)
                masks.add(run.optimizer.session.ledger._slab.mask.data_ptr())
        assert len(masks) == 1
    assert runs[0].outcome == runs[1].outcome
    assert graphs.captures == 3  # one of each size, one release


class Counting(nn.Module):
    """Changes itself in the forward, in a way that a graph would or would not repeat."""

    how = "buffer"

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()
        self.register_buffer("n", torch.zeros(()))
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.how == "buffer":
            self.n = self.n + 1.0
        if torch.is_grad_enabled() and self.how == "number":
            self.count += 1
        return self.inner(x) * (self.n + self.count + 1.0).clamp(max=30.0) / 30.0


@pytest.mark.parametrize("how", ["buffer", "number"])
def test_a_model_that_changes_itself_stays_eager(graphs: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(Counting, "how", how)
    eager = Training(False, model=Counting).epochs(4)
    with pytest.warns(UserWarning, match="runs eagerly"):
        captured = Training(True, model=Counting).epochs(4)
    assert eager.outcome == captured.outcome
    assert not captured.step.captured


def test_a_batch_that_is_open_when_its_step_is_forgotten_goes_on_eagerly(graphs: Any) -> None:
    run = Training(True).epochs(3)
    batches = iter(run.loader)
    x, y = next(batches)
    run.step = None
    run(x, y)
    for x, y in batches:
        run(x, y)
    assert run.engine.accountant.history.total_steps == 4 * len(run.loader)


def _tiny(name: str) -> tuple[nn.Module, Tensor, str]:
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 3,
    }
    if name == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=8, **small)
        return transformers.ViTForImageClassification(config), torch.randn(24, 3, 16, 16), "pixel_values"
    if name == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
        return transformers.ResNetForImageClassification(config), torch.randn(24, 3, 16, 16), "pixel_values"
    config = transformers.RobertaConfig(vocab_size=40, max_position_embeddings=20, **small)
    return transformers.RobertaForSequenceClassification(config), torch.randint(4, 40, (24, 9)), "input_ids"


@pytest.mark.parametrize("name", ["roberta", "vit", "resnet"])
def test_models_of_transformers_are_captured_and_stay_so(graphs: Any, name: str) -> None:
    """With their dropout: nothing that they do to themselves in a forward looks like a change."""
    outcomes = []
    for captured in (False, True):
        torch.manual_seed(0)
        model, inputs, argument = _tiny(name)
        dpk.convert_model(model.train(), train_modules=("classifier*",))
        engine = dpk.PrivacyEngine(unsafe_deterministic_seed=1)
        engine, model, optimizer, loader = attach(
            model, inputs, torch.arange(24) % 3, **{**PADDED, "engine": engine, "sigma": 1.0, "lr": 0.05}
        )
        loss = lambda batch, y, model=model: F.cross_entropy(model(**batch).logits, y)  # noqa: E731
        step = dpk.capture_step(optimizer, loss)
        for x, y in itertools.chain.from_iterable(loader for _ in range(5)):
            if captured:
                step({argument: x}, y)
            else:
                loss({argument: x}, y).backward()
                optimizer.step()
        outcomes.append(flat(model).tolist())
    assert graphs.captures == 2
    assert outcomes[0] == outcomes[1]
