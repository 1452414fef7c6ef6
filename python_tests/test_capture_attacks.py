"""What two attacks on the captured step found: no raw gradient, no stale memory, nothing counted twice."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat, small_model
from captured import PADDED, Training, X, Y, both
from recorded import RecordedGraph
from torch import Tensor, nn, optim

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import capture
from dp_bitfit_kernels.flat_update import FlatUpdate

pytestmark = pytest.mark.filterwarnings("ignore:this batch does not come from the private loader")


class Rprop(optim.Rprop):
    """Steps parameter by parameter, on whatever has a gradient."""


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("make", [optim.AdamW, Rprop])
@pytest.mark.parametrize("early", [True, False])
def test_a_parameter_that_was_unfrozen_gets_no_raw_gradient(
    monkeypatch: pytest.MonkeyPatch, recorded: bool, make: Any, early: bool
) -> None:
    """Before its first capture or after, the call in which it happens refuses, as the eager step does."""
    if recorded:
        monkeypatch.setitem(capture.GRAPHS, "cpu", RecordedGraph)
    run = Training(True)
    run.engine.detach()
    everything = make(run.model.parameters(), lr=0.1)
    with pytest.warns(UserWarning):
        _, run.model, run.optimizer, run.loader = attach(
            run.model, X, Y, **PADDED, sigma=1.0, optimizer=lambda params, lr: everything
        )
    run.step = dpk.capture_step(run.optimizer, run.loss)
    batches = itertools.chain.from_iterable(run.loader for _ in range(4))
    while not run.step.captured:
        run.step(*next(batches))
    if not early:
        for _ in range(5):
            run.step(*next(batches))
    weight, x_y = run.model[3].weight, next(batches)
    before, biases, charged = weight.clone(), flat(run.model), run.optimizer.session.releases
    weight.requires_grad_(True)
    with pytest.raises(dpk.EngineError, match=r"a raw gradient reached parameter '3\.weight'"):
        run.step(*x_y)
    assert torch.equal(weight, before) and weight.grad is None
    assert run.optimizer.session.releases == charged and not run.optimizer.session.ledger.total.any()
    weight.requires_grad_(False)
    assert torch.equal(flat(run.model), biases)
    for x_y in batches:  # and it goes on, once that is undone
        run.step(*x_y)
    assert torch.equal(weight, before)


def test_a_penalty_on_the_parameters_is_refused_at_every_call(graphs: Any) -> None:
    run = Training(True).epochs(2)
    penalised = dpk.capture_step(
        run.optimizer, lambda x, y: run.loss(x, y) + sum(p.square().sum() for p in run.model.parameters())
    )
    before = flat(run.model)
    for x, y in run.loader:
        with pytest.raises(dpk.EngineError, match="a raw gradient reached"):
            penalised(x, y)
    assert torch.equal(flat(run.model), before)


STATES: dict[str, Any] = {
    "cleared": lambda o: o.state.clear(),
    "fresh": lambda o: o.load_state_dict(type(o)(o.param_groups[0]["params"], lr=0.1, fused=True).state_dict()),
    "hyperparameter": lambda o: o.param_groups[0].update(weight_decay=0.3),
    "momentum on": lambda o: o.param_groups[0].update(momentum=0.9) if "momentum" in o.param_groups[0] else None,
}


@pytest.mark.parametrize("change", STATES)
@pytest.mark.parametrize("make", ["adamw", "sgd", "momentum"])
def test_a_state_that_is_not_there_yet_is_not_built_into_the_release(
    graphs: Any, monkeypatch: pytest.MonkeyPatch, change: str, make: str
) -> None:
    makes: dict[str, Any] = {
        "adamw": lambda ps, lr: optim.AdamW(ps, lr=lr, fused=True),
        "sgd": lambda ps, lr: optim.SGD(ps, lr=lr, fused=True),
        "momentum": lambda ps, lr: optim.SGD(ps, lr=lr, momentum=0.9, fused=True),
    }
    eager = Training(False, optimizer=makes[make])
    monkeypatch.setattr(FlatUpdate, "capturable", True)
    captured = Training(True, optimizer=makes[make])
    for run in (eager, captured):
        run.epochs(3)
        STATES[change](run.optimizer.original_optimizer)
        run.epochs(2)
    torch.testing.assert_close(flat(captured.model), flat(eager.model), rtol=1e-5, atol=1e-6)
    for one, other in zip(captured.optimizer.state.values(), eager.optimizer.state.values(), strict=True):
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-7)


def test_the_first_release_of_a_process_is_eager(graphs: Any, tmp_path: Any) -> None:
    """Also in a run that goes on from a checkpoint, with draws of many batches: the key comes to the device there."""
    path = str(tmp_path / "c.pt")
    options: dict[str, Any] = {"batch": 40, "sample_rate": 1.0, "expected_batch_size": 40.0}
    Training(False, **options).epochs(3).engine.save_checkpoint(path)
    resumed = Training(True, **options)
    resumed.engine.load_checkpoint(path)
    first = []
    monkey = resumed.engine._session.noisy_sum

    def noisy_sum() -> Tensor:
        first.append(torch.utils._python_dispatch._get_current_dispatch_mode() is None)
        return monkey()

    resumed.engine._session.noisy_sum = noisy_sum  # type: ignore[method-assign]
    resumed.epochs(4)
    assert resumed.step.captured and first[0] and not first[-1]


@pytest.mark.parametrize("place", ["close", "end_batch", "charge", "noisy_sum"])
def test_an_interrupt_never_lets_a_batch_count_twice(graphs: Any, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    run = Training(True, sigma=0.0).epochs(3)
    session = run.engine._session
    owner = session.ledger if place == "close" else session
    real = getattr(owner, place)

    def interrupted(*args: Any) -> Any:
        monkeypatch.setattr(owner, place, real)
        raise KeyboardInterrupt

    batches = iter(run.loader)
    x, y = next(batches)
    if place == "noisy_sum":
        run.optimizer.noise_multiplier = 0.5  # so that the release runs eagerly
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(owner, place, interrupted)
        for _ in range(20):
            run.step(x, y)
            x, y = next(batches)
    with pytest.raises(dpk.EngineError, match="ticket"):
        run.step(x, y)
    assert session.draw is None and not session.ledger.total.any()


def test_arguments_of_other_leading_sizes(graphs: Any) -> None:
    runs = []
    for run in both(poisson_sampling=False, max_physical_batch_size=None, pad_physical_batches=None):
        runs.append(run)
        loss = lambda x, y, w, run=run: F.cross_entropy(run.model(x), y, weight=w, reduction="sum") / len(x)  # noqa: E731
        step = dpk.capture_step(run.optimizer, loss)
        for x, y in itertools.chain.from_iterable(run.loader for _ in range(3)):
            weights = torch.tensor([1.0, 2.0, 0.5])
            if run.step is not None:
                step(x, y, weights)
            else:
                loss(x, y, weights).backward()
                run.optimizer.step()
    assert runs[0].outcome == runs[1].outcome


@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD])
def test_a_schedule_of_momentum_releases_eagerly(graphs: Any, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    """OneCycleLR changes beta1 or momentum at every step: a graph made for each would be worse than none."""

    def made(ps: Any, lr: float) -> Any:
        return make(ps, lr=lr, fused=True, **({"momentum": 0.9} if make is optim.SGD else {}))

    eager = Training(False, optimizer=made)
    monkeypatch.setattr(FlatUpdate, "capturable", True)
    captured = Training(True, optimizer=made)
    for run in (eager, captured):
        scheduler = optim.lr_scheduler.OneCycleLR(run.optimizer, 0.1, total_steps=30)
        for x, y in itertools.chain.from_iterable(run.loader for _ in range(5)):
            if run(x, y):
                scheduler.step()
    torch.testing.assert_close(flat(captured.model), flat(eager.model), rtol=1e-5, atol=1e-6)
    assert captured.step.captured and graphs.captures == 1


class Attributes(nn.Module):
    """Numbers that a graph has built in."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.square = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.drop = nn.Dropout(0.0)
        self.act: nn.Module = nn.Tanh()
        self.inner = small_model()
        self.kept = self.act.register_forward_hook(_thrice)
        self.pair, self.settings, self.function, self.shift = (1.0, 1.0), {"scale": 1.0}, torch.tanh, torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(x * self.pair[1] + self.shift)
        return self.inner(self.drop(self.act(self.norm(self.square(x))))) * self.scale * self.settings["scale"]


def _thrice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 3.0


def _twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2.0


CHANGES: dict[str, Any] = {
    "turned": lambda m: setattr(m.square.weight, "data", m.square.weight.data.t()),
    "attribute": lambda m: setattr(m, "scale", 0.5),
    "dropout": lambda m: setattr(m.drop, "p", 0.5),
    "eps": lambda m: setattr(m.norm, "eps", 0.3),
    "module": lambda m: setattr(m, "act", nn.ReLU()),
    "hook": lambda m: m.act.register_forward_hook(_twice),
    "another hook": lambda m: (m.kept.remove(), m.act.register_forward_hook(_twice)),
    "forward of an instance": lambda m: setattr(m.act, "forward", torch.sin),
    "tuple": lambda m: setattr(m, "pair", (0.5, 2.0)),
    "dict": lambda m: m.settings.update(scale=3.0),
    "function": lambda m: setattr(m, "function", torch.relu),
    "plain tensor": lambda m: setattr(m, "shift", torch.ones(6)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_are_followed(graphs: Any, change: str) -> None:
    runs = []
    for run in both(model=Attributes):
        runs.append(run)
        run.epochs(3)
        CHANGES[change](run.model)
        run.epochs(2)
    assert runs[0].outcome == runs[1].outcome
    assert runs[1].step.captured


def test_a_number_that_changes_is_followed_and_warned_of_in_the_end(graphs: Any) -> None:
    runs = []
    for run in both():
        runs.append(run)
        loss = lambda x, y, a, run=run: F.cross_entropy(run.model(x), y) * a  # noqa: E731
        step = dpk.capture_step(run.optimizer, loss)
        with pytest.warns(UserWarning, match="kinds of batches") if run.step else contextlib.nullcontext():
            for epoch in range(20):
                for x, y in run.loader:
                    if run.step is not None:
                        step(x, y, 0.9**epoch)
                    else:
                        loss(x, y, 0.9**epoch).backward()
                        run.optimizer.step()
    assert runs[0].outcome == runs[1].outcome


def test_a_scheduler_made_late_sees_the_steps(graphs: Any, recwarn: pytest.WarningsRecorder) -> None:
    run = Training(True).epochs(3)
    scheduler = optim.lr_scheduler.StepLR(run.optimizer, 1)
    for x, y in run.loader:
        if run.step(x, y):
            scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_a_parameter_outside_the_model_gets_no_raw_gradient(graphs: Any) -> None:
    """Frozen when the engine came, unfrozen later: refused by the eager step and by the captured one alike."""
    for captured in (False, True):
        outside = nn.Parameter(torch.ones(3), requires_grad=False)
        made = lambda ps, lr, outside=outside: Rprop([*ps, outside], lr=lr)  # noqa: E731
        with pytest.warns(UserWarning, match="frozen parameter"):
            run = Training(captured, optimizer=made)
        inner = run.loss
        run.loss = lambda x, y, run=run, o=outside: F.cross_entropy(run.model(x) * o, y)  # type: ignore[method-assign]
        if captured:
            run.step = dpk.capture_step(run.optimizer, run.loss)
        run.epochs(3)
        outside.requires_grad_(True)
        with pytest.raises(dpk.OptimizerError, match="not part of the module was unfrozen"):
            run.epochs(1)
        assert torch.equal(outside, torch.ones(3)) and inner is not None


def test_graphs_of_two_physical_sizes_read_the_mask_that_is_written(graphs: Any) -> None:
    """A smaller last batch must not leave the larger one's graph on memory that was given back."""
    runs = []
    for run in both(poisson_sampling=False, max_physical_batch_size=None, pad_physical_batches=None):
        runs.append(run)
        masks = set()
        for _ in range(5):
            for x, y in ((X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:20], Y[16:20])):
                run(x, y)
                masks.add(run.optimizer.session.ledger._slab.mask.data_ptr())
        assert len(masks) == 1
    assert runs[0].outcome == runs[1].outcome
    assert graphs.captures == 3  # one of each size, one release


class Counting(nn.Module):
    """Changes itself in the forward, in a way that a graph would or would not repeat."""

    how = "buffer"

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()
        self.register_buffer("n", torch.zeros(()))
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.how == "buffer":
            self.n = self.n + 1.0
        if torch.is_grad_enabled() and self.how == "number":
            self.count += 1
        return self.inner(x) * (self.n + self.count + 1.0).clamp(max=30.0) / 30.0


@pytest.mark.parametrize("how", ["buffer", "number"])
def test_a_model_that_changes_itself_stays_eager(graphs: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(Counting, "how", how)
    eager = Training(False, model=Counting).epochs(4)
    with pytest.warns(UserWarning, match="runs eagerly"):
        captured = Training(True, model=Counting).epochs(4)
    assert eager.outcome == captured.outcome
    assert not captured.step.captured


def test_a_batch_that_is_open_when_its_step_is_forgotten_goes_on_eagerly(graphs: Any) -> None:
    run = Training(True).epochs(3)
    batches = iter(run.loader)
    x, y = next(batches)
    run.step = None
    run(x, y)
    for x, y in batches:
        run(x, y)
    assert run.engine.accountant.history.total_steps == 4 * len(run.loader)


def _tiny(name: str) -> tuple[nn.Module, Tensor, str]:
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 3,
    }
    if name == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=8, **small)
        return transformers.ViTForImageClassification(config), torch.randn(24, 3, 16, 16), "pixel_values"
    if name == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
        return transformers.ResNetForImageClassification(config), torch.randn(24, 3, 16, 16), "pixel_values"
    config = transformers.RobertaConfig(vocab_size=40, max_position_embeddings=20, **small)
    return transformers.RobertaForSequenceClassification(config), torch.randint(4, 40, (24, 9)), "input_ids"


@pytest.mark.parametrize("name", ["roberta", "vit", "resnet"])
def test_models_of_transformers_are_captured_and_stay_so(graphs: Any, name: str) -> None:
    """With their dropout: nothing that they do to themselves in a forward looks like a change."""
    outcomes = []
    for captured in (False, True):
        torch.manual_seed(0)
        model, inputs, argument = _tiny(name)
        dpk.convert_model(model.train(), train_modules=("classifier*",))
        engine = dpk.PrivacyEngine(unsafe_deterministic_seed=1)
        engine, model, optimizer, loader = attach(
            model, inputs, torch.arange(24) % 3, **{**PADDED, "engine": engine, "sigma": 1.0, "lr": 0.05}
        )
        loss = lambda batch, y, model=model: F.cross_entropy(model(**batch).logits, y)  # noqa: E731
        step = dpk.capture_step(optimizer, loss)
        for x, y in itertools.chain.from_iterable(loader for _ in range(5)):
            if captured:
                step({argument: x}, y)
            else:
                loss({argument: x}, y).backward()
                optimizer.step()
        outcomes.append(flat(model).tolist())
    assert graphs.captures == 2
    assert outcomes[0] == outcomes[1]
