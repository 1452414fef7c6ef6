"""The update of all trained parameters as one tensor: the same numbers as parameter by parameter, and no trace left."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat, small_model
from recorded import Recorder
from torch import Tensor, nn, optim

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels.flat_update import FlatUpdate

GENERATOR = torch.Generator().manual_seed(3)
X, Y = torch.randn((12, 6), generator=GENERATOR), torch.randint(0, 3, (12,), generator=GENERATOR)

Make = Callable[[list[nn.Parameter]], optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd_momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.1),
    "adamw_foreach": lambda p: optim.AdamW(p, lr=0.1, foreach=True),
    "adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "nadam": lambda p: optim.NAdam(p, lr=0.1),
    "radam": lambda p: optim.RAdam(p, lr=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
}


class Run:
    """A model with an engine; the same seed gives the same releases."""

    def __init__(self, make: Make, apart: bool = False, model: nn.Module | None = None, **options: Any):
        self.model = dpk.convert_model(model or small_model(), train_modules=("5",))
        self.original = make([p for p in self.model.parameters() if p.requires_grad])
        if apart:
            self.original.register_step_post_hook(lambda *_: None)
        self.engine, _, self.optimizer, self.loader = attach(
            self.model,
            X,
            Y,
            batch=6,
            engine=dpk.PrivacyEngine(unsafe_deterministic_seed=5),
            optimizer=lambda params, lr: self.original,
            sigma=1.0,
            **options,
        )

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            with self.engine.batch(6):
                F.cross_entropy(self.model(X[:6]), Y[:6]).backward()
                assert self.optimizer.step()

    @property
    def together(self) -> bool:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return all(b.data_ptr() - a.data_ptr() == a.numel() * a.element_size() for a, b in pairwise(trained))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_update_of_each_parameter_bit_for_bit(name: str) -> None:
    one, each = Run(OPTIMIZERS[name]), Run(OPTIMIZERS[name], apart=True)
    assert one.together and not each.together
    for _ in range(4):
        one.step()
        each.step()
        assert torch.equal(flat(one.model), flat(each.model))
        assert same(one.optimizer.state_dict(), each.optimizer.state_dict())


def test_a_fused_kernel_rounds_the_ends_of_a_tensor_otherwise() -> None:
    def make(parameters: list[nn.Parameter]) -> optim.Optimizer:
        return optim.AdamW(parameters, lr=0.1, fused=True)

    one, each = Run(make), Run(make, apart=True)
    one.step(4)
    each.step(4)
    torch.testing.assert_close(flat(one.model), flat(each.model), rtol=1e-5, atol=1e-6)
    assert {float(s["step"]) for s in one.original.state.values()} == {4.0}


def test_groups_with_rates_of_their_own_that_alternate_in_the_ledger() -> None:
    def make(parameters: list[nn.Parameter]) -> optim.Optimizer:
        fast, slow = parameters[0:2] + parameters[4:], parameters[2:4]
        return optim.Adam([{"params": fast}, {"params": slow, "lr": 0.001, "weight_decay": 0.5}], lr=0.1)

    one, each = Run(make), Run(make, apart=True)
    assert not each.together
    one.step(3)
    each.step(3)
    assert torch.equal(flat(one.model), flat(each.model))
    assert same(one.original.state_dict(), each.original.state_dict())


def test_a_group_for_every_parameter_stays_apart() -> None:
    run = Run(lambda ps: optim.SGD([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(ps)]))
    assert not run.together
    run.step()


class Ours(optim.SGD):
    """Not known to work element by element."""


def test_an_unknown_optimizer_steps_parameter_by_parameter() -> None:
    run = Run(lambda ps: Ours(ps, lr=0.1))
    before = flat(run.model)
    run.step()
    assert not run.together
    assert not torch.equal(flat(run.model), before)


def test_parameters_that_share_memory_stay_apart() -> None:
    model = small_model()
    whole = torch.zeros(8 + 4)
    model[0].bias.data, model[3].bias.data = whole[:8], whole[8:]
    run = Run(OPTIMIZERS["sgd"], model=model)
    run.step()
    assert model[0].bias.data_ptr() == whole.data_ptr()
    assert not torch.equal(whole, torch.zeros(12))


def test_schedulers_work_on_either_optimizer() -> None:
    rates = []
    for wrapped in (True, False):
        run = Run(OPTIMIZERS["adamw"])
        scheduler = optim.lr_scheduler.StepLR(run.optimizer if wrapped else run.original, 1, gamma=0.5)
        for _ in range(3):
            run.step()
            scheduler.step()
        rates.append((run.optimizer.param_groups[0]["lr"], flat(run.model)))
    assert rates[0][0] == rates[1][0] == 0.1 / 8
    assert torch.equal(rates[0][1], rates[1][1])


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw", "nadam"])
def test_a_state_dict_continues_in_a_plain_optimizer(name: str) -> None:
    """Each parameter has a counter of its own there, which torch's foreach code adds to in place."""
    run = Run(OPTIMIZERS[name])
    run.step(2)
    twins = []
    for foreach in (True, False):
        model = copy.deepcopy(run.model)
        twin = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        twin.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        for group in twin.param_groups:
            group["foreach"] = foreach
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        twin.step()
        twins.append(flat(model))
    torch.testing.assert_close(*twins, rtol=1e-6, atol=1e-7)
    memory = [s["step"].data_ptr() for s in run.original.state.values() if "step" in s]
    assert len(set(memory)) == len(memory)


def test_a_loaded_state_is_taken_up() -> None:
    run, other = Run(OPTIMIZERS["adamw"]), Run(OPTIMIZERS["adamw"], apart=True)
    other.step(3)
    saved = copy.deepcopy(other.original.state_dict())
    run.model.load_state_dict(other.model.state_dict())
    run.step()
    run.model.load_state_dict(other.model.state_dict())
    run.optimizer.load_state_dict(copy.deepcopy(saved))
    run.engine._session.skip_noise(3)
    run.step()
    other.step()
    assert run.together
    assert torch.equal(flat(run.model), flat(other.model))
    assert same(run.original.state_dict(), other.original.state_dict())


def test_a_cleared_state_starts_anew() -> None:
    run, other = Run(OPTIMIZERS["adamw"]), Run(OPTIMIZERS["adamw"], apart=True)
    for each in (run, other):
        each.step()
        each.original.state.clear()
        each.step()
    assert torch.equal(flat(run.model), flat(other.model))
    assert {float(s["step"]) for s in run.original.state.values()} == {1.0}


def test_a_state_that_differs_between_parameters_is_kept_apart() -> None:
    run, other = Run(OPTIMIZERS["adamw"]), Run(OPTIMIZERS["adamw"], apart=True)
    for each in (run, other):
        each.step()
        saved = copy.deepcopy(each.original.state_dict())
        saved["state"][0]["step"] = torch.tensor(7.0)
        each.original.load_state_dict(saved)
        each.step()
    assert not run.together
    assert torch.equal(flat(run.model), flat(other.model))


def test_parameters_moved_from_outside_are_followed() -> None:
    run, other = Run(OPTIMIZERS["adamw"]), Run(OPTIMIZERS["adamw"], apart=True)
    for each in (run, other):
        each.step()
        each.model[0].bias.data = torch.full((8,), 0.25)
        each.step()
    assert run.together
    assert torch.equal(flat(run.model), flat(other.model))


EDITS: dict[str, Callable[[Any, list[nn.Parameter]], object]] = {
    "each state replaced": lambda state, ps: [state.__setitem__(p, {}) for p in ps],
    "each state cleared": lambda state, ps: [state[p].clear() for p in ps],
    "one state cleared": lambda state, ps: state[ps[0]].clear(),
    "a moment replaced": lambda state, ps: state[ps[1]].__setitem__("exp_avg", torch.ones_like(ps[1])),
    "a moment edited": lambda state, ps: state[ps[1]]["exp_avg"].mul_(2.0),
    "counters edited": lambda state, ps: [state[p]["step"].zero_() for p in ps],
    "one counter edited": lambda state, ps: state[ps[0]]["step"].fill_(50.0),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_of_the_state_are_taken_up(name: str) -> None:
    run, other = Run(OPTIMIZERS["adamw"]), Run(OPTIMIZERS["adamw"], apart=True)
    for each in (run, other):
        each.step(2)
        EDITS[name](each.original.state, each.original.param_groups[0]["params"])
        each.step(2)
    assert torch.equal(flat(run.model), flat(other.model))
    assert same(run.original.state_dict(), other.original.state_dict())


def test_memory_that_the_user_holds_is_not_written_to() -> None:
    """A trial step and its undoing: what was put aside comes back."""
    run, other = Run(OPTIMIZERS["sgd"]), Run(OPTIMIZERS["sgd"], apart=True)
    for each in (run, other):
        each.step()
        trained = [p for p in each.model.parameters() if p.requires_grad]
        kept = [p.data for p in trained]
        for p in trained:
            p.data = p.data.clone()
        each.step()
        for p, before in zip(trained, kept, strict=True):
            p.data = before
        each.step()
    assert torch.equal(flat(run.model), flat(other.model))


def test_parameters_exchanged_between_groups_and_turned_ones() -> None:
    def make(parameters: list[nn.Parameter]) -> optim.Optimizer:
        return optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=0.1)

    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Tanh(), nn.Linear(6, 6)]
        return nn.Sequential(*layers)

    runs = [Run(make, apart=apart, model=model()) for apart in (False, True)]
    for each in runs:
        a, b = each.model[0].bias, each.model[2].bias  # of one group and of the other
        each.step()
        a.data, b.data = b.data, a.data
        each.step()
        head = each.model[5].weight  # trained whole
        head.data = head.data.t().contiguous().t()
        each.step()
    assert isinstance(runs[0].optimizer.flat_update(), FlatUpdate)
    assert torch.equal(flat(runs[0].model), flat(runs[1].model))


def test_parameters_moved_between_groups_are_refused() -> None:
    run = Run(lambda ps: optim.SGD([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.5}], lr=0.1))
    first, second = run.original.param_groups
    second["params"].insert(0, first["params"].pop())
    with pytest.raises(dpk.OptimizerError, match="changed after make_private"):
        run.step()


def test_states_of_frozen_parameters_stay() -> None:
    model = dpk.convert_model(small_model())
    original = optim.Adagrad(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="frozen parameter"):
        attach(model, X, Y, optimizer=lambda params, lr: original)
    assert len(original.state) == len(original.param_groups[0]["params"]) == 8


def test_a_hook_of_the_optimizer_sees_parameters_and_gradients() -> None:
    run = Run(OPTIMIZERS["adamw"])
    run.step()
    seen: list[tuple[int, float]] = []

    def look(optimizer: optim.Optimizer, *_: Any) -> None:
        held = optimizer.param_groups[0]["params"]
        seen.append((len(held), sum(float(p.grad.abs().sum()) for p in held)))

    run.optimizer.register_step_pre_hook(look)
    run.step()
    assert seen and seen[0][0] == 5 and seen[0][1] > 0.0
    assert not run.together
    assert all(p.grad is None for p in run.model.parameters())


def test_detach_gives_everything_its_own_memory() -> None:
    run = Run(OPTIMIZERS["adamw"])
    run.step()
    before, state = flat(run.model), copy.deepcopy(run.original.state_dict())
    run.engine.detach()
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert len({p.untyped_storage().data_ptr() for p in trained}) == len(trained)
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in trained)
    assert torch.equal(flat(run.model), before)
    assert same(run.original.state_dict(), state)
    for p in trained:
        p.grad = torch.ones_like(p)
    run.original.step()
    assert {float(s["step"]) for s in run.original.state.values()} == {2.0}


def test_saved_and_copied_models_are_ordinary() -> None:
    run = Run(OPTIMIZERS["sgd"])
    run.step()
    buffer = io.BytesIO()
    torch.save(run.model.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    twin = copy.deepcopy(run.model)
    run.step()
    fresh = small_model()
    fresh.load_state_dict(loaded)
    assert torch.equal(
        flat(twin), torch.cat([dict(fresh.named_parameters())[n].flatten() for n in trained_names(twin)])
    )
    assert not torch.equal(flat(twin), flat(run.model))


def test_each_parameter_is_saved_with_its_own_extent(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    run = Run(OPTIMIZERS["sgd"])
    run.step()
    buffer = io.BytesIO()
    torch.save(run.model[0].bias, buffer)
    assert buffer.tell() < 3000
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in run.model.parameters())
    safetensors.save_model(run.model, str(tmp_path / "model.safetensors"))
    fresh = small_model()
    safetensors.load_model(fresh, str(tmp_path / "model.safetensors"))
    assert same(dict(fresh.state_dict()), {k: v.detach() for k, v in run.model.state_dict().items()})


def trained_names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def test_transformers_saves_a_model_under_training(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    model = dpk.convert_model(transformers.BertForSequenceClassification(config), train_modules=("classifier",))
    tokens, labels = torch.randint(0, 20, (4, 5)), torch.randint(0, 3, (4,))
    engine, model, optimizer, _ = attach(model, tokens, labels, optimizer=optim.AdamW, sigma=1.0)
    with engine.batch(4):
        F.cross_entropy(model(input_ids=tokens).logits, labels).backward()
        optimizer.step()
    assert isinstance(optimizer.flat_update(), FlatUpdate)
    model.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter), name


def test_parameters_of_half_precision() -> None:
    runs = []
    for apart in (False, True):
        model = small_model().to(torch.bfloat16)
        run = Run(OPTIMIZERS["adamw"], apart=apart, model=model)
        with run.engine.batch(6):
            F.cross_entropy(run.model(X[:6].bfloat16()).float(), Y[:6]).backward()
            run.optimizer.step()
        runs.append(flat(run.model))
    assert runs[0].dtype == torch.bfloat16
    assert torch.equal(*runs)


@pytest.mark.parametrize("layers", [3, 40])
def test_operations_of_a_step_do_not_grow_with_the_number_of_biases(layers: int) -> None:
    """Clip, sum, noise with its scale: one operation each; one fused update; the rest are counters and zeroing."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)), nn.Linear(6, 3))
    dpk.convert_model(model)
    engine, model, optimizer, _ = attach(
        model, X, Y, optimizer=lambda ps, lr: optim.AdamW(ps, lr=lr, fused=True), sigma=1.0
    )
    steps: list[Any] = []
    for step in range(3):
        with engine.batch(12):
            F.cross_entropy(model(X), Y).backward()
            with Recorder(steps) if step == 2 else nullcontext():  # the first makes states and uploads the key
                optimizer.step()
    nothing = {
        "_record_function_enter_new",
        "_record_function_exit",
        "detach",
        "slice",
        "view",
        "alias",
        "unsqueeze",
        "expand",
        "as_strided",
    }
    names = [func._schema.name.split("::")[1] for func, *_ in steps]
    assert sorted(n for n in names if n not in nothing) == [
        "_foreach_add_",  # Adam's counter
        "_fused_adamw_",
        "add_",  # the counter of the noise
        "clip_factors",
        "clipped_sum_",
        "copy_",  # Adam's counter, to where the user's state has it
        "noisy_sum",
        "zero_",  # the sum, once it was released
    ]
