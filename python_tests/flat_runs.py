"""Private runs whose update is of one tensor, or parameter by parameter; shared by the tests of the flat update."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from attach import attach, small_model
from torch import Tensor, nn, optim

import dp_bitfit_kernels as dpk

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
