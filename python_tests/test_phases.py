"""Training in phases: each trains its part, and what goes on from one to the next is what should."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import names_of, small_model
from phased import ALL, BIASES, TWO, OwnAdam, X, Y, epochs, private, step, values
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

import dp_bitfit_kernels as dpk


def plain_training(rates: tuple[float, float], steps: tuple[int, int]) -> dict[str, Tensor]:
    """PyTorch alone: all of the model, then only its biases, by one SGD with momentum."""
    model = small_model()
    optimizer = optim.SGD(model.parameters(), lr=rates[0], momentum=0.9)
    for phase, (rate, count) in enumerate(zip(rates, steps, strict=True)):
        optimizer.param_groups[0]["lr"] = rate
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(phase == 0 or name.endswith("bias"))
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
    return values(model)


@pytest.mark.parametrize("norm", ["mixed", "ghost", "instantiate"])
def test_each_phase_is_plain_training_of_its_part(norm: str) -> None:
    phases = [dpk.Phase("full", epochs=2, lr=0.05), dpk.Phase("biases", epochs=3, lr=0.2)]
    run = private(
        phases,
        optimizer=lambda ps, lr: optim.SGD(ps, lr=lr, momentum=0.9),
        bound=50.0,
        per_sample_norm=norm,
    )
    epochs(run, 2)
    run.engine.next_phase()
    epochs(run, 3)
    want = plain_training((0.05, 0.2), (2, 3))
    for name, value in values(run.model).items():
        torch.testing.assert_close(value, want[name], rtol=1e-3, atol=1e-4)
    assert not torch.equal(want["0.weight"], values(small_model())["0.weight"])


@pytest.mark.parametrize("optimizer", [optim.Adam, OwnAdam])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_two_phases_equal_two_engines(optimizer: Any, clipping: str) -> None:
    run = private(TWO, optimizer=optimizer, bound=0.05, clipping=clipping)
    epochs(run, 2)
    run.engine.next_phase()
    epochs(run, 3)

    model = dpk.convert_model(small_model(), train_modules=("*",))
    first = optimizer(model.parameters(), lr=TWO[0].lr)
    for phase in range(2):
        if phase:
            dpk.convert_model(dpk.restore_model(model))
            second = optimizer([p for p in model.parameters() if p.requires_grad], lr=TWO[1].lr)
            second.state.update({p: first.state[p] for p in second.param_groups[0]["params"]})
            first = second
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the state of the first one, which this engine has not charged
            engine = dpk.PrivacyEngine()
            _, private_optimizer, loader = engine.make_private(
                module=model,
                optimizer=first,
                data_loader=DataLoader(TensorDataset(X, Y), batch_size=len(X)),
                noise_multiplier=0.0,
                max_grad_norm=0.05,
                clipping=clipping,
                sample_rate=1.0,
                expected_batch_size=12.0,
            )
        for _ in range(3 if phase else 2):
            for x, y in loader:
                step(model, private_optimizer, x, y)
        engine.detach()
    for name, value in values(run.model).items():
        torch.testing.assert_close(value, dict(model.named_parameters())[name].data, rtol=1e-4, atol=1e-5)


def test_the_objects_stay_the_same_and_the_loader_goes_on() -> None:
    """Also an iteration of the loader that is under way: its next draw goes to the next phase."""
    run = private(TWO, sigma=1.0, rate=0.25)
    released = 0
    for x, y in run.loader:
        released += step(run.model, run.optimizer, x, y)
        if released == 2 and run.engine.phase == 0:
            run.engine.next_phase()
    assert released == 4 and run.engine.phase == 1
    assert run.engine._session.releases == 2 and run.optimizer.session is run.engine._session
    assert run.engine.accountant.history.total_steps == 4
    run.engine.detach()
    with pytest.raises(dpk.EngineError, match="detached engine"):
        next(iter(run.loader))
    with pytest.raises(dpk.EngineError, match="detached engine"):
        run.optimizer.step()


def test_noise_goes_on_where_it_was() -> None:
    """One key and one counter: the second phase's noise is the stream's at the numbers after the first's."""
    from dp_bitfit_kernels import reference

    phases = [dpk.Phase("full", epochs=2, lr=1.0), dpk.Phase("biases", epochs=2, lr=1.0)]
    run = private(phases, sigma=1.0, optimizer=optim.SGD)
    key = run.engine._keys.key_tensor("cpu").clone()
    numbers = []
    for index, _ in itertools.product(range(2), range(2)):
        if index and run.engine.phase == 0:
            run.engine.next_phase()
        before = torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad]).double()
        for x, _y in run.loader:
            run.optimizer.zero_grad()
            (run.model(x) * 0.0).sum().backward()
            run.optimizer.step()
        after = torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad]).double()
        z = [reference.standard_normal(key, torch.tensor([n]), 0, 0, len(before)) / 12 for n in range(1, 6)]
        numbers += [n for n, noise in enumerate(z, 1) if torch.allclose(before - after, noise, rtol=0, atol=2e-6)]
    assert numbers == [1, 2, 3, 4] and run.engine._session.noise_steps == 4
    assert torch.equal(key, run.engine._keys.key_tensor("cpu"))


@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_noise_is_calibrated_over_all_phases(kind: str) -> None:
    run = private(TWO, epsilon=2.0, rate=0.25, engine=dpk.PrivacyEngine(accountant=kind))
    sigma = run.optimizer.noise_multiplier
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epochs(run, 2)
        run.engine.next_phase()
        assert run.optimizer.noise_multiplier == sigma
        epochs(run, 3)
    (segment,) = run.engine.accountant.history.segments
    assert (segment.count, segment.noise_multiplier, segment.sample_rate) == (20, sigma, 0.25)
    fresh = dpk.PrivacyEngine(accountant=kind).accountant
    assert run.engine.get_epsilon(1e-3) == fresh.get_epsilon(1e-3, [(sigma, 0.25, 20)])
    assert 1.95 < run.engine.get_epsilon(1e-3) <= 2.0


def test_a_noise_multiplier_that_was_set_goes_on() -> None:
    run = private(TWO, sigma=1.0, rate=0.25)
    run.optimizer.noise_multiplier = 3.0
    run.engine.next_phase()
    epochs(run, 1)
    assert [s.noise_multiplier for s in run.engine.accountant.history.segments] == [3.0]


def test_a_phase_that_runs_longer_than_planned_says_so_and_all_of_them_exceed_the_target() -> None:
    run = private(TWO, epsilon=2.0, rate=0.25)
    epochs(run, 2)
    with pytest.warns(UserWarning, match=r"8 releases planned in phases\[0\] \(train='full'\)"):
        epochs(run, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        epochs(run, 1)
        run.engine.next_phase()
        epochs(run, 1)  # 20 in all
        assert run.engine.get_epsilon(1e-3) <= 2.0
    with pytest.warns(UserWarning, match="than the 20 releases that .* epsilon exceeds"):
        epochs(run, 1)
    assert run.engine.get_epsilon(1e-3) > 2.0


def test_an_early_change_spends_less() -> None:
    run = private(TWO, epsilon=2.0, rate=0.25)
    epochs(run, 1)
    run.engine.next_phase()
    epochs(run, 3)
    assert run.engine.accountant.history.total_steps == 16 and run.engine.get_epsilon(1e-3) < 1.95


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ("full", ALL),
        ("biases", BIASES),
        (("biases", "5.*"), (*BIASES[:3], "5.weight", "5.bias")),
        ("5.*", ("5.weight", "5.bias")),
        (("!5.*",), ALL[:-2]),
        (("full", "!biases"), tuple(n for n in ALL if n not in BIASES)),
        (("!0.*", "biases"), BIASES[1:]),
        (["*.weight", "0.bias"], ("0.weight", "0.bias", "2.weight", "3.weight", "5.weight")),
    ],
)
def test_what_a_phase_trains(train: Any, names: tuple[str, ...]) -> None:
    run = private([dpk.Phase(train, epochs=1), TWO[1]], bound=0.1, lr=0.5)
    assert names_of(run.model) == list(names) == [e.name for e in run.engine._session.ledger.entries]
    before = values(run.model)
    epochs(run, 1)
    moved = [name for name, value in values(run.model).items() if not torch.equal(value, before[name])]
    assert moved == list(names)
    run.engine.next_phase()
    assert names_of(run.model) == list(BIASES)


def test_a_second_backward_clips_every_phase_flat() -> None:
    with pytest.raises(dpk.EngineError, match="clips flat only"):
        private([dpk.Phase("5.*", epochs=1), TWO[0]], clipping="per_layer", clipped_sum="second_backward")


class Tied(nn.Module):
    """One weight in two layers; samples [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x).tanh())[:, :3]


def test_a_tied_parameter_goes_by_each_of_its_names() -> None:
    torch.manual_seed(0)
    run = private([dpk.Phase("second.weight", epochs=1), dpk.Phase("biases", epochs=1)], model=Tied())
    assert names_of(run.model) == ["first.weight"]
    epochs(run, 1)
    run.engine.next_phase()
    assert names_of(run.model) == ["first.bias", "second.bias"]
    epochs(run, 1)


def test_a_later_phase_may_be_wider() -> None:
    run = private([dpk.Phase("biases", epochs=1), dpk.Phase("full", epochs=2, lr=0.1)], optimizer=optim.Adam)
    before = values(run.model)
    epochs(run, 1)
    assert all(torch.equal(values(run.model)[n], before[n]) for n in ALL if n not in BIASES)
    run.engine.next_phase()
    assert names_of(run.model) == list(ALL)
    epochs(run, 2)
    assert not any(torch.equal(values(run.model)[n], before[n]) for n in ALL)
    named = dict(run.model.named_parameters())
    assert {n: float(run.optimizer.state[p]["step"]) for n, p in named.items()} == {
        n: 3.0 if n in BIASES else 2.0 for n in ALL
    }


@pytest.mark.parametrize("clipping", ["flat", dpk.clipping.Flat(0.5)])
def test_a_bound_for_each_phase(clipping: Any) -> None:
    phases = [TWO[0], dpk.Phase("biases", epochs=1, lr=1.0, max_grad_norm=0.25)]
    if not isinstance(clipping, str):
        with pytest.raises(dpk.ClippingError, match=r"phases\[1\].*max_grad_norm=0.25"):
            private(phases, bound=0.5, clipping=clipping)
        return
    run = private(phases, bound=0.5, sigma=1.0, optimizer=optim.SGD)
    assert run.optimizer.max_grad_norm == 0.5
    run.engine.next_phase()
    assert run.optimizer.max_grad_norm == 0.25
    assert run.engine._session.ledger.plan.sensitivity == 0.25
    assert run.engine.privacy_statement()["max_grad_norm"] == 0.25


def groups(parameters: Any, lr: Any) -> optim.Optimizer:
    """Two, the second with a rate of its own."""
    return optim.Adam([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 2 * lr}], lr=lr)


@pytest.mark.parametrize("make", [optim.Adam, groups])
@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3)])
def test_rates(lr: Any, make: Any) -> None:
    phases = [dpk.Phase("full", epochs=1, lr=0.1), *(dpk.Phase("biases", epochs=1, lr=rate) for rate in (None, 0.7))]
    run = private(phases, optimizer=make, lr=lr)
    group = run.optimizer.param_groups[-1]
    seen = []
    for phase in range(3):
        if phase:
            run.engine.next_phase()
        seen.append(float(group["lr"]))
        epochs(run, 1)
    assert seen == pytest.approx([0.1, 0.1, 0.7]) and run.optimizer.param_groups[-1] is group
    assert make is groups or not isinstance(lr, Tensor) or group["lr"] is lr
    assert float(run.optimizer.param_groups[0]["lr"]) == pytest.approx(0.7)


def test_schedulers_go_on_and_new_ones_start_from_the_phase() -> None:
    run = private(TWO, optimizer=optim.Adam)
    scheduler = optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
    group = run.optimizer.param_groups[0]
    for x, y in itertools.chain(run.loader, run.loader):
        if step(run.model, run.optimizer, x, y):
            scheduler.step()
    assert group["lr"] == pytest.approx(TWO[0].lr / 4)
    run.engine.next_phase()
    assert group["lr"] == TWO[1].lr
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler that sees no step warns
        for x, y in run.loader:
            if step(run.model, run.optimizer, x, y):
                scheduler.step()
    assert group["lr"] == pytest.approx(TWO[1].lr / 2)
    other = optim.lr_scheduler.LambdaLR(run.optimizer, lambda count: 1.0 / (1 + count))
    assert other.base_lrs == [TWO[1].lr]


def test_a_scheduler_of_first_rates_goes_on_from_those() -> None:
    run = private(TWO, optimizer=optim.Adam)
    scheduler = optim.lr_scheduler.LambdaLR(run.optimizer, lambda count: 1.0 / (1 + count))
    run.engine.next_phase()
    epochs(run, 1)
    scheduler.step()
    assert run.optimizer.param_groups[0]["lr"] == TWO[0].lr / 2
