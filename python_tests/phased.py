"""Private runs in phases, of a small model whose parameters are all trained by one phase or another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from attach import names_of, small_model
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

import dp_bitfit_kernels as dpk

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn((12, 6), generator=GENERATOR), torch.randint(0, 3, (12,), generator=GENERATOR)

TWO = [dpk.Phase("full", epochs=2, lr=0.01), dpk.Phase("biases", epochs=3, lr=0.05)]
MIX = ("biases", "5.*")

ALL = ("0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias", "5.weight", "5.bias")
BIASES = tuple(name for name in ALL if name.endswith("bias"))


class OwnAdam(optim.Adam):
    """Not known to work element by element: parameters are updated one by one."""


@dataclass
class Run:
    engine: dpk.PrivacyEngine
    model: nn.Module
    optimizer: Any
    loader: Any


def private(
    phases: Sequence[Any] | None,
    *,
    model: nn.Module | None = None,
    modules: tuple[str, ...] | None = ("*",),
    engine: dpk.PrivacyEngine | None = None,
    optimizer: Any = optim.SGD,
    lr: Any = 0.1,
    sigma: float = 0.0,
    epsilon: float | None = None,
    delta: float = 1e-3,
    bound: float = 1.0,
    rate: float = 1.0,
    **options: Any,
) -> Run:
    """An engine on ``model``, converted to train ``modules`` whole (None: it is converted), with these phases.

    rate: of sampling; an epoch has 1 / rate releases. epsilon: to calibrate for, in place of sigma.
    """
    model = small_model() if model is None else model
    if modules is not None:
        dpk.convert_model(model, train_modules=modules)
    engine = engine or dpk.PrivacyEngine()
    shared = {
        "module": model,
        "optimizer": optimizer([p for p in model.parameters() if p.requires_grad], lr=lr),
        "data_loader": DataLoader(TensorDataset(X, Y), batch_size=len(X)),
        "max_grad_norm": bound,
        "sample_rate": rate,
        "expected_batch_size": 12.0 * rate,
        "phases": phases,
        **options,
    }
    if epsilon is None:
        return Run(engine, *engine.make_private(noise_multiplier=sigma, **shared))
    return Run(engine, *engine.make_private_with_epsilon(target_epsilon=epsilon, target_delta=delta, **shared))


def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> bool:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return bool(optimizer.step())


def epochs(run: Run, count: int) -> None:
    for _ in range(count):
        for x, y in run.loader:
            step(run.model, run.optimizer, x, y)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def snapshot(run: Run) -> tuple[Any, ...]:
    session = run.engine._session
    trained = [(m.trained, m.attachment) for m in session.ledger.layers]
    state = copy.deepcopy(run.optimizer.state_dict())
    session_facts = (session, session.ended, session.releases, session.noise_steps, run.optimizer.session)
    return names_of(run.model), trained, state, session_facts, run.engine.phase, run.engine.privacy_statement()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
