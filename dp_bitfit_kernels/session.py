"""One private training run: which batch is open, what it is charged, when its sum is released."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import layout
from ._nested import tensors_in
from ._plan import check_noise_multiplier
from ._validate import BatchLayoutError, EngineError, OptimizerError
from .accounting import Accountant
from .clipping import GRID
from .layout import modules_of
from .ledger import Ledger
from .noise import STREAM_NOISE, KeySource
from .proofs import Proofs
from .sampling import Ticket
from .second_backward import SecondBackward

_EVALUATION = "for evaluation use torch.no_grad()"


class Session:
    """State between the loader, the model's forward, the backward and the optimizer's step.

    Guarantees:
        A draw is released once, with one noise vector, after all its physical batches were clipped and summed.
        A release is charged before its noise is drawn: at the loader's sample rate when its batch carries a ticket
        of the private loader, at sample rate 1 otherwise.
        Rows are never readable as gradients: ``grad`` of a trained parameter is None until the release.
    """

    def __init__(
        self,
        model: nn.Module,
        ledger: Ledger,
        keys: KeySource,
        accountant: Accountant,
        *,
        noise_multiplier: float,
        sample_rate: float,
        expected_batch_size: float,
        mean_reduction: bool,
        loss_scale: float,
        poisson_sampling: bool,
        padded: bool,
        secure_mode: bool,
        again: SecondBackward | None = None,
    ):
        self.model, self.ledger, self.keys, self.accountant = model, ledger, keys, accountant
        self.noise_multiplier = noise_multiplier
        self.sample_rate, self.expected_batch_size = sample_rate, expected_batch_size
        self.mean_reduction, self.loss_scale = mean_reduction, loss_scale
        self.poisson_sampling, self.padded, self.secure_mode = poisson_sampling, padded, secure_mode
        self.again = again
        self.ended = False  # by detach()
        self.releases = 0
        self.planned_releases: int | None = None  # of those that the noise was calibrated for, what is left here
        self.planned_before = 0  # and what phases before had of them
        self.phase_plan: tuple[str, int] | None = None  # name of the phase, releases planned in it
        self.ticket: Ticket | None = None  # of the open batch
        self.draw: int | None = None  # whose earlier parts are in the integer total
        self._next_part = 0
        self._charge_rate = 1.0
        self._step = torch.zeros(1, dtype=torch.int64, device=ledger.device)
        self._declared = False  # inside engine.batch(B)
        self._was_declared = False  # for the open batch
        self._forwards = 0
        self.proofs = Proofs(model, ledger.layers)
        self._reach_checked = False
        self._warned: set[str] = set()
        for parameter in model.parameters():
            parameter.grad = None

    def set_noise_multiplier(self, value: float) -> None:
        check_noise_multiplier(value)
        if self.draw is not None:
            raise EngineError("noise_multiplier cannot change within a draw")
        self.noise_multiplier = float(value)

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=4)

    @property
    def dirty(self) -> bool:
        """Whether a backward has reached the open batch."""
        return self.ledger.dirty or (self.again is not None and self.again.dirty)

    def on_ticket(self, ticket: Ticket) -> None:
        """Open the physical batch that the private loader is about to hand out."""
        if self.dirty:
            raise EngineError("a batch was backpropagated but not stepped: call optimizer.step() after every batch")
        other_draw = self.draw is not None and self.draw != ticket.draw
        if self.ticket is not None or other_draw or ticket.part > (self._next_part if self.draw is not None else 0):
            self._note_left_batch()
        if other_draw:
            self.abandon()
        if self.draw is None:
            self.ledger.forget()  # an interrupt between a clip and its release leaves nothing behind
        self.ticket = ticket
        self._declared = self._was_declared = False
        self._open(ticket.size, ticket.mask)

    def _note_left_batch(self) -> None:
        if self.secure_mode:
            self.abandon()
            raise EngineError(
                "a drawn batch was left without a step, which secure_mode refuses: leaving out batches by a rule "
                "that looks at private data voids the guarantee. The draw was dropped; iterate the loader anew"
            )
        self._warn_once(
            "skipped",
            "a drawn batch was left without a step; nothing of it is used. Leaving out batches by a rule that "
            "looks at private data voids the guarantee",
        )

    def leave_batch(self) -> None:
        """Go from a batch that was handed out and not used."""
        if self.ticket is not None:
            self._note_left_batch()
            self.abandon()

    def declare(self, batch: int) -> None:
        """Open a batch of a declared size that carries no ticket, or confirm the size of the one that does."""
        if batch < 1:
            raise EngineError(f"engine.batch({batch}): the batch size must be at least 1")
        if self.ticket is not None:
            if self.ledger.batch != batch:
                raise BatchLayoutError(
                    f"engine.batch({batch}): the batch of the private loader has {self.ledger.batch} samples"
                )
        elif self.dirty:
            raise EngineError("the batch before was backpropagated but not stepped: call optimizer.step() first")
        else:
            self._open_without_ticket(batch)
        self._declared = self._was_declared = True

    def undeclare(self) -> None:
        self._declared = False
        if self.ticket is None and not self.dirty:
            self.ledger.close()

    def _open_without_ticket(self, batch: int) -> None:
        if self.draw is not None:
            raise EngineError("a batch without a ticket came in the middle of a draw of the private loader")
        if self.padded:
            raise EngineError(
                "this batch carries no ticket: it was stepped on before, or does not come from the private loader. "
                "With padded physical batches its repeats of a record would count as records: take each batch from "
                "the private loader, and step once on it"
            )
        if self.poisson_sampling:
            self._warn_once(
                "ticketless",
                "this batch does not come from the private loader: its step is charged at sample rate 1, "
                "without amplification by sampling",
            )
        self.ledger.forget()
        self._open(batch)
        self._was_declared = False

    def _open(self, batch: int, mask: Tensor | None = None) -> None:
        was_compiled, self._forwards = self.proofs.traced is not None, 0
        self.proofs.open()
        if self.again is not None:
            self.again.clear()
        self.ledger.open(batch, mask)
        # Once, after the first release: by then a head that started at zero passes gradients on.
        if self.releases and not self._reach_checked and not was_compiled:  # a hook would make compiled code anew
            self.ledger.watch()

    def before_forward(self, args: Any, kwargs: Any) -> None:
        """Called before each forward of the model: opens a batch where none is open, checks its size."""
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():  # nothing can be asked while the model is traced: the step asks it
            self.proofs.traced = (args, kwargs)
            return
        batch, sizes = self.ledger.batch, layout.leading_sizes(args, kwargs)
        if batch is None:
            batch = layout.batch_of(args, kwargs)
            self._open_without_ticket(batch)
        elif self._declared:
            pass
        elif self.ticket is None:
            if self._forwards:
                raise EngineError(
                    "a second training forward before the step, on a batch without a ticket: a sample in both would "
                    "count twice; call optimizer.step() first, use the private loader, or `with engine.batch(B):` if "
                    f"the rows are the same samples; {_EVALUATION}"
                )
        elif batch not in sizes:
            raise BatchLayoutError(
                f"no input of the model has the batch of the private loader ({batch} samples) as its leading dimension "
                f"(found {sorted(sizes)}); {_EVALUATION}"
            )
        self._forwards += 1
        self.ledger.shapes = [tensor.shape for tensor in tensors_in((args, kwargs))]
        # A captured step runs what was asked before, and a capture may not wait for an answer.
        if self.ledger.holder is None:
            with self._abandoned_on_error():
                self.proofs.before_forward(args, kwargs, batch, self.ledger.opened)

    def after_forward(self, output: Any) -> Any:
        """Called after each forward of the model, where the sum comes by a second backward."""
        if self.again is None or not torch.is_grad_enabled() or self.ledger.batch is None:
            return output
        return self.again.cut(output, self.ledger.batch)

    @property
    def settled(self) -> bool:
        """Whether eager steps have asked all that they ask of a model in its present modes."""
        return self.releases >= 2 and self.proofs.settled

    def open_without_ticket(self, batch: int) -> None:
        """Open a batch of so many samples, unless one is open; that one must be as large."""
        if self.ledger.batch is None:
            self._open_without_ticket(batch)
        elif self.ledger.batch != batch:
            raise BatchLayoutError(f"a batch of {batch} samples, but the open one has {self.ledger.batch}")

    @contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # also an interrupt
            self.abandon()
            raise

    def abandon(self) -> None:
        """Drop the open batch and the sum of its draw."""
        self.ledger.discard()
        if self.again is not None:
            self.again.clear()
        self.ticket, self.draw, self._next_part = None, None, 0

    def end(self) -> None:
        """Detach for good: the optimizer of this session refuses further steps."""
        self.ledger.detach()
        self.ended = True

    def revive(self) -> None:
        """Undo ``end``, where the session that was to follow could not begin."""
        for layer in self.ledger.layers:
            layer.attachment = self.ledger
        self.ended = False

    def drop_rows(self) -> None:
        """Forget gradients of the open batch that no step has used (zero_grad)."""
        if self.dirty:
            if self.again is not None:
                self.again.clear()
            self.ledger.zero_rows()
            self._forwards = 0

    def absorb(self) -> bool:
        """Clip and add the open batch to the sum of its draw; True when the draw is complete.

        Raises:
            OptimizerError: nothing was backpropagated.
            EngineError: a gradient reached a parameter outside the converted layers, or the engine was detached.
        """
        self.check()
        batch = self.ledger.batch
        if batch is None or not self.dirty:
            raise OptimizerError(
                "step() without a backward of the private model since the last step: nothing was backpropagated, or "
                "the forward ran under torch.no_grad(), or the backward after `with engine.batch(B):` had ended"
            )
        with self._abandoned_on_error():
            self.proofs.before_step(batch, declared=self._was_declared)
        if self.again is not None:
            with self._abandoned_on_error():
                self.again.first()
        silent = self.ledger.silent()
        if silent is not None:
            self._reach_checked = True
            self._warn_of_silent(silent)
        with self._abandoned_on_error():  # what may be half added is never added again
            self.add_rows()
        return self.end_batch()

    def check(self) -> None:
        """Refuse a step of a detached engine, and one on parameters that are not as they were attached."""
        if self.ended:
            raise EngineError("this private optimizer belongs to a detached engine: use that of the last make_private")
        self._check_parameters()

    def add_rows(self) -> None:
        """Clip the rows of the open batch and add them to the sum of its draw."""
        batch = self.ledger.batch
        assert batch is not None
        scale = (batch if self.mean_reduction else 1.0) / self.loss_scale
        self.ledger.absorb(scale, None if self.again is None else self.again.second)
        if self.again is not None:
            self.again.clear()

    def end_batch(self) -> bool:
        """Use up the ticket of the batch whose rows were added; True when its draw is complete."""
        ticket, self.ticket = self.ticket, None
        self._declared = False
        if ticket is None:
            self._charge_rate = 1.0
            return True
        self._charge_rate = self.sample_rate
        self.draw, self._next_part = ticket.draw, ticket.part + 1
        return ticket.final

    def _warn_of_silent(self, silent: list[str]) -> None:
        if silent:
            self._warn_once(
                "silent",
                f"no gradient reached {len(silent)} trained parameter(s) in this batch, first {silent[0]!r}: its layer "
                "was not called, or ran under torch.no_grad(). If that is so in every batch, only noise moves it: "
                f"leave it frozen, convert_model(biases=('*', '!{silent[0]}'))",
            )

    def _check_parameters(self) -> None:
        parameters = [p for m in modules_of(self.model) for p in m._parameters.values() if p is not None]
        held = {id(parameter) for parameter in parameters}
        gone = [entry.name for entry in self.ledger.entries if id(entry.parameter) not in held]
        if gone:
            self.abandon()
            raise EngineError(
                f"parameter {gone[0]!r} is another object than when the engine was attached (assigned anew, or "
                "load_state_dict(assign=True)): the release would not reach it. Load in place, or attach again"
            )
        frozen = [entry.name for entry in self.ledger.entries if not entry.parameter.requires_grad]
        if frozen:
            self.abandon()
            raise EngineError(
                f"parameter {frozen[0]!r} was frozen after make_private, but its rows are still clipped and released: "
                "call engine.detach(), freeze it, and make_private again"
            )
        if any(parameter.grad is not None for parameter in parameters):
            raw = [name for name, parameter in self.model.named_parameters() if parameter.grad is not None]
            for parameter in parameters:
                parameter.grad = None
            self.abandon()
            raise EngineError(
                f"a raw gradient reached parameter {raw[0]!r} outside a converted layer (the model uses it directly, "
                "or it was unfrozen after make_private); the draw was dropped and nothing was released. Freeze it: "
                f"convert_model(biases=('*', '!{raw[0]}'))"
            )

    def release(self) -> Tensor:
        """Charge, draw the noise -> [P] float32, the release, in the ledger's order.

        It is (S + round(sigma G z)) * R / (G E[B]), S the integer sum of the draw, z from ChaCha20.
        """
        self.charge()
        return self.noisy_sum()

    def charge(self) -> None:
        """Put the step into the history, before its noise is drawn."""
        sigma = self.noise_multiplier
        # Noise that a seed replays protects nothing: charged as none, wherever this history goes.
        self.accountant.charge(0.0 if self.keys.deterministic else sigma, self._charge_rate)
        self.releases += 1
        if self.planned_releases is not None and self.releases > self.planned_releases:
            self._warn_once(
                "overrun",
                f"more than the {self.planned_before + self.planned_releases} releases that the noise was calibrated "
                "for: epsilon exceeds its target",
            )
        elif self.phase_plan is not None and self.releases > self.phase_plan[1]:
            self._warn_once(
                "phase",
                f"more than the {self.phase_plan[1]} releases planned in {self.phase_plan[0]}: they are charged, and "
                "are lost to the phases after it; engine.next_phase() begins the next",
            )
        self.draw, self._next_part = None, 0

    def noisy_sum(self) -> Tensor:
        """Noise under the next number of the counter on the sum of the draw, which is then forgotten -> [P] float32."""
        self._step.add_(1)
        scale = self.ledger.plan.sensitivity / (GRID * self.expected_batch_size)
        key, noise_std = self.keys.key_tensor(self.ledger.device), self.noise_multiplier * GRID
        return self.ledger.release(key, self._step, STREAM_NOISE, noise_std, scale)

    @property
    def noise_steps(self) -> int:
        """Value of the noise counter (reads the device: for checkpoints, not for the step path)."""
        return int(self._step.item())

    def continue_from(self, noise_steps: int, releases: int) -> None:
        self.skip_noise(noise_steps)
        self.releases = releases

    def skip_noise(self, steps: int) -> None:
        """Start the noise counter after ``steps`` that were drawn under the same key."""
        self._step.fill_(max(steps, self.noise_steps))
