"""One training step of each contender, all on the same model, batch and optimizer.

The timed region is the same for all: zero_grad, forward, loss, backward, optimizer.step. Opacus' ghost mode runs its
two backward passes inside loss.backward(). Data loading is outside: every contender is fed the same batch again.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.models import Batch, Case


@dataclass(frozen=True)
class Settings:
    """What one step does; the same for every contender."""

    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    learning_rate: float = 1e-3
    optimizer: str = "sgd"  # "sgd" | "adam"; plain SGD adds least of its own, so it hides least

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        return kinds[self.optimizer](parameters, lr=self.learning_rate)


@dataclass
class Step:
    """A contender ready to run: call it for one step."""

    module: nn.Module  # the user's model, parameter names as in the plain one
    run: Callable[[], None]

    def __call__(self) -> None:
        self.run()


@dataclass(frozen=True)
class Provider:
    name: str
    label: str
    scope: str  # "bias" | "full": what it trains
    private: bool
    build: Callable[[Case, Batch, Settings], Step]


def is_bias(name: str) -> bool:
    """A bias by the name of the parameter itself: `bias`, as in every layer of the benchmarked models."""
    return name.rpartition(".")[2] == "bias"


def freeze(model: nn.Module, scope: str) -> list[nn.Parameter]:
    """Leave exactly the biases (or, for "full", everything) trainable; returns those parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(scope == "full" or is_bias(name))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _loader(batch: Batch) -> DataLoader[int]:
    """A loader for the engines to read batch size and n from (q = 1/100); no batch is ever drawn from it."""
    return DataLoader(range(100 * batch.size), batch_size=batch.size)  # type: ignore[arg-type]


def _loss(criterion: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    if logits.dim() == 2:
        return criterion(logits, labels)
    return criterion(logits.flatten(0, 1), labels.flatten())


def _plain(scope: str) -> Callable[[Case, Batch, Settings], Step]:
    def build(case: Case, batch: Batch, settings: Settings) -> Step:
        model = case.build()
        optimizer = settings.make(freeze(model, scope))
        criterion = nn.CrossEntropyLoss()

        def run() -> None:
            optimizer.zero_grad()
            _loss(criterion, case.logits(model, batch), batch.labels).backward()
            optimizer.step()

        return Step(model, run)

    return build


def _ours(scope: str, **options: str) -> Callable[[Case, Batch, Settings], Step]:
    def build(case: Case, batch: Batch, settings: Settings) -> Step:
        import dp_bitfit_kernels as dpk

        model = dpk.convert_model(case.build(), train_modules=("*",) if scope == "full" else ())
        optimizer = settings.make([parameter for parameter in model.parameters() if parameter.requires_grad])
        engine = dpk.PrivacyEngine()
        warnings.filterwarnings("ignore", message="clipped_sum='second_backward'")  # it is there to be compared with
        module, private, _ = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=_loader(batch),
            noise_multiplier=settings.noise_multiplier,
            max_grad_norm=settings.max_grad_norm,
            **options,
        )
        criterion = nn.CrossEntropyLoss()
        # Meant: the fixed batch of a bench is no Poisson sample. What is charged costs the same either way.
        warnings.filterwarnings("ignore", message="this batch does not come from the private loader")

        def run() -> None:
            with engine.batch(batch.size):
                private.zero_grad()
                _loss(criterion, case.logits(module, batch), batch.labels).backward()
                private.step()

        return Step(model, run)

    return build


def _opacus(scope: str, mode: str) -> Callable[[Case, Batch, Settings], Step]:
    def build(case: Case, batch: Batch, settings: Settings) -> Step:
        from opacus import PrivacyEngine

        model = case.build()
        optimizer = settings.make(freeze(model, scope))
        criterion: Callable[..., Tensor] = nn.CrossEntropyLoss()
        # True and harmless for a first layer whose input needs no gradient; it would be printed at every site.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        with warnings.catch_warnings(), _quiet("opacus"):
            warnings.simplefilter("ignore")  # "secure RNG turned off": what Opacus does by default is what we time
            made = PrivacyEngine().make_private(
                module=model,
                optimizer=optimizer,
                criterion=criterion,
                data_loader=_loader(batch),
                noise_multiplier=settings.noise_multiplier,
                max_grad_norm=settings.max_grad_norm,
                poisson_sampling=False,
                grad_sample_mode=mode,
            )
        module, private = made[0], made[1]
        if mode == "ghost":
            criterion = made[2]

        def run() -> None:
            private.zero_grad()
            logits = case.logits(module, batch)
            if mode == "ghost" and logits.dim() == 3:
                loss = criterion(logits.flatten(0, 1), batch.labels.flatten(), shape=logits.shape)
            else:
                loss = _loss(criterion, logits, batch.labels)
            loss.backward()
            private.step()

        return Step(model, run)

    return build


class _quiet(AbstractContextManager[None]):
    """Hold a logger's notices back while a rival is set up."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        self.logger.setLevel(self.level)


_SECOND = {"clipped_sum": "second_backward"}
BASELINE = "plain_bias"
CONTROL = "control"
OURS = "ours"

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(OURS, "ours, private", "bias", True, _ours("bias")),
        Provider(BASELINE, "autograd, not private", "bias", False, _plain("bias")),
        # The baseline built once more: its ratio is what this machine and this method make of no difference at all.
        Provider(CONTROL, "autograd again (control)", "bias", False, _plain("bias")),
        Provider("opacus_hooks_bias", "Opacus hooks", "bias", True, _opacus("bias", "hooks")),
        Provider("opacus_ghost_bias", "Opacus ghost", "bias", True, _opacus("bias", "ghost")),
        Provider("ours_full", "ours, private, all weights", "full", True, _ours("full")),
        *(
            Provider(f"ours_{name}", f"{label}, by ours", "full", True, _ours("full", **how))
            for name, label, how in (
                ("instantiated", "rows kept", {"per_sample_norm": "instantiate"}),
                ("fastgradclip", "FastGradClip", {"per_sample_norm": "instantiate", **_SECOND}),
                ("ghostclip", "GhostClip", {"per_sample_norm": "ghost", **_SECOND}),
                ("mixghostclip", "MixGhostClip", {"per_sample_norm": "mixed", **_SECOND}),
            )
        ),
        Provider("plain_full", "autograd, not private, all weights", "full", False, _plain("full")),
        Provider("opacus_hooks_full", "Opacus hooks, all weights", "full", True, _opacus("full", "hooks")),
        Provider("opacus_ghost_full", "Opacus ghost, all weights", "full", True, _opacus("full", "ghost")),
    )
}
