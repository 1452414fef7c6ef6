"""Clipping methods, and the integer grid on which their sensitivity holds exactly.

The engine lays a plan over the trained elements, the op ``clip_factors`` turns norms into factors, the op
``clipped_sum_`` rounds and sums. Whatever the method, one sample contributes an integer vector of norm at most
``GRID``, which stands for the method's ``sensitivity``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ._validate import ClippingError

GRID = 2**20
# Room for every rounding before the integer one: float32 norms of long rows, float64 products.
_MARGIN = 1.0 - 2.0**-16

Groups = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class ClipPlan:
    """Arguments of ``clip_factors`` for one set of trained elements; L groups.

    ``offsets`` L + 1 column bounds; ``bounds`` L norms R_l below which nothing is clipped; ``grid`` L values
    G'_l; ``gamma`` the stabiliser of automatic clipping, else None; ``factor_fn`` the user's function, else
    None; ``sensitivity`` in the units of the gradient, of which ``GRID`` is the integer image.
    """

    offsets: list[int]
    bounds: list[float]
    grid: list[float]
    gamma: float | None
    factor_fn: Callable[[Tensor], Tensor] | None
    sensitivity: float
    names: list[str]


@runtime_checkable
class ClippingMethod(Protocol):
    """What the engine asks of a clipping method."""

    @property
    def name(self) -> str: ...

    @property
    def sensitivity(self) -> float: ...

    def plan(self, groups: Groups) -> ClipPlan: ...


def shrunk_grid(grid: float, elements: int) -> float:
    """G' = (G - sqrt(P) / 2)(1 - 2^-16) for P elements.

    Guarantee: a real row of P elements with norm at most G' has, rounded element by element to the nearest
    integer, norm at most G: rounding moves each element by at most 1/2, the row by at most sqrt(P) / 2.
    """
    room = grid - math.sqrt(elements) / 2.0
    if room <= grid / 2.0:
        raise ClippingError(
            f"{elements} trained elements leave the integer grid of {grid:.0f} too coarse: train fewer parameters"
        )
    return room * _MARGIN


def _positive(name: str, value: float) -> float:
    value = float(value)
    # Far outside this range squares of bounds or factors would leave float64.
    if not 1e-100 <= value <= 1e100:
        raise ClippingError(f"{name} must lie between 1e-100 and 1e100, got {value}")
    return value


def _elements(groups: Groups) -> list[int]:
    if not groups:
        raise ClippingError("there is nothing to clip: no parameter is trained")
    for name, size in groups:
        if size < 0:
            raise ClippingError(f"group {name!r} has a negative number of elements ({size})")
    return [size for _, size in groups]


def _single_group(method: ClippingMethod, groups: Groups, gamma: float | None = None) -> ClipPlan:
    total = sum(_elements(groups))
    return ClipPlan(
        offsets=[0, total],
        bounds=[method.sensitivity],
        grid=[shrunk_grid(GRID, total)],
        gamma=gamma,
        factor_fn=None,
        sensitivity=method.sensitivity,
        names=["all"],
    )


@dataclass(frozen=True)
class Flat:
    """Abadi et al. 2016: g * min(1, R / |g|), |g| over all trained elements.

    Guarantee: one sample changes the sum by at most R = ``max_grad_norm`` in l2 norm (sensitivity R).
    """

    max_grad_norm: float

    def __post_init__(self) -> None:
        _positive("max_grad_norm", self.max_grad_norm)

    @property
    def name(self) -> str:
        return "flat"

    @property
    def sensitivity(self) -> float:
        return float(self.max_grad_norm)

    def plan(self, groups: Groups) -> ClipPlan:
        return _single_group(self, groups)


@dataclass(frozen=True)
class Automatic:
    """AUTO-S, Bu et al. 2206.07136: R g / (|g| + gamma), every sample brought to almost the same norm.

    Guarantee: one sample changes the sum by less than R = ``max_grad_norm`` (sensitivity R, not 1: R is part
    of the factor, and the noise is in the same units).
    """

    max_grad_norm: float
    gamma: float = 0.01

    def __post_init__(self) -> None:
        _positive("max_grad_norm", self.max_grad_norm)
        _positive("gamma", self.gamma)

    @property
    def name(self) -> str:
        return "automatic"

    @property
    def sensitivity(self) -> float:
        return float(self.max_grad_norm)

    def plan(self, groups: Groups) -> ClipPlan:
        return _single_group(self, groups, gamma=float(self.gamma))


@dataclass(frozen=True)
class PerLayer:
    """Each layer clipped to its own bound R_l; by default R_l = R / sqrt(L), else ``bounds`` in ledger order.

    Guarantee: sum R_l^2 = R^2 (checked to 1e-6), so one sample changes the sum of all layers together by at
    most R = ``max_grad_norm`` (sensitivity R). Layer l has G R_l / R of the integer grid and its own allowance
    for rounding; the layers' integer norms together are at most G.
    """

    max_grad_norm: float
    bounds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        bound = _positive("max_grad_norm", self.max_grad_norm)
        if self.bounds is not None:
            values = tuple(_positive("a per-layer bound", value) for value in self.bounds)
            total = math.sqrt(math.fsum((value / bound) ** 2 for value in values)) * bound
            if not math.isclose(total, bound, rel_tol=1e-6):
                raise ClippingError(
                    f"the per-layer bounds have sqrt(sum R_l^2) = {total:.9g}, but max_grad_norm is {bound:.9g}: "
                    "scale the bounds, or set max_grad_norm to their root sum of squares"
                )
            object.__setattr__(self, "bounds", values)

    @property
    def name(self) -> str:
        return "per_layer"

    @property
    def sensitivity(self) -> float:
        return float(self.max_grad_norm)

    def plan(self, groups: Groups) -> ClipPlan:
        sizes = _elements(groups)
        if self.bounds is None:
            shares = [1.0 / math.sqrt(len(sizes))] * len(sizes)
        elif len(self.bounds) != len(sizes):
            raise ClippingError(
                f"{len(self.bounds)} per-layer bounds were given for {len(sizes)} trained layers: "
                + ", ".join(name for name, _ in groups)
            )
        else:
            # Normalised, so that the shares' squares add up to 1 whatever the 1e-6 above let through.
            total = math.sqrt(math.fsum((value / self.sensitivity) ** 2 for value in self.bounds))
            shares = [value / self.sensitivity / total for value in self.bounds]
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + size)
        return ClipPlan(
            offsets=offsets,
            bounds=[self.sensitivity * share for share in shares],
            grid=[shrunk_grid(GRID * share, size) for share, size in zip(shares, sizes, strict=True)],
            gamma=None,
            factor_fn=None,
            sensitivity=self.sensitivity,
            names=[name for name, _ in groups],
        )


@dataclass(frozen=True)
class Custom:
    """The user's factor C(|g|), cut at R / |g|: g * min(C(|g|), R / |g|).

    ``fn`` takes norms [B] (float64) and returns factors [B]. It must treat each sample on its own: a factor that
    depends on another sample's norm has no bounded sensitivity, and no code can see that from outside.

    Guarantee, for such a function: sensitivity R = ``max_grad_norm`` whatever C returns; NaN, infinite and
    negative values count as 0.
    """

    fn: Callable[[Tensor], Tensor]
    max_grad_norm: float

    def __post_init__(self) -> None:
        _positive("max_grad_norm", self.max_grad_norm)
        if not callable(self.fn):
            raise ClippingError(f"the clip function must be callable, got {type(self.fn).__name__}")

    @property
    def name(self) -> str:
        return "custom"

    @property
    def sensitivity(self) -> float:
        return float(self.max_grad_norm)

    def plan(self, groups: Groups) -> ClipPlan:
        flat = _single_group(self, groups)
        return ClipPlan(flat.offsets, flat.bounds, flat.grid, None, self.fn, flat.sensitivity, flat.names)


_BY_NAME: dict[str, Callable[[float], ClippingMethod]] = {
    "flat": Flat,
    "automatic": Automatic,
    "per_layer": PerLayer,
}


def resolve(clipping: str | ClippingMethod, max_grad_norm: float) -> ClippingMethod:
    """The method that ``clipping`` names, with bound ``max_grad_norm``; a method object must agree with it."""
    if isinstance(clipping, str):
        if clipping not in _BY_NAME:
            raise ClippingError(
                f"clipping={clipping!r} is not known: use one of {', '.join(map(repr, _BY_NAME))}, or an object of "
                "dp_bitfit_kernels.clipping"
            )
        return _BY_NAME[clipping](_positive("max_grad_norm", max_grad_norm))
    if isinstance(clipping, type) or not isinstance(clipping, ClippingMethod):
        raise ClippingError(f"clipping must be a name or an object of dp_bitfit_kernels.clipping, got {clipping!r}")
    if not math.isclose(clipping.sensitivity, max_grad_norm, rel_tol=1e-12):
        raise ClippingError(
            f"clipping has max_grad_norm={clipping.sensitivity:.9g}, but max_grad_norm={max_grad_norm:.9g} was asked "
            "for: pass the same number"
        )
    return clipping


def custom_factors(plan: ClipPlan, norms: Tensor, mask: Tensor, scale: float) -> Tensor:
    """min(C(|g|), R / |g|) * G' / R * scale -> [B, 1] float64, in place of the flat factors.

    ``norms`` [B, 1] float64 as ``clip_factors`` reports them, ``mask`` [B] bool. Guarantee: as in ``Custom``; a
    masked row and a row whose norm or C is not finite get exactly 0, selected and never multiplied.
    """
    if plan.factor_fn is None:
        raise ClippingError("this clipping method has no function of the user's")
    values = plan.factor_fn(norms[:, 0].clone())  # a clone: the function may work in place
    if not isinstance(values, Tensor) or values.shape != mask.shape:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ClippingError(f"the clip function must return a tensor [{mask.shape[0]}], got {shape}")
    values = values.detach().to(device=norms.device, dtype=torch.float64).unsqueeze(1)  # [B, 1]
    keep = mask.unsqueeze(1) & norms.isfinite() & values.isfinite()
    # R / 0 is infinite, and the minimum is then C, which moves a row of zeros nowhere.
    factors = torch.minimum(values.clamp(min=0.0), plan.sensitivity / norms) * (plan.grid[0] / plan.sensitivity * scale)
    return torch.where(keep & factors.isfinite(), factors, 0.0)
