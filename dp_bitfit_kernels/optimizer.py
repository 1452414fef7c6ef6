"""The optimizer of a private model: clips, sums, adds noise, then lets the user's optimizer step on the release."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer, SparseAdam

from ._validate import OptimizerError
from .entries import Entry
from .flat_update import FlatUpdate

if TYPE_CHECKING:
    from .session import Session


def check_parameters(optimizer: Optimizer, module: nn.Module, entries: Sequence[Entry]) -> None:
    """Every trained parameter must be in the optimizer, and nothing else that requires a gradient.

    Raises:
        OptimizerError: it needs a closure or sparse gradients, a trained parameter is missing, or one outside the
            module would be trained on raw gradients.
    """
    needs_closure = signature(type(optimizer).step).parameters.get("closure")
    if (needs_closure is not None and needs_closure.default is Parameter.empty) or isinstance(optimizer, SparseAdam):
        raise OptimizerError(
            f"{type(optimizer).__name__} cannot step on a release: its step needs a closure, or sparse gradients"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [e.name for e in entries if id(e.parameter) not in held]
    if missing:
        raise OptimizerError(
            f"the optimizer lacks {len(missing)} trained parameter(s), first {missing[0]!r}: build it after "
            "convert_model from [p for p in model.parameters() if p.requires_grad]"
        )
    trained = {id(e.parameter) for e in entries}
    own = {id(p) for p in module.parameters()}
    if any(p.requires_grad and id(p) not in own for g in optimizer.param_groups for p in g["params"]):
        raise OptimizerError(
            "the optimizer holds a parameter that is not part of the module: it would be trained on raw gradients "
            "of private data; give it an optimizer of its own or make it part of the module"
        )
    frozen = len(held - trained)
    if frozen:
        warnings.warn(f"{frozen} frozen parameter(s) in the optimizer are ignored", stacklevel=4)


class PrivateOptimizer(Optimizer):
    """Wraps ``original_optimizer``: any torch.optim optimizer whose step needs no closure.

    ``step()`` returns True when it released a noisy gradient and the original optimizer stepped on it, False after a
    physical batch that does not end its draw. ``zero_grad()`` drops gradients that no step has used yet.
    """

    _step_supports_amp_scaling = True  # so that a GradScaler comes as far as step(), which refuses it

    def __init__(self, original: Optimizer, session: Session, max_grad_norm: float, flat: FlatUpdate | None = None):
        # Optimizer.__init__ is not called: parameters, state and defaults are those of the original.
        self.original_optimizer = original
        self._session = session
        self._flat = flat
        self._max_grad_norm = max_grad_norm
        own = {id(p) for p in session.model.parameters()}
        self._outside = [p for group in original.param_groups for p in group["params"] if id(p) not in own]
        self._held = [[id(p) for p in group["params"]] for group in original.param_groups]
        # Hooks registered here run when the original steps: on releases.
        self._optimizer_step_pre_hooks = original._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = original._optimizer_step_post_hooks

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.original_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.original_optimizer.defaults = defaults

    @property
    def noise_multiplier(self) -> float:
        """sigma of the next release. May be set between draws (a schedule): each release is charged with its own."""
        return self._session.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._session.set_noise_multiplier(value)

    @property
    def max_grad_norm(self) -> float:
        """R, fixed since make_private or the last change of phases: the accounting and the grid stand on it."""
        return self._max_grad_norm

    @property
    def expected_batch_size(self) -> float:
        return self._session.expected_batch_size

    def step(self, closure: Callable[[], Any] | None = None) -> bool:  # type: ignore[override]
        """Clip and add up the open physical batch; at the end of its draw, release and step.

        Returns:
            True when a release was made.

        Raises:
            OptimizerError: a closure is given, or nothing was backpropagated since the last step.
            EngineError: a gradient reached a trained parameter outside the converted layers.
        """
        if closure is not None:
            raise OptimizerError(
                "closures are not supported: a closure would see the data again after the noise was added; "
                "call backward() before step()"
            )
        if self.__dict__.pop("found_inf", None) is not None:
            self.__dict__.pop("grad_scale", None)
            raise OptimizerError(
                "GradScaler is not supported: a sample that overflows would decide whether a step is skipped. Multiply "
                "the loss by a constant and pass it as loss_scale= instead"
            )
        self.check()
        if not self._session.absorb():
            return False
        try:
            release = self._session.release()
        except BaseException:  # no charge or no noise: the sum must not stay behind for the next release
            self._session.abandon()
            raise
        self.apply(release, self.flat_update())
        return True

    def check(self) -> None:
        """Refuse to step on other parameters than those of make_private."""
        if [[id(p) for p in group["params"]] for group in self.param_groups] != self._held:
            raise OptimizerError(
                "the parameters of the optimizer changed after make_private: what was added would be trained on raw "
                "gradients of private data; make_private again with a new optimizer"
            )

        if any(p.requires_grad or p.grad is not None for p in self._outside):
            raise OptimizerError(
                "a parameter of the optimizer that is not part of the module was unfrozen after make_private: it would "
                "be trained on raw gradients of private data; give it an optimizer of its own"
            )

    @property
    def session(self) -> Session:
        return self._session

    def flat_update(self) -> FlatUpdate | None:
        """The update of all parameters as one, up to date with what was done from outside; None where there is none."""
        if self._flat is not None and not self._flat.take_up():
            self._flat = None
        return self._flat

    def apply(self, release: torch.Tensor, flat: FlatUpdate | None) -> None:
        """The original optimizer's step on the release [P] float32: of all parameters as one, or one by one."""
        if flat is not None:
            flat.update(release)
        else:
            self._update_each(release)

    def note_step(self) -> None:
        """What a learning rate scheduler looks for: that a step was made, here by a graph."""
        self._opt_called = True

    def _update_each(self, release: torch.Tensor) -> None:
        entries = self._session.ledger.entries
        try:
            for entry in entries:
                part = release[entry.start : entry.stop].view(entry.parameter.shape)
                entry.parameter.grad = part.to(entry.parameter.dtype)
            self.original_optimizer.step()
        finally:
            for entry in entries:
                entry.parameter.grad = None

    def detach(self) -> None:
        """Give the trained parameters memory of their own again."""
        if self._flat is not None:
            self._flat.give_up()
            self._flat = None

    def go_on_with(self, session: Session, max_grad_norm: float) -> None:
        """Step on another session of the same model from now on; an error leaves all but the flat update as it was.

        The state of what it trains is kept, that of what it does not is dropped.
        """
        self.detach()
        entries, state = session.ledger.entries, self.original_optimizer.state
        kept = {id(entry.parameter) for entry in entries}
        own = {id(parameter) for parameter in session.model.parameters()}
        dropped = {p: state.pop(p) for p in list(state) if id(p) in own and id(p) not in kept}
        try:
            flat = FlatUpdate.of(self.original_optimizer, entries, session.model)
        except BaseException:
            self.original_optimizer.state.update(dropped)
            raise
        self._session, self._flat, self._max_grad_norm = session, flat, max_grad_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the per-sample gradients of the open physical batch that no step has used."""
        self._session.drop_rows()
        self.original_optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.original_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise OptimizerError(
            "the trained parameters of a private model are fixed: make_private again with a new optimizer"
        )

    def __getstate__(self) -> dict[str, Any]:
        raise OptimizerError("a private optimizer is not copied or pickled: use state_dict() or engine.save_checkpoint")

    def __repr__(self) -> str:
        return f"PrivateOptimizer({self.original_optimizer!r})"
