"""What a conversion did to each parameter, as data and as a readable table."""

from __future__ import annotations

import dataclasses
from typing import Any

NOT_A_BIAS = "not a bias"
_LISTED = 8  # names shown per group in the table; `frozen` and `to_dict()` hold all of them


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Every parameter of a converted model: trained, frozen with its reason, or another name of one of these.

    trained:      name -> number of elements; a tied parameter appears once.
    frozen:       name -> why it is not trained.
    tied:         further name -> the name under which `trained` or `frozen` lists the same parameter.
    groups:       trained name -> "Kind.parameter", such as "Linear.bias".
    sizes:        frozen name -> number of elements.
    layers:       kind -> number of converted modules (frozen BatchNorm included).
    partly:       trained name -> which of its elements stay as they are, and why; `trained` counts the others.
    added:        trained names of biases that conversion gave to layers without one.
    never_called: biased modules that `sample_batch` did not reach.
    one_by_one:   module -> class of those that are run one sample at a time, which is slow.
    total:        elements of all parameters, tied ones once.
    """

    trained: dict[str, int]
    frozen: dict[str, str]
    tied: dict[str, str]
    groups: dict[str, str]
    sizes: dict[str, int]
    layers: dict[str, int]
    partly: dict[str, str]
    added: tuple[str, ...]
    never_called: tuple[str, ...]
    one_by_one: dict[str, str]
    total: int

    @property
    def trained_elements(self) -> int:
        return sum(self.trained.values())

    @property
    def percent(self) -> float:
        """Share of the model's elements that is trained, in percent."""
        return 100.0 * self.trained_elements / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The whole report in plain containers, ready for JSON."""
        fields = dataclasses.asdict(self)
        return {**fields, "added": list(self.added), "never_called": list(self.never_called), "percent": self.percent}

    def __str__(self) -> str:
        lines = [
            f"{self.trained_elements:,} of {self.total:,} parameters are trained ({self.percent:.3g} %)",
            "",
            f"{'trained':<58}{'tensors':>9}{'elements':>15}",
        ]
        for group in sorted(set(self.groups.values())):
            names = [name for name in self.trained if self.groups[name] == group]
            lines.append(_row(group, names, self.trained))
        lines += ["", f"{'frozen, and why':<58}{'tensors':>9}{'elements':>15}"]
        for reason in sorted(set(self.frozen.values()), key=lambda text: (text != NOT_A_BIAS, text)):
            names = [name for name, why in self.frozen.items() if why == reason]
            lines.append(_row(reason, names, self.sizes))
            if reason != NOT_A_BIAS:
                lines += _listed(names)
        if self.partly:
            listed = _listed([f"{name}, {why}" for name, why in self.partly.items()])
            lines += ["", "trained in part", *listed]
        if self.added:
            lines += ["", "biases of zeros, given to layers that had none", *_listed(list(self.added))]
        if self.never_called:
            lines += ["", "modules with a bias that sample_batch never called", *_listed(list(self.never_called))]
        if self.one_by_one:
            listed = _listed([f"{name or 'the model itself'} ({kind})" for name, kind in self.one_by_one.items()])
            lines += [
                "",
                "run one sample at a time, which is slow: no rule covers the use of their parameters",
                *listed,
            ]
        if self.tied:
            lines += ["", "tied", *_listed([f"{alias} is {name}" for alias, name in self.tied.items()])]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.layers.items()))
        return "\n".join([*lines, "", f"converted modules: {kinds}"])


def _row(label: str, names: list[str], sizes: dict[str, int]) -> str:
    elements = sum(sizes[name] for name in names)
    return f"  {label:<56}{len(names):>9,}{elements:>15,}"


def _listed(names: list[str]) -> list[str]:
    more = len(names) - _LISTED
    return [f"    {name}" for name in names[:_LISTED]] + ([f"    ... and {more} more"] if more > 0 else [])
