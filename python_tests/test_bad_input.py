"""What bad input gets: a test for each row of the README's table that is not tested beside its module."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from attach import flat, private, small_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dp_bitfit_kernels as dpk

POISONS = {
    "nan": lambda x: x.fill_(math.nan),
    "inf": lambda x: x.fill_(math.inf),
    "overflow": lambda x: x.fill_(3e38),
    "one_element": lambda x: x.view(-1)[0:1].fill_(math.nan),
}


def one_step(poison=None, row=3, mask_row=False, reduction="mean", head=()):
    """Parameters after one noiseless step in which row 3 is poisoned, or masked by the ticket."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    engine, model, optimizer, loader = private(model, sample_rate=1.0, bound=0.05, head=head, loss_reduction=reduction)
    x, y = next(iter(loader))
    x = x.clone()
    if poison is not None:
        POISONS[poison](x[row])
    if mask_row:
        session = engine._session
        mask = torch.ones(len(x), dtype=torch.bool)
        mask[row] = False
        session.ledger.open(len(x), mask)
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    assert optimizer.step()
    return flat(model)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("head", [(), ("2",)])
def test_bad_sample_counts_as_masked_bit_for_bit(poison, head):
    # A sum, so that the poisoned sample's loss does not make every other gradient NaN.
    bad, masked = one_step(poison, reduction="sum", head=head), one_step(mask_row=True, reduction="sum", head=head)
    assert torch.isfinite(bad).all()
    assert torch.equal(bad, masked)
    assert not torch.equal(bad, one_step(reduction="sum", head=head))


def test_bad_sample_under_a_mean():
    assert torch.equal(one_step("nan"), one_step(mask_row=True))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-303, 1e101, math.inf, math.nan])
def test_loss_scale_out_of_range(scale):
    with pytest.raises(dpk.EngineError, match="loss_scale"):
        private(small_model(), loss_scale=scale)


def test_huge_norm_is_clipped():
    model = small_model()
    _, model, optimizer, loader = private(model, sample_rate=1.0, loss_scale=1e-100, bound=0.05)
    x, y = next(iter(loader))
    before = flat(model)
    F.cross_entropy(model(x), y).backward()
    assert optimizer.step()
    assert torch.isfinite(flat(model)).all()
    assert (flat(model) - before).norm() * 4 <= 12 * 0.05 * (1 + 1e-6)


def test_static_loss_scale_changes_nothing():
    out = []
    for scale in (1.0, 2.0**16):
        model = small_model()
        # A bound that some rows exceed and others do not: only the second kind shows the scale.
        _, model, optimizer, loader = private(model, sample_rate=1.0, loss_scale=scale, bound=1.0)
        x, y = next(iter(loader))
        (F.cross_entropy(model(x), y) * scale).backward()
        optimizer.step()
        out.append(flat(model))
    assert torch.equal(*out)  # a power of two


def test_wrong_batch_dimension():
    _, model, optimizer, loader = private(small_model(), sample_rate=1.0)
    x, _ = next(iter(loader))
    with pytest.raises(dpk.BatchLayoutError, match="12 samples"):
        model(x[:5])


def test_inputs_that_disagree_ask_for_batch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x, table):
            return self.inner(x) + table.mean(0)

    engine, model, optimizer, _ = private(Two())
    with pytest.raises(dpk.BatchLayoutError, match=r"engine\.batch"):
        model(torch.randn(4, 6), torch.randn(9, 3))
    with pytest.warns(UserWarning, match="sample rate 1"), engine.batch(4):
        model(torch.randn(4, 6), torch.randn(9, 3)).sum().backward()
    assert optimizer.step()


def test_optimizer_that_lacks_a_parameter():
    model = dpk.convert_model(small_model())
    loader = DataLoader(TensorDataset(torch.randn(8, 6)), batch_size=4)
    kwargs = {"module": model, "data_loader": loader, "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    with pytest.raises(dpk.OptimizerError, match=r"5\.bias"):
        dpk.PrivacyEngine().make_private(
            optimizer=torch.optim.SGD([model[0].bias, model[2].bias, model[3].bias], lr=1.0), **kwargs
        )
    alien = nn.Parameter(torch.zeros(3))
    with pytest.raises(dpk.OptimizerError, match="not part of the module"):
        dpk.PrivacyEngine().make_private(optimizer=torch.optim.SGD([*model.parameters(), alien], lr=1.0), **kwargs)
    with pytest.warns(UserWarning, match="frozen"):
        dpk.PrivacyEngine().make_private(optimizer=torch.optim.SGD(model.parameters(), lr=1.0), **kwargs)


def test_unconverted_model():
    model = small_model()
    with pytest.raises(dpk.UnsupportedModuleError, match="convert_model"):
        dpk.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(torch.randn(8, 6)), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_double_step_without_backward_between():
    _, model, optimizer, loader = private(small_model(), sample_rate=1.0)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    assert optimizer.step()
    with pytest.raises(dpk.OptimizerError, match="without a backward"):
        optimizer.step()


def test_submodule_called_outside_a_batch():
    _, model, _, _ = private(small_model())
    with pytest.raises(dpk.EngineError, match=r"'0'.*outside a batch"):
        model[0](torch.randn(4, 6))


def test_bias_used_outside_its_layer_is_caught():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x):
            return self.inner(x) + F.linear(x, self.inner.weight, self.inner.bias)

    _, model, optimizer, loader = private(Functional(), sample_rate=1.0)
    x, y = next(iter(loader))
    before = flat(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(dpk.EngineError, match=r"inner\.bias"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_delta_not_below_one_over_n_warns():
    engine, *_ = private(small_model(), sigma=1.0)
    with pytest.warns(UserWarning, match="1/n"):
        engine.get_epsilon(0.1)


def test_epsilon_that_cannot_be_met():
    model = dpk.convert_model(small_model())
    with pytest.raises(dpk.AccountingError, match="target_epsilon"):
        dpk.PrivacyEngine().make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
            data_loader=DataLoader(TensorDataset(torch.randn(8, 6)), batch_size=4),
            target_epsilon=1e-9,
            target_delta=1e-12,
            epochs=1000,
            max_grad_norm=1.0,
        )


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(6)


@pytest.mark.parametrize("poisson", [True, False])
def test_loader_without_a_length(poisson):
    model = dpk.convert_model(small_model())
    with pytest.raises(dpk.SamplingError):
        dpk.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
            data_loader=DataLoader(Stream(), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=poisson,
        )


def test_secure_mode_refuses_unsafe_options():
    with pytest.raises(dpk.EngineError, match="unsafe_deterministic_seed"):
        dpk.PrivacyEngine(secure_mode=True, unsafe_deterministic_seed=1)
    with pytest.raises(dpk.EngineError, match="max_physical_batch_size"):
        private(small_model(), engine=dpk.PrivacyEngine(secure_mode=True))
    engine, model, optimizer, loader = private(
        small_model(), engine=dpk.PrivacyEngine(secure_mode=True), max_physical_batch_size=5
    )
    assert {
        len(x)
        for x, _ in loader
        if optimizer is not None and model(x).sum().backward() is None and optimizer.step() in (True, False)
    } == {5}


def test_skipping_a_drawn_batch_warns():
    _, model, optimizer, loader = private(small_model(), sample_rate=1.0)
    with pytest.warns(UserWarning, match="without a step"):
        for _ in range(2):
            next(iter(loader))


def test_unstepped_backward_refused():
    _, model, optimizer, loader = private(small_model(), sample_rate=1.0)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(dpk.EngineError, match=r"optimizer\.step"):
        next(iter(loader))


def test_secure_mode_lets_no_batch_be_left_out():
    secure = dpk.PrivacyEngine(secure_mode=True)
    engine, model, optimizer, loader = private(small_model(), engine=secure, sample_rate=1.0, max_physical_batch_size=4)

    def step(x, y):
        F.cross_entropy(model(x), y).backward()
        return optimizer.step()

    assert step(*next(iter(loader))) is False
    with pytest.raises(dpk.EngineError, match="without a step"):
        next(iter(loader))
    assert [step(x, y) for x, y in loader] == [False, False, True]
    parts = iter(loader)
    next(parts)
    with pytest.raises(dpk.EngineError, match="without a step"):
        next(parts)
    assert engine.accountant.history.total_steps == 1


def test_a_given_sample_rate_needs_its_divisor():
    model = small_model()
    dpk.convert_model(model)
    with pytest.raises(dpk.EngineError, match="expected_batch_size"):
        dpk.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
            data_loader=DataLoader(TensorDataset(torch.randn(12, 6)), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            sample_rate=0.25,
        )


def test_a_parameter_frozen_after_the_start_is_refused():
    engine, model, optimizer, loader = private(small_model())
    x, y = next(iter(loader))
    model[0].bias.requires_grad_(False)
    before = flat(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(dpk.EngineError, match=r"'0\.bias' was frozen"):
        optimizer.step()
    assert engine.accountant.history.total_steps == 0
    assert torch.equal(flat(model), before)


def test_the_optimizer_of_a_detached_engine_is_refused():
    engine, model, optimizer, loader = private(small_model())
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    engine.detach()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(dpk.EngineError, match="detached"):
        optimizer.step()


class Backbone(nn.Module):
    """A body whose layers ahead of ``cut`` run without a graph, and a head that starts at zero."""

    def __init__(self, cut: int):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.cut = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.Linear(6, 3), cut
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        for number, layer in enumerate(self.body):
            with torch.set_grad_enabled(number >= self.cut and torch.is_grad_enabled()):
                x = torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize(("cut", "silent"), [(0, None), (1, "body.0.bias"), (2, "body.0.bias")])
def test_biases_that_no_gradient_reaches_are_named_once(cut, silent):
    _, model, optimizer, loader = private(Backbone(cut), head=("head",), batch=6)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    told = [str(w.message) for w in seen if "no gradient reached" in str(w.message)]
    assert len(told) == (silent is not None)
    assert silent is None or (f"{cut} trained" in told[0] and repr(silent) in told[0])


def test_breaking_out_of_a_draw_leaves_no_residue():
    model = small_model()
    _, model, optimizer, loader = private(model, sample_rate=1.0, max_physical_batch_size=4)
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    assert optimizer.step() is False
    before = flat(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        parts = 0
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            parts += 1
    assert parts == 3 and any("without a step" in str(w.message) for w in seen)
    whole = small_model()
    _, whole, other, loader = private(whole, sample_rate=1.0, max_physical_batch_size=4)
    for x, y in loader:
        F.cross_entropy(whole(x), y).backward()
        other.step()
    torch.testing.assert_close(flat(model) - before, flat(whole) - before, rtol=0, atol=0)


def test_unsafe_seed_makes_every_statement_infinite():
    engine, model, optimizer, loader = private(
        small_model(), sigma=5.0, engine=dpk.PrivacyEngine(unsafe_deterministic_seed=3), sample_rate=1.0
    )
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert engine.get_epsilon(1e-5) == math.inf
    assert engine.privacy_statement(1e-5)["epsilon"] == "inf"


def test_detach_gives_plain_training_back():
    engine, model, optimizer, _ = private(small_model())
    engine.detach()
    model(torch.randn(4, 6)).sum().backward()
    assert model[0].bias.grad is not None
    with pytest.raises(dpk.EngineError, match="make_private"):
        engine.save_checkpoint("x")


def test_without_poisson_sampling_every_step_is_charged_at_one():
    engine, model, optimizer, loader = private(small_model(), sigma=1.0, poisson_sampling=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            assert optimizer.step()
    assert [(s.sample_rate, s.count) for s in engine.accountant.history.segments] == [(1.0, 3)]
    assert "Poisson" not in engine.privacy_statement(1e-3)["sampling"]


@pytest.mark.parametrize("ticketless", [True, False])
def test_a_sum_that_an_interrupt_left_behind_is_not_released(ticketless):
    engine, model, optimizer, loader = private(small_model(), sample_rate=1e-12, expected_batch_size=1.0)
    engine._session.ledger.total.fill_(1 << 20)
    before = flat(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, y = (torch.randn(4, 6), torch.zeros(4, dtype=torch.long)) if ticketless else next(iter(loader))
        (F.cross_entropy(model(x), y) * 0.0).backward()
    assert optimizer.step()
    assert torch.equal(flat(model), before)
