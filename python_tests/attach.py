"""Small private models: conversion, optimizer, loader and engine in one call, shared by the tests of the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dp_bitfit_kernels as dpk


def small_model(seed: int = 0) -> nn.Module:
    """[B, 6] -> [B, 3], with an in-place activation behind a converted layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)
    )


class SequenceFirst(nn.Module):
    """Its inner layer's leading dimension is T, not B."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        return self.inner(x.transpose(0, 1)).mean(0)


def names_of(model: nn.Module) -> list[str]:
    """Names of the trained parameters."""
    return [n for n, p in model.named_parameters() if p.requires_grad]


def flat(model: nn.Module) -> Tensor:
    """The trained parameters as one vector [P]."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def attach(
    model: nn.Module,
    *data: Tensor,
    batch: int | None = None,
    engine: dpk.PrivacyEngine | None = None,
    optimizer: Any = torch.optim.SGD,
    lr: float = 1.0,
    sigma: float = 0.0,
    bound: float = 1.0,
    **options: Any,
) -> tuple[dpk.PrivacyEngine, nn.Module, Any, Any]:
    """An engine on a converted model -> (engine, model, optimizer, loader); batch: all records, unless given."""
    engine = engine or dpk.PrivacyEngine()
    loader = DataLoader(TensorDataset(*data), batch_size=batch or len(data[0]))
    if "sample_rate" in options:
        options.setdefault("expected_batch_size", float(batch or len(data[0])))
    return engine, *engine.make_private(
        module=model,
        optimizer=optimizer([p for p in model.parameters() if p.requires_grad], lr=lr),
        data_loader=loader,
        noise_multiplier=sigma,
        max_grad_norm=bound,
        **options,
    )


def private(
    model: nn.Module,
    n: int = 12,
    batch: int = 4,
    dims: tuple[int, ...] = (6,),
    head: tuple[str, ...] = (),
    **options: Any,
) -> tuple[dpk.PrivacyEngine, nn.Module, Any, Any]:
    """Convert the model and attach an engine, on n random records of shape ``dims`` in 3 classes."""
    dpk.convert_model(model, train_modules=head)
    torch.manual_seed(1)
    return attach(model, torch.randn(n, *dims), torch.randint(0, 3, (n,)), batch=batch, **options)
