"""What one ``make_private`` puts on a model, and how the next phase takes its place."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import ref

from torch import nn
from torch.optim import Optimizer

from . import backends
from ._plan import groups
from ._validate import EngineError
from .accounting import Accountant
from .clipping import ClippingMethod
from .entries import Entry
from .flat_update import FlatUpdate
from .ledger import Ledger
from .noise import KeySource
from .optimizer import PrivateOptimizer
from .phases import Course
from .sampling import PrivateDataLoader, Ticket
from .second_backward import CutHook, SecondBackward
from .session import Session


class ForwardHook:
    """Tells the session of each forward of the model; a copy or pickle of the model is not private and does nothing."""

    def __init__(self, session: Session | None):
        self._session = ref(session) if session is not None else None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        session = self._session() if self._session is not None else None
        if session is not None:
            session.before_forward(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardHook, (None,)


class Attached:
    """The running session, its hooks on the model, and the private optimizer.

    Guarantee: the sessions of all phases use one key and one counter of noise that only grows.

    Args:
        entries: what is trained; with phases, what any of them trains.
        statement: makes the privacy statement, for files of biases.
        noise_steps: drawn under this key before.
        per_sample_norm, twice: of every ledger; ``twice``: large weights are summed by a second backward.
        settings: of every session, see :class:`Session`.

    Attributes:
        session: the running one; another in each phase.
        optimizer: the user's, the same in all phases.
        method: of clipping, of the running phase.
        loader: the private loader, or None.
        planned: releases that the noise was calibrated for, or None.
        widest: most elements that one release had.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        entries: list[Entry],
        method: ClippingMethod,
        course: Course | None,
        *,
        keys: KeySource,
        accountant: Accountant,
        statement: object,
        noise_steps: int,
        per_sample_norm: str,
        twice: bool,
        settings: dict[str, Any],
    ):
        self._module, self._keys, self._accountant, self._statement = module, keys, accountant, statement
        self._noise_steps, self._settings = noise_steps, settings
        self._norm, self._twice = per_sample_norm, twice
        self.course, self.widest = course, 0
        self.loader: PrivateDataLoader | None = None
        self.planned: int | None = None
        session = None
        try:
            if course is not None:
                entries = course.entries(0)
            session = self._begin(entries, method)
            flat = FlatUpdate.of(optimizer, entries, module)
        except BaseException:
            if session is not None:
                session.end()
            if course is not None:
                course.restore()
            raise
        self.optimizer = PrivateOptimizer(optimizer, session, method.sensitivity, flat)
        self._run(session, method)
        if course is not None:
            course.set_rates(self.optimizer)

    def _begin(self, entries: list[Entry], method: ClippingMethod) -> Session:
        backend = backends.select(entries[0].layers[0][0].backend, entries[0].parameter.device)
        ledger = Ledger(self._module, entries, method.plan(groups(entries)), backend, self._norm, self._twice)
        ledger.privacy_statement = self._statement
        again = SecondBackward() if self._twice else None
        session = Session(self._module, ledger, self._keys, self._accountant, again=again, **self._settings)
        session.skip_noise(self._noise_steps)
        return session

    def _run(self, session: Session, method: ClippingMethod) -> None:
        self.session, self.method = session, method
        self.widest = max(self.widest, session.ledger.width)
        self._hooks: list[Any] = [self._module.register_forward_pre_hook(ForwardHook(session), with_kwargs=True)]
        if self._twice:
            self._hooks.append(self._module.register_forward_hook(CutHook(session)))
        self._tell()

    def _tell(self) -> None:
        self.session.planned_releases = self.planned
        if self.course is not None:
            self.course.tell(self.session, self.planned)

    def plan(self, releases: int) -> None:
        """Warn of more releases than these, all phases together."""
        self.planned = releases
        self._tell()

    def on_ticket(self, ticket: Ticket) -> None:
        """A batch of the private loader goes to the session that runs."""
        if self.session.ended:  # it samples at another rate than the running session charges
            raise EngineError("this private loader belongs to a detached engine: use that of the last make_private")
        self.session.on_ticket(ticket)

    def between_draws(self, what: str) -> Session:
        """The running session.

        Raises:
            EngineError: in the middle of a draw.
        """
        session = self.session
        if session.draw is not None or session.dirty:
            raise EngineError(f"{what} in the middle of a draw: call it after optimizer.step() returned True")
        return session

    def next_phase(self) -> None:
        """See ``PrivacyEngine.next_phase``."""
        session, course = self.between_draws("next_phase"), self.course
        if course is None:
            raise EngineError("next_phase: this run has no phases; make_private takes phases=[dpk.Phase(...), ...]")
        if course.last:
            raise EngineError(f"next_phase: {course.label(course.index)} is the last one")
        session.check()
        session.leave_batch()
        self._enter(course, course.index + 1)
        course.set_rates(self.optimizer)

    def resume(self, releases: list[int], noise_steps: int, noise_multiplier: float) -> None:
        """Go on where a checkpoint was saved.

        Args:
            releases: of each phase that was begun; of the run, where there are no phases.
        """
        course = self.course
        if course is not None:
            if len(releases) - 1 != course.index:
                self._enter(course, len(releases) - 1)
            course.releases[: len(releases)] = releases
            self._tell()
        self.session.continue_from(noise_steps, releases[-1])
        self.session.set_noise_multiplier(noise_multiplier)

    def _enter(self, course: Course, index: int) -> None:
        before = self.session
        self._noise_steps, self._settings["noise_multiplier"] = before.noise_steps, before.noise_multiplier
        after = course.enter(index, before, self.optimizer, self._begin)
        self._remove_hooks()
        self._run(after, course.methods[index])
        if self.loader is not None:
            self.loader.skip_draws = 0

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def end(self) -> None:
        """Give the model back to plain training of all that was trainable before."""
        session = self.session
        if session.dirty or session.draw is not None:
            warnings.warn("detach() drops a draw that was not released", stacklevel=3)
        self._remove_hooks()
        session.end()
        self.optimizer.detach()
        if self.course is not None:
            self.course.restore()
