"""Parameters and states that are updated as one tensor: edited, saved, copied, detached as if each lay by itself."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat, names_of, small_model
from flat_runs import OPTIMIZERS, Run, X, Y, same
from torch import nn, optim

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels.flat_update import FlatUpdate


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


def test_states_of_frozen_parameters_stay() -> None:
    model = dpk.convert_model(small_model())
    original = optim.Adagrad(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="frozen parameter"):
        attach(model, X, Y, optimizer=lambda params, lr: original)
    assert len(original.state) == len(original.param_groups[0]["params"]) == 8


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
    assert torch.equal(flat(twin), torch.cat([dict(fresh.named_parameters())[n].flatten() for n in names_of(twin)]))
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
