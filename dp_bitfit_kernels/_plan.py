"""What the engine works out before it attaches (groups, sample rate, steps) or resumes (does the checkpoint fit)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ._validate import AccountingError, CheckpointError, EngineError, SamplingError
from .entries import Entry
from .sampling import loader_facts


def groups(entries: Sequence[Entry]) -> list[tuple[str, int]]:
    """(layer, elements) of neighbouring trained parameters of one layer, in the order of ``named_parameters``."""
    groups: list[tuple[str, int]] = []
    for entry in sorted(entries, key=lambda entry: entry.place):
        layer = entry.name.rpartition(".")[0] or entry.name
        if groups and groups[-1][0] == layer:
            groups[-1] = (layer, groups[-1][1] + entry.stop - entry.start)
        else:
            groups.append((layer, entry.stop - entry.start))
    return groups


def plan_sampling(loader: DataLoader[Any], sample_rate: float | None, poisson: bool) -> tuple[float, int, int | None]:
    """(q that a step is charged at, releases an epoch, n where the privacy statement declares it public).

    A given ``sample_rate`` decides both numbers alone: the length of the data set is then read only to sample from it.
    """
    if not poisson:
        if sample_rate is not None:
            raise SamplingError("sample_rate has no meaning with poisson_sampling=False: such steps are charged at 1")
        return 1.0, loader_facts(loader).steps, None
    if sample_rate is None:
        facts = loader_facts(loader)
        return facts.sample_rate, facts.steps, facts.n
    if not 0 < _number(sample_rate) <= 1:
        raise SamplingError(f"sample_rate={sample_rate!r} must lie in (0, 1]")
    # ceil(1/q), forgiving the last bits of a q such as 1/49 that is not a float.
    return float(sample_rate), max(1, math.ceil((1.0 - 1e-12) / sample_rate)), None


def plan_divisor(loader: DataLoader[Any], sample_rate: float | None, expected_batch_size: float | None) -> float:
    """What a draw's sum is divided by: the expected batch size."""
    if expected_batch_size is None:
        if sample_rate is not None:
            raise EngineError(
                f"sample_rate={sample_rate!r} needs expected_batch_size= beside it: the sum is divided by it, and the "
                "loader's batch size belongs to another rate"
            )
        expected_batch_size = float(loader_facts(loader).batch_size)
    if not 0 < _number(expected_batch_size) < math.inf:
        raise EngineError(f"expected_batch_size={expected_batch_size!r} must be finite and > 0")
    return float(expected_batch_size)


def _number(value: Any) -> float:
    """The value, or NaN, which lies in no range, where it is no number."""
    return value if isinstance(value, int | float) else math.nan


def whole_epochs(epochs: Any) -> int:
    if not isinstance(epochs, int) or epochs < 1:
        raise AccountingError(f"epochs={epochs!r} must be a whole number >= 1")
    return epochs


def check_delta(delta: float, size: int | None) -> None:
    if not 0 < delta < 1:
        raise AccountingError(f"delta={delta!r} must lie in (0, 1)")
    if size is not None and delta >= 1 / size:
        warnings.warn(
            f"delta={delta:g} is not below 1/n = {1 / size:g}: publishing a random record would satisfy it",
            stacklevel=3,
        )


def check_fit(
    path: str, data: dict[str, Any], parameters: Mapping[str, Tensor], optimizer: str, objects: Iterable[str]
) -> None:
    """Refuse a checkpoint of other parameters, of another optimizer, or without a state that is asked for."""
    mine = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if {k: tuple(v.shape) for k, v in data["parameters"].items()} != mine:
        raise CheckpointError(f"{path!r} holds other parameters than this model trains; nothing was changed")
    if data.get("optimizer_class", optimizer) != optimizer:
        raise CheckpointError(
            f"{path!r} holds the state of {data['optimizer_class']}, not of {optimizer}; nothing was changed"
        )
    unknown = [k for k in objects if k not in data["objects"]]
    if unknown:
        raise CheckpointError(f"{path!r} holds no state named {unknown[0]!r}; nothing was changed")


def warn_of_earlier_training(entries: Sequence[Entry], optimizer: Optimizer, charged: int) -> None:
    """What was learnt before this engine, and is in none of its charges."""
    if not charged and any(layer.trained_before for entry in entries for layer, _ in entry.layers):
        warnings.warn(
            "these parameters were trained by another engine before: what that spent is not in this engine's epsilon. "
            "Go on with the same engine, or with PrivacyEngine(history=...) of the same file",
            stacklevel=3,
        )
    if not charged and any(float(state.get("step", 1)) > 0 for state in optimizer.state.values()):
        warnings.warn(
            "the optimizer holds state of earlier steps (momentum): if those saw private data, that is in no epsilon "
            "of this engine; a new optimizer starts clean",
            stacklevel=3,
        )


def warn_of_weaker_noise(asked: float, saved: float) -> None:
    if saved < asked * (1.0 - 1e-9):
        warnings.warn(
            f"the checkpoint's noise multiplier, {saved:.6g}, replaces the {asked:.6g} of this make_private: a target "
            "epsilon given to it does not hold",
            stacklevel=4,
        )


def warn_of_lost(releases: int) -> None:
    if releases > 0:
        warnings.warn(
            f"the history holds {releases} release(s) that this checkpoint does not: they stay charged, and repeating "
            "them costs again, so that epsilon will exceed a target that this run was calibrated for",
            stacklevel=4,
        )


def json_number(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def check_noise_multiplier(value: float) -> None:
    """Finite, not negative, and small enough for float64 to hold the noise on the integer grid."""
    if not 0 <= value <= 2.0**20:
        raise EngineError(f"noise_multiplier={value!r} must lie in [0, 2^20]")
