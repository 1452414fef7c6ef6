"""Ordinary-looking loops and models that once got more out of a release than was charged: each must be refused."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat, private, small_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import dp_bitfit_kernels as dpk


def padded(model, secure=False, **options):
    engine = dpk.PrivacyEngine(secure_mode=secure)
    return private(model, n=24, batch=4, engine=engine, max_physical_batch_size=8, pad_physical_batches=True, **options)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return optimizer.step()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("idiom", ["twice a batch", "cycle", "list"])
def test_a_padded_batch_counts_once(idiom, secure):
    """Its pads repeat a record: without the ticket's mask they would all count."""
    _, model, optimizer, loader = padded(small_model(), secure)
    batches = {
        "twice a batch": lambda: (b for batch in loader for b in (batch, batch)),
        "cycle": lambda: itertools.islice(itertools.cycle(loader), 12),
        "list": lambda: list(loader),
    }[idiom]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(dpk.EngineError, match=r"ticket|without a step"):
            for x, y in batches():
                step(model, optimizer, x, y)


class Forward(nn.Module):
    """Row i depends on the rows before it, never on those behind it."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.last = kind, nn.Linear(6, 6), nn.Linear(6, 3)
        self.rnn = nn.LSTM(6, 6)

    def forward(self, x):
        h = torch.relu(self.first(x))
        if self.kind == "reference":
            h = h - 0.5 * h[:1]
        elif self.kind == "lstm":
            h = self.rnn(h)[0]
        elif self.kind == "cumulative":
            h = h.cumsum(0)
        return self.last(h)


@pytest.mark.parametrize("kind", ["reference", "lstm", "cumulative"])
def test_mixing_that_only_flows_forward_is_seen(kind):
    model = dpk.convert_model(Forward(kind), biases=("*", "!rnn.*"))
    engine, model, optimizer, loader = attach(model, torch.randn(8, 6), torch.arange(8) % 3, sample_rate=1.0)
    x, y = next(iter(loader))
    with pytest.raises(dpk.BatchLayoutError):
        step(model, optimizer, x, y)
    assert engine.accountant.history.total_steps == 0


def test_a_causal_sequence_first_model_is_refused_even_where_t_is_b():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):  # [T, B, 6] as it believes
            h = self.first(x)
            mask = torch.tril(torch.ones(len(h), len(h)))
            return self.last(torch.einsum("ts,sbd->tbd", mask, h)).mean(1)

    model = dpk.convert_model(Causal())
    _, model, _, loader = attach(model, torch.randn(8, 8, 6), torch.arange(8) % 3, sample_rate=1.0)
    x, y = next(iter(loader))
    with pytest.raises(dpk.BatchLayoutError):
        F.cross_entropy(model(x), y).backward()


class Mean(nn.Module):
    def __init__(self, in_training_only=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.always = nn.Linear(6, 6), nn.Linear(6, 3), not in_training_only

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(h - h.mean(0) if self.always or self.training else h)


def test_mixing_is_asked_for_where_a_batch_holds_one_record_only():
    """The only row is changed, since there is no other."""
    for _ in range(3):
        model = dpk.convert_model(Mean())
        _, model, optimizer, loader = attach(model, torch.randn(1, 6), torch.tensor([0]), sample_rate=1.0)
        x, y = next(iter(loader))
        with pytest.raises(dpk.BatchLayoutError):
            step(model, optimizer, x, y)


@pytest.mark.parametrize("batch", [1, 2])
def test_mixing_is_seen_in_padded_batches_of_few_records(batch):
    for _ in range(4):
        engine = dpk.PrivacyEngine(secure_mode=True)
        _, model, optimizer, loader = private(Mean(), n=16, batch=batch, engine=engine, max_physical_batch_size=8)
        x, y = next(iter(loader))
        with pytest.raises(dpk.BatchLayoutError):
            step(model, optimizer, x, y)


def test_a_first_forward_in_evaluation_proves_nothing_for_training():
    _, model, optimizer, loader = private(Mean(in_training_only=True), sample_rate=1.0)
    model.eval()
    for _ in range(2):  # the first two batches are asked anyway, the third is not
        x, y = next(iter(loader))
        step(model, optimizer, x, y)
    model.train()
    with pytest.raises(dpk.BatchLayoutError):
        step(model, optimizer, *next(iter(loader)))


def test_a_seeded_run_stays_infinite_in_its_files(tmp_path):
    path, record = str(tmp_path / "c"), str(tmp_path / "h")
    engine = dpk.PrivacyEngine(history=record, unsafe_deterministic_seed=1)
    engine, model, optimizer, loader = private(small_model(), sigma=1.0, engine=engine)
    for x, y in loader:
        step(model, optimizer, x, y)
    assert engine.get_epsilon(1e-5) == float("inf")
    engine.save_checkpoint(path)
    engine.accountant.history.close()
    assert dpk.PrivacyEngine(history=record).get_epsilon(1e-5) == float("inf")
    again, *_ = private(small_model(), sigma=1.0)
    again.load_checkpoint(path)
    assert again.get_epsilon(1e-5) == float("inf")


def test_a_shallow_copy_of_an_engine_draws_its_own_noise():
    moved = []
    engine = dpk.PrivacyEngine()
    for one in (engine, copy.copy(engine)):
        _, model, optimizer, loader = private(small_model(), sigma=1.0, engine=one, sample_rate=1.0)
        before = flat(model)
        x, y = next(iter(loader))
        step(model, optimizer, x, y)
        moved.append(flat(model) - before)
    assert ((moved[0] - moved[1]).abs() > 1e-4).float().mean() > 0.9
    with pytest.raises(dpk.DPBiTFiTError):
        copy.copy(engine)  # attached


def test_zero_grad_cuts_the_graphs_before_it():
    """Else the same records count twice, in two orders."""
    engine, model, optimizer, _ = private(small_model(), bound=0.01)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    before = flat(model)
    first = F.cross_entropy(model(x), y, reduction="sum")
    first.backward(retain_graph=True)
    optimizer.zero_grad()
    second = F.cross_entropy(model(x.flip(0)), y.flip(0), reduction="sum")
    (first + second).backward()
    optimizer.step()
    alone = small_model()
    _, alone, other, _ = private(alone, bound=0.01)
    F.cross_entropy(alone(x.flip(0)), y.flip(0), reduction="sum").backward()
    other.step()
    torch.testing.assert_close(flat(model) - before, flat(alone) - before, rtol=0, atol=0)


def test_what_was_learnt_before_is_told_of():
    engine, model, optimizer, loader = private(small_model(), sigma=1.0)
    for x, y in loader:
        step(model, optimizer, x, y)
    engine.detach()
    with pytest.warns(UserWarning, match="another engine"):
        attach(model, torch.randn(8, 6), torch.arange(8) % 3, batch=4)
    plain = dpk.convert_model(small_model())
    momentum = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    F.cross_entropy(plain(torch.randn(4, 6)), torch.tensor([0, 1, 2, 0])).backward()
    momentum.step()
    with pytest.warns(UserWarning, match="momentum"):
        attach(plain, torch.randn(8, 6), torch.arange(8) % 3, batch=4, optimizer=lambda *_, **__: momentum)


def test_a_checkpoint_of_other_noise_is_told_of(tmp_path):
    engine, *_ = private(small_model(), sigma=0.5)
    engine.save_checkpoint(str(tmp_path / "c"))
    stricter, _, optimizer, _ = private(small_model(), sigma=1.0)
    with pytest.warns(UserWarning, match="noise multiplier"):
        stricter.load_checkpoint(str(tmp_path / "c"))
    assert optimizer.noise_multiplier == 0.5


@pytest.mark.parametrize("surgery", ["prune", "parametrize", "remove"])
def test_a_bias_that_is_no_parameter_any_more_is_named(surgery):
    from torch.nn.utils import parametrize, prune

    model = dpk.convert_model(small_model())
    if surgery == "prune":
        prune.l1_unstructured(model[0], "bias", amount=1)
    elif surgery == "parametrize":
        parametrize.register_parametrization(model[0], "bias", nn.Identity())
    else:
        model[0].bias = None
    with pytest.raises(dpk.DPBiTFiTError, match=r"layer '0'"):
        model(torch.randn(4, 6))
    with pytest.raises(dpk.DPBiTFiTError, match=r"layer '0'"):
        attach(model, torch.randn(4, 6))


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_model_may_be_checkpointed(reentrant):
    moved = []
    for checkpointed in (False, True):
        _, model, optimizer, loader = private(small_model(), bound=0.05, sample_rate=1.0)
        before = flat(model)
        ((x, y),) = list(loader)
        x.requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        F.cross_entropy(out, y).backward()
        optimizer.step()
        moved.append(flat(model) - before)
    torch.testing.assert_close(*moved, rtol=0, atol=1e-7)


def test_the_bound_and_the_parameters_are_fixed():
    _, model, optimizer, loader = private(small_model())
    with pytest.raises(AttributeError):
        optimizer.max_grad_norm = 0.1
    outside = nn.Linear(3, 2)
    optimizer.original_optimizer.add_param_group({"params": list(outside.parameters())})
    x, y = next(iter(loader))
    F.cross_entropy(outside(model(x)), y % 2).backward()
    with pytest.raises(dpk.OptimizerError, match="changed after make_private"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sigma": 2.0**21}, dpk.EngineError),
        ({"sample_rate": "a"}, dpk.SamplingError),
        ({"expected_batch_size": "x"}, dpk.EngineError),
        ({"max_physical_batch_size": 2.5}, dpk.SamplingError),
    ],
)
def test_arguments_that_are_no_numbers_in_range_are_refused_at_once(options, error):
    with pytest.raises(error):
        private(small_model(), **options)


def test_noise_too_small_for_float64_costs_infinity():
    engine, model, optimizer, loader = private(small_model(), sigma=1e-6)
    x, y = next(iter(loader))
    step(model, optimizer, x, y)
    assert engine.get_epsilon(1e-5) == float("inf")
