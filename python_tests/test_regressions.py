"""Defects that users' models brought to light: each must stay mended."""

from __future__ import annotations

import random
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attach import SequenceFirst, attach
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dp_bitfit_kernels as dpk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def whole(model, x, y=None, batch=4, head=(), **options):
    """A private model whose draws hold all of x, unless a sample rate is given."""
    dpk.convert_model(model, train_modules=head)
    y = torch.arange(len(x)) % 3 if y is None else y
    return attach(model, x, y, batch=batch, **{"sample_rate": 1.0, **options})


class Inside(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_the_layout_is_proven_under_compile():
    # T = B: no shape tells the one from the other, and the tracer passes the hook of the forward by.
    torch.manual_seed(0)
    engine, model, optimizer, loader = whole(SequenceFirst(), torch.randn(4, 4, 6))
    x, y = next(iter(loader))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()
    with pytest.raises(dpk.BatchLayoutError, match="inner"):
        optimizer.step()
    assert engine.accountant.history.total_steps == 0


def test_a_compiled_model_trains_over_draws_of_all_sizes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 3))
    engine, model, optimizer, loader = whole(model, torch.randn(24, 6), batch=6, sample_rate=0.25)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        assert optimizer.step()
    assert engine.accountant.history.total_steps == len(loader)


def test_calling_only_a_part_of_the_model_is_no_way_around_the_proof():
    torch.manual_seed(0)
    _, model, optimizer, loader = whole(Inside(SequenceFirst()), torch.randn(4, 4, 6))
    x, y = next(iter(loader))
    F.cross_entropy(model.inner(x), y).backward()
    with pytest.raises(dpk.EngineError, match="modules inside"):
        optimizer.step()


def test_parts_of_a_declared_batch_may_be_called_with_a_warning():
    torch.manual_seed(0)
    engine, model, optimizer, loader = whole(Inside(nn.Linear(6, 3)), torch.randn(4, 6))
    x, y = next(iter(loader))
    with engine.batch(4):
        F.cross_entropy(model.inner(x), y).backward()
    with pytest.warns(UserWarning, match="cannot be proven"):
        assert optimizer.step()


class Turned(nn.Module):
    """Works on its samples in another order; nothing of that shows in its output."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.flip(0))).flip(0))


class OwnLoss(nn.Module):
    """Returns only its loss. ``attend`` mixes the samples before the last layer."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)
        self.kind = kind

    def forward(self, x, y):
        h = torch.tanh(self.first(x))
        if self.kind == "attend":
            h = torch.softmax(h @ h.t(), -1) @ h
        logits = self.last(h)
        if self.kind == "ignore_index":
            return {"loss": F.cross_entropy(logits, y, ignore_index=2), "logits": logits}
        if self.kind == "class_weights":
            return F.cross_entropy(logits, y, weight=torch.tensor([1.0, 2.0, 3.0])), logits
        if self.kind == "in_batch":
            return F.cross_entropy(logits @ logits.t(), torch.arange(len(x)))
        return F.cross_entropy(logits, y, reduction=self.kind if self.kind == "sum" else "mean")


@pytest.mark.parametrize(
    "model, says",
    [
        (Turned(), "'first'"),
        (OwnLoss("attend"), "'last'"),
        (OwnLoss("ignore_index"), "mean over tokens"),
        (OwnLoss("class_weights"), "class weights"),
        (OwnLoss("in_batch"), "in-batch negatives"),
    ],
)
def test_rows_that_are_not_samples_are_refused(model, says):
    torch.manual_seed(0)
    engine, model, _, loader = whole(model, torch.randn(6, 6), batch=6)
    x, y = next(iter(loader))
    with pytest.raises(dpk.BatchLayoutError, match=says):
        model(x, y) if isinstance(model, OwnLoss) else model(x)
    assert engine.accountant.history.total_steps == 0


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_a_loss_of_samples_is_none_of_those(kind):
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Dropout(0.5), "loss": OwnLoss(kind)})
    model.forward = lambda x, y: model["loss"](model["body"](x), y)
    _, model, optimizer, loader = whole(model, torch.randn(6, 6), batch=6, loss_reduction=kind)
    x, y = next(iter(loader))
    model(x, y).backward()
    assert optimizer.step()


class Remembers(nn.Module):
    def __init__(self, data):
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.data = data
        self.register_buffer("ema", torch.zeros(3))

    def forward(self, x):
        h = self.inner(x)
        with torch.no_grad():
            self.ema = 0.9 * self.ema + (h.mean(0) if self.data else 1.0)  # a new tensor in its place
        return h


def test_a_buffer_written_from_the_batch_is_refused():
    torch.manual_seed(0)
    _, model, _, loader = whole(Remembers(data=True), torch.randn(4, 6))
    with pytest.raises(dpk.BatchLayoutError, match="ema"):
        model(next(iter(loader))[0])
    assert not model.ema.any()


def test_the_proof_leaves_a_replaced_buffer_alone():
    torch.manual_seed(0)
    _, model, optimizer, loader = whole(Remembers(data=False), torch.randn(4, 6))
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    assert optimizer.step()
    assert torch.equal(model.ema, torch.ones(3))  # of the one forward of the user


def linear(**options):
    torch.manual_seed(0)
    return whole(nn.Sequential(nn.Linear(6, 3)), torch.randn(8, 6), **options)


def step(model, optimizer, loader):
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        if optimizer.step():
            return


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_an_optimizer_that_cannot_step_on_a_release_is_refused_before_a_charge(optimizer):
    with pytest.raises(dpk.OptimizerError, match=optimizer.__name__):
        linear(optimizer=optimizer)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_is_refused_by_name(unscale):
    engine, model, optimizer, loader = linear()
    scaler = torch.amp.GradScaler("cpu")
    x, y = next(iter(loader))
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(dpk.OptimizerError, match="loss_scale"):
        scaler.step(optimizer)
    assert engine.accountant.history.total_steps == 0


def test_step_hooks_run_on_releases_only():
    _, model, optimizer, loader = linear(max_physical_batch_size=4)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    step(model, optimizer, loader)
    assert seen == ["pre", "post"]


def test_no_checkpoint_is_loaded_in_the_middle_of_a_draw(tmp_path):
    engine, model, optimizer, loader = linear(max_physical_batch_size=4)
    engine.save_checkpoint(str(tmp_path / "c"))
    with torch.no_grad():
        model[0].bias.add_(1.0)
    before = model[0].bias.detach().clone()
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    assert not optimizer.step()
    with pytest.raises(dpk.EngineError, match="middle"):
        engine.load_checkpoint(str(tmp_path / "c"))
    assert torch.equal(model[0].bias, before)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    engine, model, optimizer, loader = linear()
    step(model, optimizer, loader)
    engine.save_checkpoint(str(tmp_path / "c"))
    engine, *_ = linear(optimizer=torch.optim.Adam)
    with pytest.raises(dpk.CheckpointError, match="SGD"):
        engine.load_checkpoint(str(tmp_path / "c"))


@pytest.mark.filterwarnings("ignore:the history already holds")
def test_releases_lost_in_a_crash_are_told_of(tmp_path):
    history = str(tmp_path / "history")
    engine = dpk.PrivacyEngine(history=history)
    model = dpk.convert_model(nn.Sequential(nn.Linear(6, 3)))
    options = {"module": model, "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    options |= {"sample_rate": 0.5, "expected_batch_size": 4.0}
    options["data_loader"] = DataLoader(TensorDataset(torch.randn(8, 6), torch.arange(8) % 3), batch_size=4)
    options["optimizer"] = torch.optim.SGD(model[0].parameters(), lr=1.0)
    with pytest.warns(UserWarning, match="frozen"):
        model, optimizer, loader = engine.make_private(**options)
    engine.save_checkpoint(str(tmp_path / "c"))
    step(model, optimizer, loader)  # observed, then lost
    engine.detach()
    engine.accountant.history.close()
    again = dpk.PrivacyEngine(history=history)
    with pytest.warns(UserWarning, match="frozen"):
        again.make_private(**options)
    with pytest.warns(UserWarning, match="1 release"):
        again.load_checkpoint(str(tmp_path / "c"))
    assert again.accountant.history.total_steps == 1


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x):
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_block_never_adds_an_earlier_batch_to_the_open_one(reentrant):
    # Its forward runs again in the backward and would find the rows of the batch that is open by then.
    torch.manual_seed(0)
    engine, model, optimizer, loader = whole(Checkpointed(reentrant), torch.randn(8, 6), max_physical_batch_size=4)
    batches = iter(loader)
    x, y = next(batches)
    loss = F.cross_entropy(model(x), y)
    with pytest.warns(UserWarning, match="without a step"):
        x, y = next(batches)
    with pytest.raises(dpk.EngineError, match="earlier batch"):
        loss.backward()
    assert not engine._session.ledger.dirty
    model.eval()
    loss = F.cross_entropy(model(x), y)
    with torch.no_grad():
        model(torch.randn(3, 6))
    loss.backward()
    assert engine._session.ledger.dirty


@pytest.mark.parametrize("how", ["assign", "new"])
def test_a_parameter_that_was_replaced_is_noticed(how):
    engine, model, optimizer, loader = linear()
    if how == "assign":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    else:
        model[0].bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(dpk.EngineError, match=r"'0\.bias' is another object"):
        step(model, optimizer, loader)
    assert engine.accountant.history.total_steps == 0


class LayerDrop(nn.Module):
    """Draws from all three generators, as stochastic depth does in one model or another."""

    drawn: ClassVar[list[tuple[float, float, float]]] = []  # not of the instance, where the proof puts lists back

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        self.drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
        return self.inner(x)


def test_the_proof_leaves_the_generators_as_they_were():
    _, model, _, loader = whole(LayerDrop(), torch.randn(4, 6))
    x, _ = next(iter(loader))
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the one that models use
    torch.manual_seed(0)
    model(x)
    assert len(model.drawn) > 1  # the proof ran the model, too
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    assert model.drawn[-1] == (random.random(), np.random.rand(), float(torch.rand(())))  # noqa: NPY002
