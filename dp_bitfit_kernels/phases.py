"""Training in phases: all parameters first, then the biases, say (X+BiTFiT of Bu et al., arXiv 2210.00036).

One model, one optimizer, one accountant and one noise multiplier; each phase trains a part of what ``convert_model``
left trainable, with rows, a sum and clipping groups of its own.
"""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ._plan import groups
from ._selection import what_is
from ._validate import ClippingError, EngineError
from .clipping import ClippingMethod, resolve
from .entries import Entry, find_entries, grouped
from .layers import BiasLayer

if TYPE_CHECKING:
    from .optimizer import PrivateOptimizer
    from .session import Session

_WORDS = ("full", "biases")


@dataclass(frozen=True)
class Phase:
    """One phase of a private run, for ``make_private(phases=[...])`` and ``make_private_with_epsilon``.

    Nothing is checked before it is given to an engine, which names the phase at fault by its place.

    Args:
        train: ``"full"``, all that ``convert_model`` left trainable; ``"biases"``, the biases among it; or a tuple of
            these words and of fnmatch patterns of parameter names, such as ``("biases", "classifier.*")``. A leading
            "!" excludes, wherever it stands; only exclusions means all but these.
        epochs: passes over the data, a whole number >= 1.
        lr: learning rate of all parameter groups from the beginning of the phase; None keeps what they have.
        max_grad_norm: R of this phase; None takes that of the engine.
    """

    train: str | tuple[str, ...]
    epochs: int = field(kw_only=True)
    lr: float | None = field(default=None, kw_only=True)
    max_grad_norm: float | None = field(default=None, kw_only=True)

    @property
    def words(self) -> tuple[str, ...]:
        """``train`` as a tuple."""
        return (self.train,) if isinstance(self.train, str) else tuple(self.train)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return {
            "train": list(self.words),
            "epochs": self.epochs,
            "lr": None if self.lr is None else float(self.lr),
            "max_grad_norm": None if self.max_grad_norm is None else float(self.max_grad_norm),
        }


def total_epochs(phases: Sequence[Phase]) -> int:
    """Epochs of all phases together.

    Raises:
        EngineError: naming the phase whose numbers or words are out of range.
    """
    if isinstance(phases, Phase) or not isinstance(phases, Sequence) or not phases:
        raise EngineError(f"phases={phases!r} must be a list of at least one dpk.Phase")
    for number, phase in enumerate(phases):
        if not isinstance(phase, Phase):
            raise EngineError(f"phases[{number}] must be a dpk.Phase, got {phase!r}")
        if isinstance(phase.epochs, bool) or not isinstance(phase.epochs, int) or phase.epochs < 1:
            raise EngineError(f"phases[{number}]: epochs={phase.epochs!r} must be a whole number >= 1")
        for name, value in (("lr", phase.lr), ("max_grad_norm", phase.max_grad_norm)):
            if value is not None and not _positive(value):
                raise EngineError(f"phases[{number}]: {name}={value!r} must be a finite number > 0, or None")
        words = phase.train if isinstance(phase.train, (str, tuple, list)) else (None,)
        if not words or not all(isinstance(word, str) and word.lstrip("!") for word in words):
            raise EngineError(
                f"phases[{number}]: train={phase.train!r} must be 'full', 'biases', or a tuple of these and of patterns"
            )
    return sum(phase.epochs for phase in phases)


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max


class Course:
    """The phases of one attachment: what each trains, which one runs, what was released in those before.

    Guarantees:
        Making one leaves the model as it was, and finds every fault of every phase that can be known beforehand.
        A phase trains exactly what it chooses of what was trainable when the course was made.
        Entering one drops the rows and the sum of the phase before, whoever holds a graph of them, and the optimizer's
        state of what is no longer trained; that of what stays trained is kept. An error leaves all as it was.

    Attributes:
        index: of the running phase.
        most_groups: that any phase clips apart.
        releases: made in each phase; of the running one, those before the last change of phases or resume.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        model: nn.Module,
        clipping: str | ClippingMethod,
        max_grad_norm: float,
        steps: int,
        norm: str = "mixed",
    ):
        total_epochs(phases)
        if any(m.attachment is not None for m in model.modules() if isinstance(m, BiasLayer)):
            raise EngineError("this model already has a PrivacyEngine attached: call its detach() first")
        self.phases, self._model, self._norm = tuple(phases), model, norm
        self.planned = [phase.epochs * steps for phase in phases]  # releases of each
        self.index, self.releases, self.most_groups = 0, [0] * len(self.phases), 0
        self._entries = find_entries(model, norm)  # of all that is trainable
        self._layers = [(m, m.trained) for m in model.modules() if isinstance(m, BiasLayer) and m.trained]
        meanings = _Meanings(model, self._entries)
        self._chosen = [meanings.chosen(phase.words, self.label(number)) for number, phase in enumerate(phases)]
        self.methods = [self._method(number, clipping, max_grad_norm) for number in range(len(phases))]
        try:
            for number, method in enumerate(self.methods):
                self._planned_in(number, method)
        finally:
            self.restore()

    def label(self, number: int) -> str:
        phase = self.phases[number]
        return f"phases[{number}] (train={phase.train!r})"

    def _method(self, number: int, clipping: str | ClippingMethod, max_grad_norm: float) -> ClippingMethod:
        own = self.phases[number].max_grad_norm
        if own is None:
            return resolve(clipping, max_grad_norm)
        try:
            return resolve(clipping, own)
        except ClippingError as error:
            raise ClippingError(f"{self.label(number)}: {error}") from error

    def _planned_in(self, number: int, method: ClippingMethod) -> None:
        try:
            entries = self.entries(number)
            plan = method.plan(groups(entries))
            grouped(entries, plan)
            self.most_groups = max(self.most_groups, len(plan.bounds))
        except ClippingError as error:
            raise ClippingError(f"{self.label(number)}: {error}") from error

    @property
    def last(self) -> bool:
        """Whether no phase follows the running one."""
        return self.index + 1 == len(self.phases)

    def trained(self, until: int) -> dict[str, nn.Parameter]:
        """What the phases 0 to ``until`` train, by name."""
        chosen = frozenset().union(*self._chosen[: until + 1])
        return {entry.name: entry.parameter for entry in self._entries if id(entry.parameter) in chosen}

    def ever(self) -> list[Entry]:
        """What any phase trains, as entries of the whole."""
        chosen = self._in_any()
        return [entry for entry in self._entries if id(entry.parameter) in chosen]

    def _in_any(self) -> frozenset[int]:
        return frozenset().union(*self._chosen)

    def entries(self, number: int) -> list[Entry]:
        """Let the model train what this phase does -> its entries.

        Raises:
            EngineError: a parameter is not the one that it was when the course was made.
            UnsupportedModuleError: another one requires a gradient by now.
        """
        chosen = self._chosen[number]
        self._switch(chosen)
        found = {id(parameter) for parameter in self._model.parameters()}
        gone = [e.name for e in self._entries if id(e.parameter) in chosen and id(e.parameter) not in found]
        if gone:
            raise EngineError(
                f"{self.label(number)}: parameter {gone[0]!r} is another object than when the engine was attached "
                "(assigned anew, or load_state_dict(assign=True)). Load in place, or attach again"
            )
        return find_entries(self._model, self._norm)

    def restore(self) -> None:
        """Let the model train all that it did when the course was made."""
        for layer, own_names in self._layers:
            layer.__dict__["trained"] = own_names
            layer.__dict__.pop("in_phases", None)
        for entry in self._entries:
            entry.parameter.requires_grad_(True)

    def _switch(self, chosen: frozenset[int]) -> None:
        ever = self._in_any()
        for layer, own_names in self._layers:
            held = {name: id(layer.trained_parameter(name)) for name in own_names}
            layer.__dict__["trained"] = frozenset(name for name in own_names if held[name] in chosen)
            layer.__dict__["in_phases"] = frozenset(name for name in own_names if held[name] in ever)
            layer.__dict__.pop("ran_in", None)  # batches are numbered anew
        for entry in self._entries:
            entry.parameter.requires_grad_(id(entry.parameter) in chosen)

    def enter(
        self,
        index: int,
        session: Session,
        optimizer: PrivateOptimizer,
        begin: Callable[[list[Entry], ClippingMethod], Session],
    ) -> Session:
        """End the session of the running phase and begin that of another one.

        Args:
            begin: makes a session over these entries, on a model that has none.
        """
        holder = session.ledger.holder
        if holder is not None:
            holder.drop_graphs()  # it captures anew what the next phase trains
        method = self.methods[index]
        try:
            entries = self.entries(index)
            session.end()
            after = begin(entries, method)
            optimizer.go_on_with(after, method.sensitivity)
        except BaseException:
            self._switch(self._chosen[self.index])
            session.revive()
            raise
        session.ledger.free()
        self.releases[self.index] = session.releases
        self.index = index
        return after

    def check(self, number: int, session: Session) -> None:
        """Raise what ``enter`` would, and change nothing."""
        session.check()
        try:
            self.entries(number)
        finally:
            self._switch(self._chosen[self.index])

    def set_rates(self, optimizer: Optimizer) -> None:
        """Give all groups the rate of the running phase, and schedulers built from now on their first one."""
        lr = self.phases[self.index].lr
        if lr is None:
            return
        for group in optimizer.param_groups:
            for key in ("lr", "initial_lr"):
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(lr)
                elif key in group:
                    group[key] = lr

    def tell(self, session: Session, planned: int | None) -> None:
        """Tell the running phase's session how many releases are planned in it, and what is left of ``planned``."""
        session.phase_plan = (self.label(self.index), self.planned[self.index])
        if planned is not None:
            session.planned_before = sum(self.releases[: self.index])
            session.planned_releases = planned - session.planned_before

    def counts(self, session: Session) -> list[int]:
        """Releases made in each phase up to now, by number of the phase."""
        return [*self.releases[: self.index], session.releases]

    def statement(self, session: Session) -> list[dict[str, Any]]:
        """For each phase, what it trains and what was released in it: plain values."""
        made = [*self.counts(session), *self.releases[self.index + 1 :]]
        return [
            {
                **phase.to_dict(),
                "max_grad_norm": method.sensitivity,
                "elements": sum(e.parameter.numel() for e in self._entries if id(e.parameter) in chosen),
                "releases": count,
            }
            for phase, method, chosen, count in zip(self.phases, self.methods, self._chosen, made, strict=True)
        ]


class _Meanings:
    """Which parameters a word or a pattern stands for."""

    def __init__(self, model: nn.Module, entries: Sequence[Entry]):
        self._trainable = {id(entry.parameter) for entry in entries}
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append((module, own))
        self._biases = {number for number in self._trainable if what_is(owners[number]) is None}
        self._names = [
            (name, id(parameter))
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if id(parameter) in self._trainable
        ]

    def chosen(self, words: Sequence[str], label: str) -> frozenset[int]:
        """Identities of the parameters.

        Raises:
            EngineError: a word or a pattern stands for nothing, or nothing is left.
        """
        excluded = [word[1:] for word in words if word.startswith("!")]
        included = [word for word in words if not word.startswith("!")] or ["full"]
        chosen: set[int] = set()
        for word in included:
            chosen |= self._of(word, label)
        for word in excluded:
            chosen -= self._of(word, label)
        if not chosen:
            raise EngineError(f"{label} trains nothing: its exclusions leave none of {len(self._trainable)} parameters")
        return frozenset(chosen)

    def _of(self, word: str, label: str) -> set[int]:
        if word == "full":
            return self._trainable
        if word == "biases":
            found = self._biases
        else:
            found = {number for name, number in self._names if fnmatch.fnmatchcase(name, word)}
        if not found:
            names = [*_WORDS, *(name for name, _ in self._names)]
            near = difflib.get_close_matches(word, names, n=3, cutoff=0.4)
            raise EngineError(
                f"{label}: {word!r} matches none of the parameters that convert_model left trainable"
                + (f"; near it: {', '.join(near)}" if near else "")
            )
        return found
