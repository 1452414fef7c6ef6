"""The check that stands before every number: does the step do what it claims, on this model and this batch?

Oracle: one sample at a time, the whole model in float64, gradients clipped and added up in float64. A contender
runs one step of SGD without noise, and what the step changed in the parameters is compared with the oracle's update.

Tolerance (relative, L2 over all trained elements) is twice the error that PyTorch itself makes when it does the
oracle's work in float32 (at least 2^-20: one lucky order of additions says nothing about another), plus what reading an
update off a float32 parameter loses, plus, for ours, the integer grid: each clipped row is rounded to G = 2^20 steps of
R, which moves each element of the sum by at most B/2 steps (sqrt(B)/sqrt(12) as the roundings are spread), and clips at
G' = (G - sqrt(P)/2)(1 - 2^-16) instead of G; of weights, whose norm is an upper bound, a thousandth more. Rivals get
1e-4: Opacus divides by (norm + 1e-6).

The clipping norm is the median of the per-sample norms, so that half of the samples are clipped and half are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.models import Batch, Case
from bench.providers import Provider, Settings, _loss, freeze, is_bias

GRID = 2**20
RIVAL_TOLERANCE = 1e-4
LUCK = 2**-20
BOUND_COST = 1e-3  # what clipping a weight's gradient by an upper bound of its norm may take of it


class CheckFailed(AssertionError):
    """A contender's step is wrong: none of its numbers may be published."""


@dataclass(frozen=True)
class Oracle:
    """The update of one step by scope ("bias", "full"): the mean of clipped one-sample gradients."""

    clipped: dict[str, Tensor]  # scope -> float64 [P]
    summed: dict[str, Tensor]  # scope -> float64 [P], no clipping
    bound: dict[str, float]  # scope -> clipping norm R
    float32_error: dict[str, float]  # scope -> PyTorch's own relative error


def oracle(case: Case, batch: Batch, scopes: Sequence[str] = ("bias", "full")) -> Oracle:
    """One pass over the samples in float64, which sets the clipping norms, and one in float32 for PyTorch's error."""
    bound: dict[str, float] = {}
    exact = _by_sample(case, batch, torch.float64, scopes, bound)
    single = _by_sample(case, batch, torch.float32, scopes, bound)
    error = {scope: _relative(single[0][scope], exact[0][scope]) for scope in bound}
    return Oracle(exact[0], exact[1], bound, error)


def _by_sample(
    case: Case, batch: Batch, dtype: torch.dtype, scopes: Sequence[str], bound: dict[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(clipped mean, plain mean) by scope; sets `bound` from the norms where it is empty."""
    model = case.build().to(dtype)
    wanted = freeze(model, "full" if "full" in scopes else "bias")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    masks = {scope: [scope == "full" or is_bias(name) for name in names] for scope in scopes}
    criterion = nn.CrossEntropyLoss()

    def gradient(i: int) -> list[Tensor]:
        one = batch.sample(i).to(dtype)
        loss = _loss(criterion, case.logits(model, one), one.labels)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, wanted, strict=True)]

    def norms(grads: list[Tensor]) -> dict[str, float]:
        return {
            scope: math.sqrt(sum(float(g.double().square().sum()) for g, m in zip(grads, mask, strict=True) if m))
            for scope, mask in masks.items()
        }

    every = [gradient(i) for i in range(batch.size)]
    lengths = [norms(grads) for grads in every]
    if not bound:
        bound.update({scope: float(torch.tensor([n[scope] for n in lengths]).median()) for scope in masks})
    clipped, summed = {}, {}
    for scope, mask in masks.items():
        rows = [torch.cat([g.flatten() for g, m in zip(grads, mask, strict=True) if m]) for grads in every]
        factors = [min(1.0, bound[scope] / n[scope]) for n in lengths]
        clipped[scope] = torch.zeros(len(rows[0]), dtype=torch.float64)
        summed[scope] = torch.zeros_like(clipped[scope])
        for factor, row in zip(factors, rows, strict=True):
            clipped[scope] += row.double() * (factor / batch.size)
            summed[scope] += row.double() / batch.size
    return clipped, summed


def check(provider: Provider, case: Case, batch: Batch, expected: Oracle) -> float:
    """Run one noiseless step of the contender; returns its relative error or raises CheckFailed."""
    scope = provider.scope
    bound = expected.bound[scope]
    step = provider.build(case, batch, Settings(noise_multiplier=0.0, max_grad_norm=bound, learning_rate=1.0))
    before = {name: value.detach().clone() for name, value in step.module.named_parameters()}
    step()
    after = dict(step.module.named_parameters())
    if list(before) != [name for name, _ in case.build().named_parameters()]:
        raise CheckFailed(f"{provider.name} on {case.name}: parameters were renamed or lost")

    trained = [name for name in before if scope == "full" or is_bias(name)]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if astray := sorted(moved.difference(trained)):
        raise CheckFailed(f"{provider.name} on {case.name} trained {astray}, which should be frozen")
    update = torch.cat([(before[name].double() - after[name].detach().double()).flatten() for name in trained])
    right = expected.clipped[scope] if provider.private else expected.summed[scope]
    parameters = torch.cat([before[name].flatten() for name in trained])
    error = _relative(update, right)
    allowed = 2 * max(expected.float32_error[scope], LUCK) + 2**-24 * float(parameters.norm()) / float(right.norm())
    if provider.name.startswith("ours"):
        allowed += grid_error(len(update), batch.size, bound, float(right.norm()))
        if scope == "full":
            allowed += BOUND_COST
    elif provider.private:
        allowed += RIVAL_TOLERANCE
    if not error <= allowed:
        raise CheckFailed(f"{provider.name} on {case.name}: relative error {error:.2e}, allowed {allowed:.2e}")
    return error


def grid_error(elements: int, batch: int, bound: float, length: float) -> float:
    """Relative L2 error that the integer grid may add to a mean of `batch` clipped rows of `elements` elements."""
    rounding = 2 * math.sqrt(elements * batch / 12) * bound / GRID / batch / length
    shrinkage = 1 - (GRID - math.sqrt(elements) / 2) * (1 - 2**-16) / GRID
    return rounding + shrinkage


def _relative(value: Tensor, right: Tensor) -> float:
    return float((value.double() - right).norm() / right.norm())
