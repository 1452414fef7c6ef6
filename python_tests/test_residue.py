"""Nothing of one batch, draw or session reaches the next: no gradient, no sum, no noise."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from attach import flat, private, small_model
from torch import nn
from torch.utils.data import DataLoader

import dp_bitfit_kernels as dpk


def again(engine, model, optimizer, loader, **options):
    return engine.make_private(
        module=model,
        optimizer=optimizer.original_optimizer,
        data_loader=DataLoader(loader.dataset, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )


def test_a_second_session_of_an_engine_never_repeats_noise():
    options = {"sample_rate": 1e-12, "expected_batch_size": 1.0}
    engine, model, optimizer, loader = private(small_model(), sigma=1.0, **options)
    noises = []
    for session in range(3):
        for step, (x, y) in enumerate(loader):
            before = flat(model)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            noises.append(flat(model) - before)
            if step == 1:
                break
        if session < 2:
            engine.detach()
            model, optimizer, loader = again(engine, model, optimizer, loader, **options)
    for i, a in enumerate(noises):
        for b in noises[:i]:
            assert ((a - b).abs() > 1e-4).float().mean() > 0.9


def test_the_loader_of_a_detached_session_is_refused():
    engine, model, optimizer, old = private(small_model(), sigma=1.0, sample_rate=0.5)
    engine.detach()
    model, optimizer, loader = again(engine, model, optimizer, old, sample_rate=0.01, expected_batch_size=4.0)
    with pytest.raises(dpk.EngineError, match="detached"):
        next(iter(old))
    next(iter(loader))


@pytest.mark.parametrize("sizes", [(4, 4), (4, 6), (6, 4)])
@pytest.mark.parametrize("kept", ["skipped", "stepped"])
def test_the_graph_of_an_earlier_batch_adds_nothing(sizes, kept):
    """As where losses are added up over batches, or a recurrent state is carried over."""
    out = []
    for stale in (False, True):
        torch.manual_seed(2)  # no LayerNorm here: it keeps its bias for backward, which the step changes
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        _, model, optimizer, _ = private(model, bound=100.0)
        torch.manual_seed(2)
        first, second = torch.randn(sizes[0], 6), torch.randn(sizes[1], 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            old = model(first).sum()
            if kept == "stepped":
                old.backward(retain_graph=True)
                optimizer.step()
            else:
                optimizer._session.abandon()
            before = flat(model)
            model(second).sum().backward()
        if stale:
            (1000 * old).backward()
        optimizer.step()
        out.append(flat(model) - before)
    assert torch.equal(*out)


def test_a_release_that_fails_leaves_no_sum_behind(monkeypatch):
    engine, model, optimizer, _ = private(small_model(), bound=0.01)
    x = torch.randn(4, 6)

    def full_disk(*args):
        raise OSError("no space left")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with monkeypatch.context() as patch:
            patch.setattr(engine.accountant, "charge", full_disk)
            model(x).sum().backward()
            before = flat(model)
            with pytest.raises(OSError, match="no space"):
                optimizer.step()
        assert torch.equal(flat(model), before)
        assert all(p.grad is None for p in model.parameters())
        model(x).sum().backward()
        optimizer.step()
    assert (flat(model) - before).norm() <= 0.01 * (1 + 1e-5)


def test_a_clip_function_that_fails_leaves_no_sum_behind():
    fail = []

    def factor(norms):
        return norms[:1] if fail else torch.ones_like(norms)

    _, model, optimizer, _ = private(small_model(), bound=0.01, clipping=dpk.clipping.Custom(factor, 0.01))
    x = torch.randn(4, 6)
    before = flat(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for broken in (True, False):
            fail[:] = [1] if broken else []
            model(x).sum().backward()
            if broken:
                with pytest.raises(dpk.ClippingError):
                    optimizer.step()
            else:
                optimizer.step()
    assert 0 < (flat(model) - before).norm() <= 0.01 * (1 + 1e-5)
