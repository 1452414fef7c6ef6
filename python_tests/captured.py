"""Training runs of small models, eager and captured, shared by the tests of the captured step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from attach import attach, flat, small_model
from torch import Tensor, nn, optim

import dp_bitfit_kernels as dpk

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn((40, 6), generator=GENERATOR), torch.randint(0, 3, (40,), generator=GENERATOR)
PADDED: dict[str, Any] = {"batch": 8, "max_physical_batch_size": 4, "pad_physical_batches": True}


class Dropped(nn.Module):
    """A dropout whose masks must be fresh at each replay, and a buffer that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.dropout(x + self.shift, 0.5, self.training))


class Training:
    """One private run of a given kind: ``eager``, or the captured step."""

    def __init__(self, captured: bool, model: Any = small_model, optimizer: Any = optim.AdamW, **options: Any):
        torch.manual_seed(0)
        self.model = dpk.convert_model(model(), train_modules=("*5",))
        self.engine, _, self.optimizer, self.loader = attach(
            self.model,
            X,
            Y,
            **{
                "engine": dpk.PrivacyEngine(unsafe_deterministic_seed=1),
                "optimizer": optimizer,
                "lr": 0.1,
                "sigma": 1.0,
                **PADDED,
                **options,
            },
        )
        self.step = dpk.capture_step(self.optimizer, self.loss) if captured else None
        self.losses: list[float] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def __call__(self, x: Tensor, y: Tensor) -> bool:
        if self.step is not None:
            released = self.step(x, y)
            assert self.step.loss is not None
            self.losses.append(float(self.step.loss))
            return released
        loss = self.loss(x, y)
        loss.backward()
        self.losses.append(float(loss.detach()))
        return bool(self.optimizer.step())

    def epochs(self, count: int = 1) -> Training:
        for _ in range(count):
            for x, y in self.loader:
                self(x, y)
        return self

    @property
    def outcome(self) -> tuple[Any, ...]:
        history = [(s.count, s.noise_multiplier, s.sample_rate) for s in self.engine.accountant.history.segments]
        return flat(self.model).tolist(), self.losses, history, self.engine._session.noise_steps


def both(**options: Any) -> Iterator[Training]:
    for captured in (False, True):
        yield Training(captured, **options)
