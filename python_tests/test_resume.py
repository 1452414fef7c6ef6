"""Draws, charges and resume, through the engine."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attach import flat, private, small_model

import dp_bitfit_kernels as dpk


def run(model, optimizer, loader, limit=None):
    """Train over the loader; returns the number of physical batches and of releases."""
    batches = releases = 0
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        batches += 1
        releases += optimizer.step()
        if limit is not None and releases == limit:
            break
    return batches, releases


@pytest.mark.parametrize(
    "options", [{}, {"max_physical_batch_size": 2}, {"max_physical_batch_size": 3, "pad_physical_batches": True}]
)
def test_empty_draws_are_released_and_charged(options):
    engine, model, optimizer, loader = private(
        small_model(), sigma=1.0, sample_rate=1e-12, expected_batch_size=4.0, **options
    )
    loader.steps_per_epoch = 6
    before = flat(model)
    batches, releases = run(model, optimizer, loader)
    assert (batches, releases) == (6, 6)
    assert engine.accountant.history.total_steps == 6
    assert (flat(model) != before).all()  # every coordinate got noise


def test_empty_draw_without_noise_changes_nothing():
    _, model, optimizer, loader = private(small_model(), sigma=0.0, sample_rate=1e-12, expected_batch_size=4.0)
    loader.steps_per_epoch = 2
    before = flat(model)
    assert run(model, optimizer, loader) == (2, 2)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("physical", [None, 2, 5])
def test_charged_steps_equal_noise_draws_and_releases(physical):
    engine, model, optimizer, loader = private(
        small_model(), sigma=1.0, n=40, batch=8, max_physical_batch_size=physical
    )
    for _ in range(2):
        run(model, optimizer, loader)
    assert len(loader) == 5
    assert engine.accountant.history.total_steps == 10 == engine._session.noise_steps == engine._session.releases
    assert [(s.count, s.sample_rate) for s in engine.accountant.history.segments] == [(10, 8 / 40)]


def test_padded_batches_give_the_release_of_unpadded_ones():
    out = []
    for options in ({}, {"max_physical_batch_size": 7, "pad_physical_batches": True}):
        model = small_model()
        _, model, optimizer, loader = private(model, sample_rate=1.0, bound=0.05, **options)
        run(model, optimizer, loader)
        out.append(flat(model))
    torch.testing.assert_close(*out, rtol=0, atol=1e-7)


def test_a_released_sum_is_gone():
    engine, model, optimizer, loader = private(small_model(), sigma=0.0, sample_rate=1.0, bound=0.05)
    first = flat(model)
    run(model, optimizer, loader)
    assert not torch.equal(flat(model), first)
    assert not engine._session.ledger.total.any()


def test_noise_schedule_is_charged_as_used():
    engine, model, optimizer, loader = private(small_model(), sigma=2.0, n=24, batch=8)
    for step, (x, y) in enumerate(loader):
        optimizer.noise_multiplier = 2.0 + step
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert [s.noise_multiplier for s in engine.accountant.history.segments] == [2.0, 3.0, 4.0]
    optimizer.noise_multiplier = 0.0
    run(model, optimizer, loader, limit=1)
    assert engine.get_epsilon(1e-3) == math.inf


def test_more_releases_than_calibrated_warns():
    model = dpk.convert_model(small_model())
    engine = dpk.PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.Adam([p for p in model.parameters() if p.requires_grad]),
        data_loader=torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.randn(30, 6), torch.randint(0, 3, (30,))), batch_size=10
        ),
        target_epsilon=2.0,
        target_delta=1e-3,
        epochs=2,
        max_grad_norm=1.0,
    )
    for _ in range(2):
        run(model, optimizer, loader)
    assert 1.9 < engine.get_epsilon(1e-3) <= 2.0
    with pytest.warns(UserWarning, match="exceeds"):
        run(model, optimizer, loader, limit=1)
    assert engine.get_epsilon(1e-3) > 2.0


def test_resume_continues_counters_history_and_epoch(tmp_path):
    path, record = str(tmp_path / "c.pt"), str(tmp_path / "history.jsonl")
    engine, model, optimizer, loader = private(
        small_model(), sigma=1.0, n=40, batch=8, engine=dpk.PrivacyEngine(history=record), max_physical_batch_size=4
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    run(model, optimizer, loader)
    run(model, optimizer, loader, limit=2)
    schedule.step()
    engine.save_checkpoint(path, schedule=schedule, note="hello")
    saved = flat(model).clone()
    run(model, optimizer, loader, limit=1)  # observed, then lost in the crash
    spent = engine.get_epsilon(1e-3)
    engine.accountant.history.close()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, model2, optimizer2, loader2 = private(
            small_model(5),
            sigma=1.0,
            n=40,
            batch=8,
            engine=dpk.PrivacyEngine(history=record),
            max_physical_batch_size=4,
        )
    schedule2 = torch.optim.lr_scheduler.ExponentialLR(optimizer2, 0.9)
    state = again.load_checkpoint(path, schedule=schedule2)
    assert state == {"note": "hello", "releases": 7, "epoch": 1}
    assert torch.equal(flat(model2), saved)
    assert again.get_epsilon(1e-3) == spent  # the lost release stays charged, none is charged twice
    assert optimizer2.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert run(model2, optimizer2, loader2)[1] == 3  # what is left of the epoch
    assert run(model2, optimizer2, loader2)[1] == 5
    assert again.accountant.history.total_steps == 16


def test_resume_never_repeats_noise(tmp_path):
    path = str(tmp_path / "c.pt")
    noises = []
    for attempt in range(2):
        engine, model, optimizer, loader = private(small_model(), sigma=1.0, sample_rate=1e-12, expected_batch_size=1.0)
        if attempt == 0:
            engine.save_checkpoint(path)
        else:
            engine.load_checkpoint(path)
        before = flat(model)
        torch.manual_seed(7)
        run(model, optimizer, loader, limit=1)
        noises.append(flat(model) - before)
    assert (noises[0] != noises[1]).all()
    key = engine._keys.key_tensor("cpu").numpy().tobytes()
    engine.save_checkpoint(path)
    assert key not in Path(path).read_bytes()


def test_older_checkpoint_never_shortens_the_history(tmp_path):
    path = str(tmp_path / "c.pt")
    engine, model, optimizer, loader = private(small_model(), sigma=1.0, n=40, batch=8)
    engine.save_checkpoint(path)
    run(model, optimizer, loader)
    spent = engine.get_epsilon(1e-3)
    engine.load_checkpoint(path)
    assert engine.get_epsilon(1e-3) == spent
    assert engine._session.noise_steps == 5


def test_foreign_and_damaged_checkpoints_change_nothing(tmp_path):
    path = tmp_path / "c.pt"
    engine, model, _, _ = private(small_model(), sigma=1.0)
    engine.save_checkpoint(str(path))
    other, model2, _, _ = private(torch.nn.Sequential(torch.nn.Linear(6, 3)), sigma=1.0)
    before = flat(model2)
    with pytest.raises(dpk.CheckpointError, match="other parameters"):
        other.load_checkpoint(str(path))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(dpk.CheckpointError):
        engine.load_checkpoint(str(path))
    assert torch.equal(flat(model2), before)


def test_no_checkpoint_in_the_middle_of_a_draw(tmp_path):
    engine, model, optimizer, loader = private(small_model(), sample_rate=1.0, max_physical_batch_size=4)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.raises(dpk.EngineError, match="middle of a draw"):
        engine.save_checkpoint(str(tmp_path / "c.pt"))


def test_history_is_on_disk_before_the_noise(tmp_path, monkeypatch):
    record = tmp_path / "history.jsonl"
    engine, model, optimizer, loader = private(
        small_model(), sigma=1.0, sample_rate=1.0, engine=dpk.PrivacyEngine(history=str(record))
    )
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()

    def fail(*args):
        raise RuntimeError("no noise today")

    object.__setattr__(engine._session.ledger.backend, "noisy_sum_", fail)
    try:
        with pytest.raises(RuntimeError, match="no noise"):
            optimizer.step()
    finally:
        from dp_bitfit_kernels import backends

        backends._backend.cache_clear()
        backends.serving.cache_clear()
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert sum(line.get("count", 0) for line in lines) == 1


def test_several_backward_calls_on_one_batch_are_one_row():
    out = []
    for calls in (1, 3):
        model = small_model()
        _, model, optimizer, loader = private(model, sample_rate=1.0, bound=0.05)
        x, y = next(iter(loader))
        for _ in range(calls):
            (F.cross_entropy(model(x), y) / calls).backward()
        optimizer.step()
        out.append(flat(model))
    torch.testing.assert_close(*out, rtol=0, atol=1e-6)


def test_zero_grad_drops_what_was_not_stepped():
    model = small_model()
    _, model, optimizer, loader = private(model, sample_rate=1.0)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    with pytest.raises(dpk.OptimizerError, match="without a backward"):
        optimizer.step()
