"""Phases that are refused, changes of phases that are, and that nothing was changed then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import names_of, small_model
from phased import ALL, BIASES, MIX, TWO, epochs, private, same, snapshot, step
from torch import nn, optim

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels.flat_update import FlatUpdate
from dp_bitfit_kernels.ledger import Ledger

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


@pytest.mark.parametrize("epsilon", [1e-9, 0.0, -1.0, float("nan")])
def test_a_budget_that_is_too_small_changes_nothing(epsilon: float) -> None:
    model = dpk.convert_model(small_model(), train_modules=("*",))
    with pytest.raises(dpk.AccountingError, match="target_epsilon"):
        private(TWO, model=model, modules=None, epsilon=epsilon, delta=1e-11)
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
    with pytest.raises((dpk.DPBiTFiTError, MemoryError), match=r"no room|another object|no converted layer"):
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
