"""What one record can do to a release, through the engine: leave one out, and count in integers.

Which of the known ways to lose the guarantee is tested where: FAILURE_WAYS.md beside this file.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from attach import private
from probe import (
    COMPOSITE,
    DTYPES,
    GRID,
    KINDS,
    SCALES,
    Keep,
    Probe,
    build,
    integer_norm,
    leave_one_out,
    loss_of,
    without,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels.sampling import Ticket


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_record_moves_the_sum_by_at_most_the_bound(kind, dtype):
    for t in (1, 2, 12):
        probe, x, positions = build(kind, t, dtype)
        for scale in SCALES:
            for opposed in (False, True):
                got = leave_one_out(probe, x, loss_of(x, positions, scale, opposed), row=2)
                lost = dtype == "autocast_fp16" and scale in (1e-8, 1e8)  # under- or overflows on its way
                cancels = opposed and t > 1
                if kind not in COMPOSITE and dtype == "float32":
                    rows = probe.ledger._slab.rows
                    signs = 1.0 if not opposed or t > 1 else (-1.0) ** torch.arange(len(x)).unsqueeze(1)
                    want = torch.full_like(rows, 0.0 if cancels else scale * t if positions else scale) * signs
                    torch.testing.assert_close(rows, want, rtol=1e-6, atol=0)
                if scale >= 1e3 and not lost and not cancels:
                    assert integer_norm(got) >= GRID * (1 - 1e-4)  # clipped to the bound, not below it
        if t == 1 and positions is None:
            break


@pytest.mark.parametrize("bound", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("method", ["flat", "automatic", "per_layer", "custom", "unequal"])
@pytest.mark.parametrize("kind", ["twice", "whole_head"])
def test_bound_holds_for_every_clipping_method(kind, method, bound):
    clipping = {
        "custom": dpk.clipping.Custom(lambda norms: torch.full_like(norms, 5.0), bound),
        "unequal": dpk.clipping.PerLayer(bound, [bound * 0.6, bound * 0.8]),
    }.get(method, method)
    for reduction in ("mean", "sum"):
        probe, x, positions = build(kind, 2, bound=bound, clipping=clipping, loss_reduction=reduction, sigma=0.7)
        for scale in SCALES:
            mean = reduction == "mean"
            leave_one_out(probe, x, loss_of(x, positions, scale, mean=mean), 1, scale=len(x) if mean else 1.0)
            # The noise is in the units of the same bound, and it is what was charged.
            call, unit = probe.calls[-1], probe.session.expected_batch_size
            assert call.noise_std * call.scale * unit == pytest.approx(0.7 * bound, rel=1e-12)
            assert call.noise_std == probe.engine.accountant.history.segments[-1].noise_multiplier * GRID


def test_equal_keys_release_the_record_and_nothing_else():
    for method in ("flat", "automatic", "per_layer"):
        releases = []
        for mask in (None, without(4, 1)):
            probe, x, positions = build("whole_head", 2, bound=0.3, clipping=method, sigma=1.0, seed=9)
            probe.step(x, loss_of(x, positions, 1e4), mask)
            releases.append(probe.inner.releases[-1].double() * probe.session.expected_batch_size)
        difference = (releases[0] - releases[1]).norm()
        assert 0.3 * (1 - 1e-3) <= difference <= 0.3 * (1 + 1e-6)


class Direct(nn.Module):
    """A layer whose rows are exactly what the loss says, whatever the batch: one input, output times ``w``."""

    def __init__(self, width=7):
        super().__init__()
        self.layer = nn.Linear(1, width)

    def forward(self, x):  # [B, 1] -> [B, p]
        return self.layer(x)


def direct(width=7, **options):
    torch.manual_seed(0)
    options.setdefault("loss_reduction", "sum")
    return Probe(Direct(width), **options)


def weighted(w):
    return lambda out: (w * out).sum()


def test_true_removal_equals_masking():
    probe, w = direct(), torch.randn(9, 7) * 3
    x = torch.randn(9, 1)
    whole = probe.step(x, weighted(w))
    for i in (0, 4, 8):
        keep = without(9, i)
        removed = probe.step(x[keep], weighted(w[keep]))
        assert torch.equal(removed, probe.step(x, weighted(w), keep))
        assert int(((whole - removed) ** 2).sum()) <= GRID**2


def test_norms_at_the_edges():
    for bound in (0.1, 1.0, 10.0):
        for method, gamma in (("flat", None), ("automatic", 0.01)):
            probe = direct(1, bound=bound, clipping=method)
            edge = torch.tensor(bound)
            up, down = torch.nextafter(edge, torch.tensor(99.0)), torch.nextafter(edge, torch.tensor(0.0))
            values = torch.stack([torch.tensor(0.0), torch.tensor(1e-45), torch.tensor(1e-30), down, edge, up])
            for value in values:
                w = torch.stack([value, torch.tensor(1.0)]).unsqueeze(1)
                got = leave_one_out(probe, torch.ones(2, 1), weighted(w), 0)
                norm = float(value)
                share = norm / (norm + gamma) if gamma else min(1.0, norm / bound)
                assert float(got[0]) == pytest.approx(share * GRID, abs=1 + GRID * 2**-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_hundred_aligned_gradients_add_up_exactly(dtype):
    torch.manual_seed(0)
    probe = Probe(nn.Linear(1, 8).to(dtype), loss_reduction="mean", expected=512.0)
    x = torch.ones(512, 1, dtype=dtype)
    loss = lambda out: (3e4 * out.float()).sum() / len(out)  # noqa: E731
    whole = probe.step(x, loss)
    one = whole // 512
    assert torch.equal(one * 512, whole) and GRID * (1 - 1e-4) <= integer_norm(one) <= GRID
    assert torch.equal(whole - probe.step(x, loss, without(512, 77)), one)
    assert torch.equal(probe.split(list(x.split(64)), [loss] * 8), whole)
    assert probe.inner.releases[-1].double().norm() <= 1.0 + 1e-6


@pytest.mark.parametrize("method", ["flat", "automatic", "per_layer"])
def test_any_split_and_order_gives_the_same_bits(method):
    torch.manual_seed(1)
    probe, w, x = direct(clipping=method, bound=0.5, sigma=1.3, seed=4), torch.randn(24, 7) * 2, torch.randn(24, 1)
    whole = probe.step(x, weighted(w))
    for sizes in ([8, 8, 8], [1] * 24, [23, 1], [5, 19], [24]):
        order = torch.randperm(24)
        xs, ws = x[order].split(sizes), w[order].split(sizes)
        assert torch.equal(probe.split(list(xs), [weighted(v) for v in ws]), whole)
    assert [c.noise_std for c in probe.calls] == [1.3 * GRID] * 6  # noise once a draw, however it was split
    assert [c.step for c in probe.calls] == [1, 2, 3, 4, 5, 6]


def test_the_release_does_not_depend_on_accumulation():
    """The loader's own micro-batches, with noise: the same bits for 1, 2, 3 and 8 physical batches."""
    out = []
    for limit in (None, 4, 3, 1):
        torch.manual_seed(0)
        model = Direct()
        engine = dpk.PrivacyEngine(unsafe_deterministic_seed=5)
        options = {"sample_rate": 1.0, "max_physical_batch_size": limit, "loss_reduction": "sum", "sigma": 0.8}
        _, model, optimizer, loader = private(model, n=8, dims=(1,), engine=engine, **options)
        for x, _ in loader:
            (torch.cos(torch.arange(7.0) * x) * model(x)).sum().backward()
            optimizer.step()
        assert optimizer._session.releases == 1
        out.append(model.layer.bias.detach().clone())
    assert all(torch.equal(out[0], other) for other in out[1:])


def test_a_record_without_gradient_changes_no_bit():
    torch.manual_seed(6)
    w, x = torch.randn(8, 7) * torch.linspace(0.02, 2, 8).unsqueeze(1), torch.randn(8, 1)  # some below the bound
    w[7] = 0
    for reduction, scale in (("sum", 1.0), ("mean", 1 / 8)):
        releases = []
        for present in (True, False):
            probe = direct(bound=0.5, sigma=1.0, seed=2, loss_reduction=reduction)
            if present:
                probe.step(x, weighted(w * scale))
            elif reduction == "sum":
                probe.step(x[:7], weighted(w[:7]))
            else:  # under a mean the physical size must stay: padded with a masked repeat
                pad = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
                probe.step(x[pad], weighted(w[pad] * scale), without(8, 7))
            releases.append(probe.inner.releases[-1])
        assert torch.equal(*releases)


def test_one_record_more_changes_neither_rate_nor_denominator():
    seen = []
    for n in (1000, 1001):
        engine, model, optimizer, loader = private(
            Direct(), n=n, batch=10, dims=(1,), sample_rate=0.01, expected_batch_size=9.5, sigma=1.0
        )
        seen.append((engine._session.sample_rate, optimizer.expected_batch_size, len(loader)))
        assert engine.privacy_statement()["public_dataset_size"] is None
    assert seen[0] == seen[1] == (0.01, 9.5, 100)
    engine, *_ = private(Direct(), n=1001, batch=10, dims=(1,), sigma=1.0)
    assert engine.privacy_statement()["public_dataset_size"] == 1001  # read, therefore declared


@pytest.mark.parametrize("kind", KINDS)
def test_only_trained_parameters_move_and_all_of_them(kind):
    probe, x, positions = build(kind, 2, sigma=1.0, seed=3, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    model = probe.model.train()
    before = {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}
    for _ in range(2):
        probe.step(x, loss_of(x, positions, 1.0), torch.zeros(len(x), dtype=torch.bool))  # every gradient is zero
        assert all(p.grad is None for p in model.parameters())
    assert all((c.total == 0).all() for c in probe.calls)
    for name, value in model.named_parameters():
        if name in probe.names:
            assert (value != before[name]).all(), name
        else:
            assert torch.equal(value, before[name]), name
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name
    held = {id(p) for p in probe.inner.state}
    assert held == {id(e.parameter) for e in probe.ledger.entries}  # no moments of anything else


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_see_the_other_samples(kind):
    probe, x, positions = build(kind, 12)
    loss = lambda out: (out * (1 + out.detach().abs())).sum()  # noqa: E731 - each sample's own
    probe.model.train()
    probe.step(x, loss)
    rows = probe.ledger._slab.rows.clone()
    changed = x.clone()
    changed[1] = torch.randn_like(x[1]) * 5
    probe.step(changed, loss)
    others = without(4, 1)
    assert torch.equal(probe.ledger._slab.rows[others], rows[others])
    if kind in COMPOSITE:
        assert not torch.equal(probe.ledger._slab.rows[1], rows[1])


def test_no_gradient_is_readable_before_the_release_and_no_sum_after_it():
    probe, x, positions = build("twice", 2, bound=1e6)
    totals = []
    for _ in range(3):  # zero_grad is never called: nothing of an earlier step may come back
        probe._draw += 1
        probe.session.on_ticket(Ticket(probe._draw, 0, 1, 4, None))
        loss_of(x, positions, 1.0)(probe.model(x)).backward()
        assert all(p.grad is None for p in probe.model.parameters())
        assert probe.optimizer.step()
        assert all(p.grad is None for p in probe.model.parameters()) and not probe.ledger.total.any()
        totals.append(probe.calls[-1].total)
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])
    with pytest.raises(dpk.OptimizerError, match="without a backward"):
        probe.optimizer.step()
    scale = probe.calls[-1].scale
    assert torch.equal(probe.inner.releases[-1], (totals[-1].double() * scale).float())  # the optimizer sees this alone


def half_precision_step(poison, mask, loss_scale=2.0**16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    probe = Probe(model, bound=0.05, loss_reduction="sum", loss_scale=loss_scale, sigma=1.0, seed=8)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 1])
    if poison:
        x[2] *= 1e5
    probe._draw += 1
    probe.session.on_ticket(Ticket(probe._draw, 0, 1, 4, mask))
    with torch.autocast("cpu", torch.float16):
        out = probe.model(x)
    (F.cross_entropy(out.float(), y, reduction="sum") * loss_scale).backward()
    finite = probe.ledger._slab.rows.isfinite().all(1)
    assert probe.optimizer.step() is True
    return probe, finite


def test_an_overflowing_record_neither_skips_a_step_nor_moves_the_scale():
    bad, finite = half_precision_step(True, None)
    assert finite.tolist() == [True, True, False, True]  # it did overflow
    masked, _ = half_precision_step(True, without(4, 2))
    assert torch.equal(bad.inner.releases[-1], masked.inner.releases[-1])
    for probe in (bad, masked):
        assert (probe.session.releases, probe.engine.accountant.history.total_steps) == (1, 1)
        assert probe.session.loss_scale == 2.0**16


def test_a_grad_scaler_cannot_take_hold():
    probe, x, positions = build("linear_3d", 2)
    scaler = torch.amp.GradScaler("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaler.scale(loss_of(x, positions, 1.0)(probe.model(x))).backward()
        with pytest.raises(dpk.OptimizerError, match="loss_scale"):
            scaler.step(probe.optimizer)
    assert probe.session.releases == 0 and not probe.inner.releases


class Trace(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else type(a).__name__ for a in args]
        self.calls.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


def test_operations_shapes_and_charges_do_not_depend_on_the_data():
    traces = []
    for change in ("none", "masked", "nan", "huge", "zero"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
        dpk.convert_model(model, train_modules=("4",))
        engine, optimizer = dpk.PrivacyEngine(), Keep([p for p in model.parameters() if p.requires_grad])
        model, optimizer, _ = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(torch.zeros(8)), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=0.1,
        )
        x, y = torch.randn(4, 2, 5, 5), torch.tensor([0, 1, 2, 0])
        x[1] = {"nan": torch.full_like(x[1], math.nan), "huge": x[1] * 1e30, "zero": x[1] * 0}.get(change, x[1])
        mask = without(4, 1) if change == "masked" else torch.ones(4, dtype=torch.bool)
        for step in range(3):  # the first two also prove the layout
            trace = Trace()
            engine._session.on_ticket(Ticket(step, 0, 1, 4, mask))
            with trace:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        history = [(s.count, s.noise_multiplier, s.sample_rate) for s in engine.accountant.history.segments]
        traces.append((trace.calls, history, engine._session.releases))
    assert all(trace == traces[0] for trace in traces[1:])
    names = [name for name, _ in traces[0][0]]
    assert not [n for n in names if "_local_scalar_dense" in n or "nonzero" in n or "item" in n]  # reads no value
    assert any("noisy_sum" in n or "bitwise_xor" in n for n in names)


def test_the_sampler_has_a_stream_of_its_own():
    probe, x, positions = build("linear_3d", 2, sigma=1.0)
    for _ in range(4):
        probe.step(x, loss_of(x, positions, 1.0))
    words = probe.ledger.backend.random_words
    drawn = torch.stack([probe.engine._sampler_words(draw, 0, 4096) for draw in range(8)])
    used = [words(c.key, torch.tensor([c.step]), c.stream, 0, 4096) for c in probe.calls]
    used += [words(probe.calls[0].key, torch.tensor([s]), probe.calls[0].stream, 0, 4096) for s in range(8)]
    assert not torch.isin(torch.cat(used), drawn).any()
    for masks in drawn < 0:
        for noise in used:
            agree = (masks == (noise < 0)).float().mean()
            assert abs(float(agree) - 0.5) * 2 * math.sqrt(4096) < 5.5


def test_nothing_public_reports_on_private_gradients():
    probe, _, _ = build("linear_3d", 2)
    for thing, allowed in ((probe.engine, set()), (probe.optimizer, {"max_grad_norm", "zero_grad"})):
        names = {n for n in dir(thing) if not n.startswith("_")} - set(dir(torch.optim.Optimizer))
        words = ("norm", "grad", "row", "loss", "clip", "total", "sum")
        assert {n for n in names if any(w in n for w in words)} <= allowed
