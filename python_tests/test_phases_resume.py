"""Checkpoints, files of biases and refusals of runs in phases."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import names_of, small_model
from phased import MIX, TWO, X, Y, Run, epochs, private, step, values
from test_phases import ALL, BIASES
from torch import nn, optim

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels.flat_update import FlatUpdate
from dp_bitfit_kernels.ledger import Ledger

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


def snapshot(run: Run) -> tuple[Any, ...]:
    session = run.engine._session
    trained = [(m.trained, m.attachment) for m in session.ledger.layers]
    state = copy.deepcopy(run.optimizer.state_dict())
    session_facts = (session, session.ended, session.releases, session.noise_steps, run.optimizer.session)
    return names_of(run.model), trained, state, session_facts, run.engine.phase, run.engine.privacy_statement()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


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


def test_a_file_of_biases_holds_what_any_phase_trained(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "task.safetensors"
    run = private(TWO, sigma=1.0)
    epochs(run, 2)
    run.engine.next_phase()
    epochs(run, 1)
    dpk.save_biases(run.model, path, delta=1e-3)
    plain = small_model()
    statement = dpk.load_biases(plain, path)
    assert [phase["releases"] for phase in statement["phases"]] == [2, 1]
    assert same(values(plain), values(run.model))
    other = private(TWO, model=small_model(4))  # every weight is in the file, so any base will do
    other.engine.next_phase()
    dpk.load_biases(other.model, path)
    assert same(values(other.model), values(run.model))
    epochs(other, 1)
    assert not torch.equal(values(other.model)["0.bias"], values(run.model)["0.bias"])


BAD = [
    ([], "at least one"),
    (TWO[0], "must be a list"),
    (["full"], r"phases\[0\] must be a dpk.Phase"),
    ([TWO[0], dpk.Phase("biases", epochs=0)], r"phases\[1\]: epochs=0"),
    ([TWO[0], dpk.Phase("biases", epochs=1.5)], r"phases\[1\]: epochs=1.5"),  # type: ignore[arg-type]
    ([dpk.Phase("full", epochs=True)], r"phases\[0\]: epochs=True"),
    ([dpk.Phase("full", epochs=1, lr=0.0)], r"phases\[0\]: lr=0.0"),
    ([dpk.Phase("full", epochs=1, lr=float("nan"))], r"phases\[0\]: lr=nan"),
    ([dpk.Phase("full", epochs=1, lr=float("inf"))], r"phases\[0\]: lr=inf"),
    ([dpk.Phase("full", epochs=1, lr="fast")], r"phases\[0\]: lr='fast'"),  # type: ignore[arg-type]
    ([dpk.Phase("full", epochs=1, max_grad_norm=-1.0)], r"phases\[0\]: max_grad_norm=-1.0"),
    ([dpk.Phase((), epochs=1)], r"phases\[0\]: train=\(\)"),
    ([dpk.Phase(("",), epochs=1)], r"phases\[0\]: train="),
    ([dpk.Phase(("biases", "!"), epochs=1)], r"phases\[0\]: train="),
    ([dpk.Phase(3, epochs=1)], r"phases\[0\]: train=3"),  # type: ignore[arg-type]
    ([TWO[0], dpk.Phase("bias", epochs=1)], r"phases\[1\].*'bias' matches none.*near it: biases"),
    ([TWO[0], dpk.Phase(("biases", "!head.*"), epochs=1)], r"phases\[1\].*'head.\*' matches none"),
    ([TWO[0], dpk.Phase(("biases", "!*"), epochs=1)], r"phases\[1\].*trains nothing"),
]


@pytest.mark.parametrize("epsilon", [None, 2.0])
@pytest.mark.parametrize(("phases", "message"), BAD)
def test_bad_phases_are_refused_by_number(phases: Any, message: str, epsilon: float | None) -> None:
    model = dpk.convert_model(small_model(), train_modules=("*",))
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(dpk.EngineError, match=message):
        private(phases, model=model, modules=None, epsilon=epsilon)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    epochs(private(TWO, model=model, modules=None), 1)


@pytest.mark.parametrize("options", [{}, {"epochs": 2}])
def test_epochs_or_phases(options: Any) -> None:
    with pytest.raises(dpk.EngineError, match="either epochs= or phases="):
        private(TWO if options else None, epsilon=2.0, **options)


@pytest.mark.parametrize("epsilon", [1e-9, -1.0, float("nan")])
def test_a_budget_that_is_too_small_changes_nothing(epsilon: float) -> None:
    model = dpk.convert_model(small_model(), train_modules=("*",))
    with pytest.raises(dpk.AccountingError, match="target_epsilon"):
        private(TWO, model=model, modules=None, epsilon=epsilon)
    assert names_of(model) == list(ALL)
    epochs(private(TWO, model=model, modules=None, epsilon=2.0), 1)


def test_no_phase_after_the_last_and_none_without_phases() -> None:
    run = private(TWO)
    run.engine.next_phase()
    before = snapshot(run)
    with pytest.raises(dpk.EngineError, match=r"phases\[1\].*is the last"):
        run.engine.next_phase()
    assert same(snapshot(run), before)
    epochs(run, 1)
    run.engine.detach()
    with pytest.raises(dpk.EngineError, match="not attached"):
        run.engine.next_phase()
    without = private(None)
    assert without.engine.phase is None
    with pytest.raises(dpk.EngineError, match="no phases"):
        without.engine.next_phase()


def test_not_in_the_middle_of_a_draw() -> None:
    run = private(TWO, max_physical_batch_size=6)
    batches = iter(run.loader)
    x, y = next(batches)
    F.cross_entropy(run.model(x), y).backward()
    with pytest.raises(dpk.EngineError, match="next_phase in the middle of a draw"):
        run.engine.next_phase()
    assert not run.optimizer.step()
    with pytest.raises(dpk.EngineError, match="next_phase in the middle of a draw"):
        run.engine.next_phase()
    assert step(run.model, run.optimizer, *next(batches))
    run.engine.next_phase()


@pytest.mark.parametrize("secure", [False, True])
def test_a_drawn_batch_that_is_left_by_the_change(secure: bool) -> None:
    run = private(
        TWO,
        sigma=1.0,
        engine=dpk.PrivacyEngine(secure_mode=secure),
        max_physical_batch_size=12,
        pad_physical_batches=True,
    )
    next(iter(run.loader))
    if secure:
        with pytest.raises(dpk.EngineError, match="left without a step"):
            run.engine.next_phase()
        assert run.engine.phase == 0
        run.engine.next_phase()
    else:
        with pytest.warns(UserWarning, match="left without a step"):
            run.engine.next_phase()
    epochs(run, 1)


@pytest.mark.parametrize("fault", ["ledger", "update", "replaced", "unfrozen"])
@pytest.mark.parametrize("optimizer", [optim.Adam, optim.Rprop])
def test_an_error_while_entering_leaves_the_phase_as_it_was(
    fault: str, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = private([dpk.Phase(("full", "!5.*"), epochs=1), dpk.Phase(("biases", "5.*"), epochs=2)], optimizer=optimizer)
    epochs(run, 1)
    last: nn.Linear = run.model[5]  # type: ignore[index, assignment]
    before, kept = snapshot(run), last.weight

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    if fault == "replaced":
        last.weight = nn.Parameter(kept.detach().clone(), requires_grad=False)
    elif fault == "unfrozen":
        run.model.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    else:
        target, name = (Ledger, "__init__") if fault == "ledger" else (FlatUpdate, "of")
        monkeypatch.setattr(target, name, fail)
    with pytest.raises((dpk.DPBiTFiTError, MemoryError), match="no room|another object|no converted layer"):
        run.engine.next_phase()
    monkeypatch.undo()
    last.weight = kept
    run.model._parameters.pop("extra", None)
    assert same(snapshot(run), before)
    epochs(run, 1)
    run.engine.next_phase()
    epochs(run, 1)


def test_a_parameter_frozen_by_hand_is_not_thawed_by_the_change() -> None:
    run = private(TWO)
    run.model[0].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    with pytest.raises(dpk.EngineError, match=r"'0.bias' was frozen"):
        run.engine.next_phase()


def test_a_trained_parameter_that_the_optimizer_lacks() -> None:
    """Of any phase; what none trains may be missing."""
    for phases, refused in (([TWO[1], TWO[0]], True), ([dpk.Phase(MIX, epochs=1), TWO[1]], False)):
        model = dpk.convert_model(small_model(), train_modules=("*",))
        own = [p for name, p in model.named_parameters() if name in BIASES or name.startswith("5.")]
        if refused:
            with pytest.raises(dpk.OptimizerError, match=r"lacks 3 trained parameter\(s\), first '0.weight'"):
                private(phases, model=model, modules=None, optimizer=lambda _, lr, own=own: optim.SGD(own, lr=lr))
            assert names_of(model) == list(ALL)
        else:
            epochs(private(phases, model=model, modules=None, optimizer=lambda _, lr, own=own: optim.SGD(own, lr)), 1)


def test_a_second_engine_is_refused_and_leaves_the_phase() -> None:
    run = private(TWO)
    run.engine.next_phase()
    with pytest.raises(dpk.EngineError, match="already has a PrivacyEngine"):
        private([TWO[1]], model=run.model, modules=None)
    assert names_of(run.model) == list(BIASES)
    epochs(run, 1)


def test_bounds_of_layers_must_fit_every_phase() -> None:
    bounds = dpk.clipping.PerLayer(1.0, [0.5] * 4)
    epochs(private([TWO[1]], clipping=bounds), 1)
    with pytest.raises(dpk.ClippingError, match=r"phases\[1\].*4 per-layer bounds were given for 1 trained"):
        private([TWO[1], dpk.Phase("5.*", epochs=1)], clipping=bounds)


def test_without_poisson_sampling() -> None:
    run = private(TWO, sigma=1.0, poisson_sampling=False, sample_rate=None, expected_batch_size=None)
    epochs(run, 1)
    run.engine.next_phase()
    epochs(run, 1)
    assert [(s.count, s.sample_rate) for s in run.engine.accountant.history.segments] == [(2, 1.0)]
    assert len(X) == len(Y) == 12
