"""What a change of phases keeps, what it frees, and what is given back after the last one."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import names_of, small_model
from phased import ALL, BIASES, MIX, TWO, OwnAdam, X, Y, epochs, private, step, values
from torch import nn, optim

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._allocator import peak_bytes
from dp_bitfit_kernels.layers import BiasLayer
from dp_bitfit_kernels.noise import epsilon_slack


@pytest.mark.parametrize("optimizer", [optim.Adam, OwnAdam])
def test_state_of_what_stays_trained_is_kept_and_the_rest_freed(optimizer: Any) -> None:
    run = private(TWO, optimizer=optimizer)
    epochs(run, 2)
    named = dict(run.model.named_parameters())
    before = {name: copy.deepcopy(run.optimizer.state[named[name]]) for name in BIASES}
    weights = {name: value for name, value in values(run.model).items() if name not in BIASES}
    run.engine.next_phase()
    assert {id(p) for p in run.optimizer.state} == {id(named[name]) for name in BIASES}
    for name in BIASES:
        assert float(before[name]["step"]) == 2
        for key, value in before[name].items():
            assert torch.equal(run.optimizer.state[named[name]][key], value)
    epochs(run, 3)
    assert all(float(run.optimizer.state[named[name]]["step"]) == 5 for name in BIASES)
    for name, value in weights.items():
        assert torch.equal(values(run.model)[name], value), name


@pytest.mark.parametrize("norm", ["mixed", "ghost"])
def test_rows_and_sum_of_the_phase_before_are_freed(norm: str) -> None:
    """Even while the user holds its last loss, whose graph ends in leaves of the rows."""
    run = private(TWO, optimizer=optim.Adam, per_sample_norm=norm)
    ledger = run.engine._session.ledger
    loss = F.cross_entropy(run.model(next(iter(run.loader))[0]), Y)
    loss.backward(retain_graph=True)
    run.optimizer.step()
    rows = ledger._storage.untyped_storage()
    assert rows.nbytes() == 4 * len(X) * ledger.row_width
    gone = [weakref.ref(thing) for thing in (ledger, ledger.total, run.engine._session, run.optimizer._flat)]
    del ledger
    run.engine.next_phase()
    gc.collect()
    assert rows.nbytes() == 0 and not any(ref() for ref in gone)
    batches = iter(run.loader)
    x, y = next(batches)
    loss.backward()  # leads to the old leaves, and to nothing
    assert not run.engine._session.ledger.dirty
    assert step(run.model, run.optimizer, x, y)


def wide(phases: list[dpk.Phase] | None) -> Any:
    """Build a run of a wide model and come to its last phase; returns one step of it."""

    def build() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 3))
        run = private(phases, model=model, optimizer=optim.Adam, modules=("*",) if phases else ())
        x, y = X.clone(), Y.clone()  # counted here, wherever else they are
        if phases:
            epochs(run, 2)
            run.engine.next_phase()

        def one() -> None:
            with run.engine.batch(len(x)), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step(run.model, run.optimizer, x, y)

        return one

    return build


def test_a_phase_of_the_biases_takes_the_memory_of_one_that_had_no_other_before() -> None:
    two, one = (peak_bytes(wide(phases), warm_up=2) for phases in (TWO, None))
    weights = 4 * 200 * 200
    assert abs(two.resident - one.resident) < 0.1 * weights
    assert abs(two.peak - one.peak) < 0.1 * weights


def test_detach_gives_everything_back() -> None:
    model = dpk.convert_model(small_model(), train_modules=("*",))
    layers = [m for m in model.modules() if isinstance(m, BiasLayer)]
    before = [(m.trained, m.attachment) for m in layers]
    run = private(TWO, model=model, modules=None)
    run.engine.next_phase()
    assert names_of(model) == list(BIASES)
    with pytest.raises(dpk.EngineError, match="already has a PrivacyEngine"):
        private(TWO, model=model, modules=None)
    run.engine.detach()
    assert names_of(model) == list(ALL) and run.engine.phase is None
    assert [(m.trained, m.attachment) for m in layers] == before
    assert not any(m.in_phases for m in layers)
    F.cross_entropy(model(X), Y).backward()
    assert all(p.grad is not None for p in model.parameters())
    plain = dpk.restore_model(model)
    assert all(p.requires_grad for p in plain.parameters())


def test_a_second_course_of_one_engine() -> None:
    run = private(TWO, sigma=1.0)
    epochs(run, 1)
    run.engine.next_phase()
    epochs(run, 1)
    run.engine.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = private(TWO, sigma=1.0, model=run.model, modules=None, engine=run.engine)
    assert again.engine.phase == 0 and names_of(run.model) == list(ALL)
    epochs(again, 1)
    again.engine.next_phase()
    epochs(again, 1)
    assert again.engine.accountant.history.total_steps == 4 == again.engine._session.noise_steps


def test_the_statement_lists_the_phases() -> None:
    phases = [dpk.Phase(MIX, epochs=2, lr=0.5), dpk.Phase("biases", epochs=3, max_grad_norm=0.5)]
    run = private(phases, sigma=1.0)
    epochs(run, 2)
    first = run.engine.privacy_statement(1e-3)
    run.engine.next_phase()
    epochs(run, 1)
    statement = json.loads(json.dumps(run.engine.privacy_statement(1e-3)))
    shared = {"train": ["biases", "5.*"], "epochs": 2, "lr": 0.5, "max_grad_norm": 1.0, "elements": 35}
    assert statement["phases"] == [
        {**shared, "releases": 2},
        {"train": ["biases"], "epochs": 3, "lr": None, "max_grad_norm": 0.5, "elements": 23, "releases": 1},
    ]
    assert [p["releases"] for p in first["phases"]] == [2, 0]
    # The bound on what float64 noise adds goes by the widest release that there was.
    assert statement["numerical_slack"]["epsilon"] == epsilon_slack(1.0, 35, 3)
    assert "phases" not in private(None, sigma=1.0).engine.privacy_statement(1e-3)


def test_the_numerical_bound_goes_by_the_widest_release_of_the_engine() -> None:
    run = private(None, sigma=1.0)
    epochs(run, 1)
    widest = run.engine._session.ledger.width
    run.engine.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = private([TWO[1]], sigma=1.0, model=run.model, modules=None, engine=run.engine)
    epochs(again, 1)
    assert again.engine._session.ledger.width < widest
    assert again.engine.privacy_statement(1e-3)["numerical_slack"]["epsilon"] == epsilon_slack(1.0, widest, 2)


def test_a_captured_step_begins_anew(graphs: Any) -> None:
    """The same numbers as eager steps, and graphs of its own in each phase."""
    outcomes = []
    for captured in (False, True):
        run = private(
            [dpk.Phase("full", epochs=4, lr=0.01), dpk.Phase("biases", epochs=5, lr=0.05)],
            sigma=1.0,
            rate=0.25,
            optimizer=optim.AdamW,
            engine=dpk.PrivacyEngine(unsafe_deterministic_seed=3),
            max_physical_batch_size=4,
            pad_physical_batches=True,
        )
        one = dpk.capture_step(run.optimizer, lambda x, y, m=run.model: F.cross_entropy(m(x), y)) if captured else None
        for phase in range(2):
            if phase:
                ledger = weakref.ref(run.engine._session.ledger)
                run.engine.next_phase()
                gc.collect()
                assert ledger() is None  # though the captured step is still there
                assert one is None or not one.captured
            for x, y in itertools.chain.from_iterable(run.loader for _ in range(4 + phase)):
                if one is None:
                    step(run.model, run.optimizer, x, y)
                else:
                    one(x, y)
            assert one is None or one.captured
        outcomes.append((values(run.model), run.engine._session.noise_steps))
    assert graphs.captures == 4 and outcomes[0][1] == outcomes[1][1] == 36
    for name in ALL:
        assert torch.equal(outcomes[0][0][name], outcomes[1][0][name]), name


def test_a_compiled_model_goes_on_in_the_next_phase() -> None:
    outcomes = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        run = private(TWO, model=model, sigma=1.0, engine=dpk.PrivacyEngine(unsafe_deterministic_seed=3))
        epochs(run, 1)  # what is proven of the layout
        if compiled:
            run.model = torch.compile(model, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
        epochs(run, 1)
        run.engine.next_phase()
        epochs(run, 3)
        outcomes.append(values(model))
    for name, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], value, rtol=1e-5, atol=1e-6)
