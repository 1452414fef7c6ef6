"""The update of all trained parameters as one tensor: the same numbers as parameter by parameter."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat, small_model
from flat_runs import OPTIMIZERS, Run, X, Y, same
from recorded import Recorder
from torch import nn, optim

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels.flat_update import FlatUpdate


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


def test_parameters_moved_from_outside_are_followed() -> None:
    run, other = Run(OPTIMIZERS["adamw"]), Run(OPTIMIZERS["adamw"], apart=True)
    for each in (run, other):
        each.step()
        each.model[0].bias.data = torch.full((8,), 0.25)
        each.step()
    assert run.together
    assert torch.equal(flat(run.model), flat(other.model))


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
        "empty",  # the release
        "noisy_sum_",
        "zero_",  # the sum, once it was released
    ]
