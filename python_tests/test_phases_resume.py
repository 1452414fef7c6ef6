"""Checkpoints and files of biases of runs in phases."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from attach import names_of, small_model
from phased import ALL, BIASES, MIX, TWO, Run, epochs, private, same, snapshot, step, values
from torch import optim

import dp_bitfit_kernels as dpk

EPOCHS = [phase.epochs for phase in TWO]


def seeded(phases: Any = TWO, **options: Any) -> Run:
    """Draws of three physical batches, whose noise and records are those of any run with this seed."""
    engine = dpk.PrivacyEngine(unsafe_deterministic_seed=5)
    options = {"sigma": 1.0, "rate": 0.25, "optimizer": optim.Adam, "max_physical_batch_size": 2, **options}
    return private(phases, engine=engine, **options)


def train(run: Run, scheduler: Any, start: dict[str, int], stop: int | None = None) -> int:
    """The user's loop, from a state that load_checkpoint returned, up to ``stop`` releases; how many there are now."""
    releases = start["releases"]
    for phase in range(start["phase"], len(EPOCHS)):
        if phase > start["phase"]:
            run.engine.next_phase()
        for _ in range(start["epoch"] if phase == start["phase"] else 0, EPOCHS[phase]):
            for x, y in run.loader:
                if step(run.model, run.optimizer, x, y):
                    scheduler.step()
                    releases += 1
                    if releases == stop:
                        return releases
    return releases


BEGINNING = {"releases": 0, "phase": 0, "epoch": 0}


@pytest.mark.parametrize("optimizer", [optim.Adam, optim.SGD])
@pytest.mark.parametrize("stop", [0, 3, 8, 11, 20])
def test_a_resumed_run_is_the_uninterrupted_one(stop: int, optimizer: Any, tmp_path: Any) -> None:
    """Interrupted before the first release, within each phase, and at the end of each: the same parameters to the bit,
    the same state of the optimizer, rates, counters and number of charges."""
    path = str(tmp_path / "run.pt")
    whole = seeded(optimizer=optimizer)
    scheduler = optim.lr_scheduler.ExponentialLR(whole.optimizer, 0.9)
    assert train(whole, scheduler, BEGINNING) == 20

    first = seeded(optimizer=optimizer)
    scheduler = optim.lr_scheduler.ExponentialLR(first.optimizer, 0.9)
    if stop:
        assert train(first, scheduler, BEGINNING, stop) == stop
    first.engine.save_checkpoint(path, scheduler=scheduler)

    again = seeded(optimizer=optimizer, model=small_model(9))
    loaded = optim.lr_scheduler.ExponentialLR(again.optimizer, 0.9)
    with torch.no_grad():
        for name, parameter in again.model.named_parameters():  # what was never trained is not in the checkpoint
            parameter.copy_(values(small_model())[name])
    state = again.engine.load_checkpoint(path, scheduler=loaded)
    in_second = stop > 8
    assert state["phase"] == int(in_second) == again.engine.phase == first.engine.phase
    assert (state["releases"], state["epoch"]) == (stop, (stop - 8 if in_second else stop) // 4)
    assert names_of(again.model) == list(BIASES if in_second else ALL)
    assert train(again, loaded, state) == 20

    for name in ALL:
        assert torch.equal(values(again.model)[name], values(whole.model)[name]), name
    assert again.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert again.engine.accountant.history.total_steps == whole.engine.accountant.history.total_steps == 20
    assert again.engine._session.noise_steps == whole.engine._session.noise_steps == 20
    assert again.engine._draws.value == whole.engine._draws.value == 20
    ours, theirs = (list(run.optimizer.state_dict()["state"].values()) for run in (again, whole))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for key, value in one.items():
            assert value is other[key] is None or torch.equal(value, other[key])
    assert again.engine.privacy_statement()["phases"] == whole.engine.privacy_statement()["phases"]


def test_a_resumed_run_meets_its_target_and_warns_beyond(tmp_path: Any) -> None:
    path = str(tmp_path / "run.pt")
    first = private(TWO, epsilon=2.0, rate=0.25)
    epochs(first, 2)
    first.engine.next_phase()
    epochs(first, 1)
    first.engine.save_checkpoint(path)
    again = private(TWO, epsilon=2.0, rate=0.25)
    assert again.engine.load_checkpoint(path) == {"releases": 12, "phase": 1, "epoch": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epochs(again, 2)
        assert 1.95 < again.engine.get_epsilon(1e-3) <= 2.0
    with pytest.warns(UserWarning, match="epsilon exceeds"):
        epochs(again, 1)


def test_a_checkpoint_of_the_second_phase_holds_the_weights_of_the_first(tmp_path: Any) -> None:
    path = str(tmp_path / "run.pt")
    first = private([dpk.Phase(MIX, epochs=1), dpk.Phase("biases", epochs=1)])
    epochs(first, 1)
    first.engine.next_phase()
    first.engine.save_checkpoint(path)
    saved = dpk.checkpoint.read_checkpoint(path)["parameters"]
    assert list(saved) == [*BIASES[:3], "5.weight", "5.bias"]
    again = private([dpk.Phase(MIX, epochs=1), dpk.Phase("biases", epochs=1)])
    again.engine.load_checkpoint(path)
    assert all(torch.equal(values(again.model)[name], values(first.model)[name]) for name in ALL)


def test_the_epoch_that_was_interrupted_does_not_shorten_the_next_phase(tmp_path: Any) -> None:
    path = str(tmp_path / "run.pt")
    first = private(TWO, rate=0.25)
    for x, y in first.loader:
        step(first.model, first.optimizer, x, y)
        break
    first.engine.save_checkpoint(path)
    again = private(TWO, rate=0.25)
    again.engine.load_checkpoint(path)
    assert again.loader.skip_draws == 1
    again.engine.next_phase()
    epochs(again, 1)
    assert again.engine._session.releases == 4


@pytest.mark.parametrize(
    "mine", [None, [TWO[0]], [TWO[1], TWO[0]], [TWO[0], dpk.Phase("biases", epochs=4, lr=0.05)], "in the second"]
)
def test_a_checkpoint_of_other_phases_changes_nothing(mine: Any, tmp_path: Any) -> None:
    path = str(tmp_path / "run.pt")
    first = private(TWO, optimizer=optim.Adam)
    epochs(first, 1)
    first.engine.save_checkpoint(path)
    other = private(TWO if isinstance(mine, str) else mine, optimizer=optim.Adam, model=small_model(3))
    epochs(other, 1)
    if isinstance(mine, str):
        other.engine.next_phase()
    before, parameters = snapshot(other), values(other.model)
    with pytest.raises(dpk.CheckpointError, match="nothing was changed"):
        other.engine.load_checkpoint(path)
    assert same(snapshot(other), before) and same(values(other.model), parameters)


def test_a_checkpoint_without_phases_is_refused_by_a_run_with_some(tmp_path: Any) -> None:
    path = str(tmp_path / "run.pt")
    private(None).engine.save_checkpoint(path)
    with pytest.raises(dpk.CheckpointError, match="without phases"):
        private(TWO).engine.load_checkpoint(path)
    assert private(None).engine.load_checkpoint(path) == {"releases": 0, "epoch": 0}


@pytest.mark.parametrize("other", ["class", "groups"])
def test_a_checkpoint_of_the_second_phase_that_does_not_fit_leaves_the_first(other: str, tmp_path: Any) -> None:
    path = str(tmp_path / "run.pt")
    first = private(TWO, optimizer=optim.Adam)
    epochs(first, 1)
    first.engine.next_phase()
    first.engine.save_checkpoint(path)

    def two_groups(parameters: Any, lr: float) -> Any:
        return optim.Adam([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=lr)

    again = private(TWO, optimizer=optim.SGD if other == "class" else two_groups)
    before = snapshot(again)
    with pytest.raises(dpk.CheckpointError, match="nothing was changed"):
        again.engine.load_checkpoint(path)
    assert same(snapshot(again), before)
    epochs(again, 1)


@pytest.mark.parametrize("copied", [False, True])
def test_a_file_of_biases_holds_what_any_phase_trained(copied: bool, tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "task.safetensors"
    run = private(TWO, sigma=1.0)
    epochs(run, 2)
    run.engine.next_phase()
    epochs(run, 1)
    dpk.save_biases(copy.deepcopy(run.model) if copied else run.model, path, delta=1e-3)
    plain = small_model()
    statement = dpk.load_biases(plain, path)
    assert statement["private"] is not copied
    assert copied or [phase["releases"] for phase in statement["phases"]] == [2, 1]
    assert same(values(plain), values(run.model))
    other = private(TWO, model=small_model(4))  # every weight is in the file, so any base will do
    other.engine.next_phase()
    dpk.load_biases(other.model, path)
    assert same(values(other.model), values(run.model))
    epochs(other, 1)
    assert not torch.equal(values(other.model)["0.bias"], values(run.model)["0.bias"])
