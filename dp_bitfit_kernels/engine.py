"""PrivacyEngine: turns a converted model, an optimizer and a data loader into a private training run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from . import backends, checkpoint, resume
from ._plan import (
    check_delta,
    check_noise_multiplier,
    groups,
    plan_divisor,
    plan_sampling,
    warn_of_earlier_training,
    whole_epochs,
)
from ._validate import EngineError
from .accounting import Accountant, calibrate_noise_multiplier
from .attached import Attached
from .clipping import ClippingMethod, resolve
from .entries import find_entries
from .noise import STREAM_SAMPLER, KeySource
from .optimizer import PrivateOptimizer, check_parameters
from .phases import Course, Phase, total_epochs
from .sampling import DrawCounter, PrivateDataLoader, Ticket
from .second_backward import CLIPPED_SUMS, NOT_PROVEN
from .session import Session
from .statement import statement
from .weights import PER_SAMPLE_NORMS


class PrivacyEngine:
    """Differentially private training of the converted layers' parameters.

    The release of one draw is the clipped sum of per-sample gradients plus Gaussian noise of standard deviation
    ``noise_multiplier * max_grad_norm``, divided by the expected batch size (Abadi et al. 2016). Adjacency: one record
    added or removed. What the mechanism guarantees is stated in ``ledger``, ``noise`` and ``session``.

    Args:
        accountant: ``"pld"`` (tight, default) or ``"rdp"``.
        secure_mode: demands Poisson sampling in padded physical batches and refuses every ``unsafe_`` option.
        history: path of an append-only history of charges, synced before each noise is drawn; an existing one goes on.
        unsafe_deterministic_seed: replays noise and sampling; every privacy statement then says epsilon = inf.

    Raises:
        EngineError: ``secure_mode`` with an ``unsafe_`` option.
        AccountingError: unknown accountant.
    """

    def __init__(
        self,
        *,
        accountant: str = "pld",
        secure_mode: bool = False,
        history: str | None = None,
        unsafe_deterministic_seed: int | None = None,
    ):
        if secure_mode and unsafe_deterministic_seed is not None:
            raise EngineError("secure_mode=True refuses unsafe_deterministic_seed")
        self.accountant = Accountant(accountant, path=history)
        self.secure_mode = secure_mode
        self._keys = KeySource(unsafe_deterministic_seed)
        self._draws = DrawCounter()
        self._attached: Attached | None = None
        self._target_delta: float | None = None
        self._public_size: int | None = None
        self._earlier = self.accountant.history.total_steps
        self._noise_steps = 0  # drawn under this key before the running attachment
        self._widest = 0  # most elements of one release before it

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        clipping: str | ClippingMethod = "flat",
        loss_reduction: str = "mean",
        loss_scale: float = 1.0,
        poisson_sampling: bool = True,
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        max_physical_batch_size: int | None = None,
        pad_physical_batches: bool | None = None,
        per_sample_norm: str = "mixed",
        clipped_sum: str = "book_keeping",
        phases: Sequence[Phase] | None = None,
    ) -> tuple[nn.Module, PrivateOptimizer, DataLoader[Any] | PrivateDataLoader]:
        """Attach the engine.

        Args:
            module: a model after ``convert_model``.
            optimizer: any torch.optim optimizer over its trained parameters.
            data_loader: gives the data set, the batch size, the collation and the workers.
            noise_multiplier: sigma; 0 adds no noise and makes epsilon infinite.
            max_grad_norm: R, the bound on one sample's gradient over all trained elements.
            clipping: ``"flat"``, ``"automatic"``, ``"per_layer"`` or an object of ``dpk.clipping``.
            loss_reduction: how the loss reduces over the physical batch, ``"mean"`` or ``"sum"``.
            loss_scale: static factor that the user multiplies the loss by (fp16); undone before clipping.
            poisson_sampling: False returns the loader unchanged, and every step is charged at sample rate 1.
            sample_rate: q; None takes batch_size / n, which makes n public (the privacy statement says so).
            expected_batch_size: what the sum is divided by; None takes the loader's batch size. A given
                ``sample_rate`` demands it: rate and loader need not agree, and their n is not read.
            max_physical_batch_size: draws are split into physical batches of at most so many rows.
            pad_physical_batches: every physical batch exactly that large, with masked repeats; None: in secure mode.
            per_sample_norm: how the norm of a large weight's per-sample gradient is taken: ``"ghost"`` (from Gram
                matrices), ``"instantiate"`` (the rows are made and kept) or ``"mixed"``, whichever is cheaper for the
                weight and its input's shape. Biases and small weights have rows in any case, and so have all linear
                weights of a compiled module.
            clipped_sum: how large weights' clipped gradients are summed: ``"book_keeping"``, of what one backward left,
                or ``"second_backward"``, for comparison: its sensitivity is not proven. With ``per_sample_norm`` these
                are the methods of the literature: instantiate + book_keeping is Opacus's, ghost or mixed +
                book_keeping is BK, + second_backward are FastGradClip, GhostClip and MixGhostClip.
            phases: what is trained, and how, until ``next_phase`` and after; None: all that convert_model chose.

        Returns:
            (module, private optimizer, private loader).

        Raises:
            EngineError, OptimizerError, SamplingError, ClippingError, UnsupportedModuleError: naming the argument.
        """
        if self._attached is not None:
            raise EngineError("this engine is already in use: call detach() first, or make another engine")
        if loss_reduction not in ("mean", "sum"):
            raise EngineError(f"loss_reduction={loss_reduction!r}: choose 'mean' or 'sum'")
        if per_sample_norm not in PER_SAMPLE_NORMS:
            raise EngineError(f"per_sample_norm={per_sample_norm!r}: choose one of {', '.join(PER_SAMPLE_NORMS)}")
        if clipped_sum not in CLIPPED_SUMS:
            raise EngineError(f"clipped_sum={clipped_sum!r}: choose one of {', '.join(CLIPPED_SUMS)}")
        twice = clipped_sum == "second_backward"
        if twice and self.secure_mode:
            raise EngineError(f"secure_mode=True refuses what is not proven. {NOT_PROVEN}")
        if not 1e-100 <= loss_scale <= 1e100:  # beyond, factors would leave float64
            raise EngineError(f"loss_scale={loss_scale!r} must lie between 1e-100 and 1e100")
        check_noise_multiplier(noise_multiplier)
        if isinstance(optimizer, PrivateOptimizer):
            raise EngineError("the optimizer is private already: pass optimizer.original_optimizer")
        pad = self.secure_mode if pad_physical_batches is None else pad_physical_batches
        if self.secure_mode and not (poisson_sampling and pad and max_physical_batch_size):
            raise EngineError(
                "secure_mode=True needs poisson_sampling and padded physical batches: set max_physical_batch_size"
            )
        rate, steps, public = plan_sampling(data_loader, sample_rate, poisson_sampling)
        expected = plan_divisor(data_loader, sample_rate, expected_batch_size)

        norm = "instantiate" if hasattr(module, "_orig_mod") else per_sample_norm
        course = None if phases is None else Course(phases, module, clipping, max_grad_norm, steps, norm)
        method = resolve(clipping, max_grad_norm) if course is None else course.methods[0]
        entries = find_entries(module, norm) if course is None else course.ever()
        check_parameters(optimizer, module, entries)
        loader: DataLoader[Any] | PrivateDataLoader = data_loader

        def on_ticket(ticket: Ticket) -> None:
            attached.on_ticket(ticket)

        if poisson_sampling:
            loader = PrivateDataLoader(
                data_loader,
                sample_rate=rate,
                steps_per_epoch=steps,
                max_physical_batch_size=max_physical_batch_size,
                pad_physical_batches=pad,
                words=self._sampler_words,
                on_ticket=on_ticket,
                draw_counter=self._draws,
            )
        warn_of_earlier_training(entries, optimizer, self._earlier)
        most = len(method.plan(groups(entries)).bounds) if course is None else course.most_groups
        if twice and most > 1:
            raise EngineError("a second backward weighs whole samples: clipped_sum='second_backward' clips flat only")
        if twice:
            warnings.warn(NOT_PROVEN, stacklevel=2)
        attached = self._attached = Attached(
            module,
            optimizer,
            entries,
            method,
            course,
            keys=self._keys,
            accountant=self.accountant,
            statement=self.privacy_statement,
            noise_steps=self._noise_steps,
            per_sample_norm=per_sample_norm,
            twice=twice,
            settings={
                "noise_multiplier": float(noise_multiplier),
                "sample_rate": rate,
                "expected_batch_size": expected,
                "mean_reduction": loss_reduction == "mean",
                "loss_scale": loss_scale,
                "poisson_sampling": poisson_sampling,
                "padded": bool(pad) and poisson_sampling,
                "secure_mode": self.secure_mode,
            },
        )
        attached.loader = loader if isinstance(loader, PrivateDataLoader) else None
        self._public_size = public
        if self._earlier:
            warnings.warn(
                f"the history already holds {self._earlier} charged steps: get_epsilon counts them, a target epsilon "
                "of this call covers new steps only (on resume, load_checkpoint continues them)",
                stacklevel=2,
            )
        return module, attached.optimizer, loader

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int | None = None,
        phases: Sequence[Phase] | None = None,
        max_grad_norm: float,
        poisson_sampling: bool = True,
        sample_rate: float | None = None,
        **options: Any,
    ) -> tuple[nn.Module, PrivateOptimizer, DataLoader[Any] | PrivateDataLoader]:
        """As :meth:`make_private`, with noise such that ``epochs`` epochs spend at most ``target_epsilon``.

        With ``phases`` in place of ``epochs``: such that all phases together do; known before anything is changed.

        Raises:
            AccountingError: the target cannot be met, or an argument is out of range.
        """
        if (epochs is None) == (phases is None):
            raise EngineError("make_private_with_epsilon takes either epochs= or phases=")
        epochs = whole_epochs(epochs) if phases is None else total_epochs(phases)
        rate, per_epoch, public = plan_sampling(data_loader, sample_rate, poisson_sampling)
        check_delta(target_delta, public)
        steps = epochs * per_epoch
        sigma = calibrate_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=rate,
            steps=steps,
            kind=self.accountant.kind,
        )
        private = self.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            poisson_sampling=poisson_sampling,
            sample_rate=sample_rate,
            phases=phases,
            **options,
        )
        self._attachment.plan(steps)
        self._target_delta = target_delta
        return private

    @property
    def phase(self) -> int | None:
        """Number of the running phase; None where there are none."""
        course = None if self._attached is None else self._attached.course
        return None if course is None else course.index

    def next_phase(self) -> None:
        """Go on with the next of ``phases``: the same model, optimizer and loader, other trained parameters.

        The optimizer's state of what stays trained is kept, all else of the phase before is freed. Before the planned
        epochs are over it only spends less. A scheduler that computes rates from the first ones (LambdaLR, OneCycleLR)
        goes on from those: build one for each phase.

        Raises:
            EngineError: no phase is left, or in the middle of a draw. The running phase then goes on.
        """
        self._attachment.next_phase()

    def __copy__(self) -> PrivacyEngine:
        return copy.deepcopy(self)  # never shares a key; refused while a model is attached

    @property
    def _attachment(self) -> Attached:
        if self._attached is None:
            raise EngineError("the engine is not attached: call make_private first")
        return self._attached

    @property
    def _session(self) -> Session:
        return self._attachment.session

    def _sampler_words(self, draw: int, first: int, count: int) -> Tensor:
        """64-bit words of draw number ``draw``, from a stream of their own. -> [count] int64 on the CPU."""
        step = torch.tensor([draw], dtype=torch.int64)
        words = backends.select("auto", "cpu").random_words
        return words(self._keys.key_tensor("cpu"), step, STREAM_SAMPLER, first, count)

    @contextmanager
    def batch(self, size: int) -> Iterator[None]:
        """Declare the batch size of the forwards inside: where inputs do not show it, and before compiled code.

        Several forwards inside add to the same rows, so they must be of the same samples in the same order.
        """
        self._session.declare(size)
        try:
            yield
        finally:
            self._session.undeclare()

    def get_epsilon(self, delta: float) -> float:
        """Epsilon spent so far, add-or-remove-one, at ``delta``; inf where noise was 0 or the seed was given.

        Raises:
            AccountingError: ``delta`` outside (0, 1).
        """
        check_delta(delta, self._public_size)
        return float(self.accountant.get_epsilon(delta))

    def privacy_statement(self, delta: float | None = None) -> dict[str, Any]:
        """What may be published about this run: plain values, JSON-ready."""
        attached, delta = self._attachment, delta if delta is not None else self._target_delta
        return statement(
            attached,
            self.accountant,
            epsilon=None if delta is None else self.get_epsilon(delta),
            delta=delta,
            width=max(self._widest, attached.widest),
            public_size=self._public_size,
            deterministic=self._keys.deterministic,
        )

    def detach(self) -> None:
        """Give the model back to plain training, of all that it trained before; the accountant keeps its history."""
        attached = self._attachment
        attached.end()
        self._noise_steps, self._widest = attached.session.noise_steps, max(self._widest, attached.widest)
        self._attached, self._earlier = None, self.accountant.history.total_steps

    def save_checkpoint(self, path: str, **objects: Any) -> None:
        """Save what a resumed run needs: trained parameters, optimizer, counters, history; never a key or a row.

        Args:
            path: written atomically; an existing file stays intact until the new one is complete.
            objects: more to keep: things with a ``state_dict`` (a scheduler), or plain values (an epoch number).

        Raises:
            EngineError: in the middle of a draw, whose unreleased sum may not be saved.
        """
        attached = self._attachment
        attached.between_draws("save_checkpoint")
        payload = resume.contents(attached, self.accountant.history, self._draws, objects)
        checkpoint.write_checkpoint(path, payload)

    def load_checkpoint(self, path: str, **objects: Any) -> dict[str, Any]:
        """Resume: call after the same make_private as before. The key is fresh; counters and history go on.

        Args:
            objects: things with ``load_state_dict`` that were saved under the same names.

        Returns:
            ``{"releases": ..., "epoch": ..., and the saved plain values}``. The private loader's next epoch has
            only the draws that are left of the interrupted one. With phases also ``"phase"``, which runs from here on,
            and the epoch is counted within it.

        Raises:
            CheckpointError: damaged, foreign or of other phases; nothing was changed.
            EngineError: in the middle of a draw.
        """
        attached = self._attachment
        attached.between_draws("load_checkpoint")
        return resume.load(path, attached, self.accountant.history, self._draws, objects)
