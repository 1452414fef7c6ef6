"""The engine as a user sees it: one step equals the oracle, and misuse is refused."""

from __future__ import annotations

import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from attach import flat, names_of, private, small_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dp_bitfit_kernels as dpk


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_step_equals_oracle(clipping, reduction):
    model = small_model()
    _, model, optimizer, loader = private(
        model, bound=0.05, clipping=clipping, loss_reduction=reduction, sample_rate=1.0, head=("5",)
    )
    loss = lambda out, y: F.cross_entropy(out, y, reduction=reduction)  # noqa: E731
    ((x, y),) = list(loader)
    names = names_of(model)
    one = [
        oracle.rows(model, names, x[i : i + 1], lambda o, i=i: F.cross_entropy(o, y[i : i + 1])) for i in range(len(x))
    ]
    rows = torch.cat(one)
    before = flat(model)
    loss(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.step() is True
    got = (before - flat(model)) * 4
    if clipping == "flat":
        want = oracle.clipped_sum(rows, 0.05)
    elif clipping == "automatic":
        want = oracle.clipped_sum(rows, 0.05, 0.01)
    else:
        layers = [n.rpartition(".")[0] for n in names]
        sizes = [dict(model.named_parameters())[n].numel() for n in names]
        parts, start, bounds = {}, 0, 0.05 / len(set(layers)) ** 0.5
        for layer, size in zip(layers, sizes, strict=True):
            parts.setdefault(layer, []).append(rows[:, start : start + size])
            start += size
        want = torch.cat([oracle.clipped_sum(torch.cat(v, 1), bounds) for v in parts.values()])
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6 * 12)


def test_parts_of_a_draw_give_the_bits_of_the_whole():
    releases = []
    for physical in (None, 1, 5, 12):
        model = small_model()
        _, model, optimizer, loader = private(model, bound=0.05, sample_rate=1.0, max_physical_batch_size=physical)
        before, steps = flat(model), []
        for x, y in loader:
            optimizer.zero_grad()
            # Rows are made one by one: a matmul picked by batch size may change a row's last bits.
            total = sum(F.cross_entropy(model(x), y) for _ in range(1))
            total.backward()
            steps.append(optimizer.step())
        assert steps == [False] * (len(steps) - 1) + [True]
        releases.append(before - flat(model))
    for other in releases[1:]:
        torch.testing.assert_close(other, releases[0], rtol=0, atol=2e-7)


def test_step_without_backward():
    _, model, optimizer, _ = private(small_model())
    with pytest.raises(dpk.OptimizerError, match="without a backward"):
        optimizer.step()


def test_closure_refused():
    _, model, optimizer, loader = private(small_model(), sample_rate=1.0)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(dpk.OptimizerError, match="closure"):
        optimizer.step(lambda: None)


def test_second_forward_without_ticket_refused():
    _, model, optimizer, _ = private(small_model())
    x = torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x).sum().backward()
        with pytest.raises(dpk.EngineError, match="second training forward"):
            model(x)


def test_ticketless_step_is_charged_at_rate_one():
    engine, model, optimizer, _ = private(small_model(), sigma=1.0)
    with pytest.warns(UserWarning, match="sample rate 1"):
        model(torch.randn(4, 6)).sum().backward()
    assert optimizer.step()
    assert [(s.sample_rate, s.count) for s in engine.accountant.history.segments] == [(1.0, 1)]


def test_create_graph_refused():
    _, model, optimizer, loader = private(small_model(), sample_rate=1.0)
    x, y = next(iter(loader))
    with pytest.raises(dpk.EngineError, match="create_graph"):
        F.cross_entropy(model(x), y).backward(create_graph=True)


def test_two_engines_refused():
    _, model, optimizer, _ = private(small_model())
    with pytest.raises(dpk.EngineError, match="already"):
        dpk.PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer.original_optimizer,
            data_loader=DataLoader(TensorDataset(torch.randn(4, 6)), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.randn(4, 6))
        self.positions = nn.Linear(6, 3)

    def forward(self, x):  # [B, 6]
        return x[:, :3] + self.positions(self.grid).mean(0)


class Shuffled(nn.Module):
    """Tokens of all samples sorted by what they hold: no shape tells."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):  # [B, T, 6]
        flat = x.reshape(-1, 6)
        order = flat[:, 0].argsort()
        out = torch.empty(len(flat), 3)
        out[order] = self.inner(flat[order])
        return out.view(x.shape[0], -1, 3).mean(1)


@pytest.mark.parametrize(
    "model, dims, name",
    [(Table(), (6,), "positions"), (Shuffled(), (1, 6), "inner"), (Shuffled(), (3, 6), "inner")],
)
def test_wrong_layout_refused_by_name(model, dims, name):
    _, model, optimizer, loader = private(model, n=4, batch=4, dims=dims, sample_rate=1.0)
    x, y = next(iter(loader))
    with pytest.raises(dpk.BatchLayoutError, match=name):
        F.cross_entropy(model(x), y).backward()


class Pooled(nn.Module):
    """Right for [T, B, 6] only: pools over its first dimension."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        return self.inner(x).mean(0)


class Attending(nn.Module):
    """Right for [T, B, 6] only: attends over its first dimension."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        h = self.inner(x).transpose(0, 1)
        return torch.softmax(h @ h.transpose(1, 2), -1) @ h


class Contrastive(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        h = self.inner(x)
        return torch.log_softmax(h @ h.t(), 0)[:, :3]


@pytest.mark.parametrize("model", [Pooled(), Attending(), Contrastive()])
def test_samples_must_stay_apart(model):
    # T = B, so that no shape tells a sequence-first input from a batch-first one.
    first = not isinstance(model, Contrastive)
    _, model, _, loader = private(model, n=4, batch=4, dims=(4, 6) if first else (6,), sample_rate=1.0)
    x, _ = next(iter(loader))
    with pytest.raises(dpk.BatchLayoutError, match=r"sequence-first"):
        model(x.transpose(0, 1) if first else x)


def test_dropout_is_no_mixing():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    _, model, optimizer, loader = private(model, sample_rate=1.0)
    x, y = next(iter(loader))
    state = torch.get_rng_state()
    F.cross_entropy(model.train()(x), y).backward()
    torch.set_rng_state(state)
    assert optimizer.step()


def test_the_proof_leaves_the_generator_alone():
    out = []
    for attach in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5))
        x = torch.randn(4, 6)
        if attach:
            private(model, n=4)
            torch.manual_seed(4)
            with pytest.warns(UserWarning, match="sample rate 1"):
                out.append(model(x).detach())
        else:
            torch.manual_seed(4)
            out.append(model(x).detach())
    assert torch.equal(*out)
