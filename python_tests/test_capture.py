"""The captured step against the eager one: the same numbers, whatever changes between two calls.

Graphs are recorded operations here (recorded.py), so that what a replay cannot repeat is seen without a GPU; the same
step on CUDA graphs is in test_gpu_step.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import flat, small_model
from captured import Dropped, Training, X, Y, both
from torch import Tensor, nn, optim

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import capture
from dp_bitfit_kernels.flat_update import FlatUpdate

pytestmark = pytest.mark.filterwarnings("ignore:this batch does not come from the private loader")


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
