"""PrivacyEngine: turns a converted model, an optimizer and a data loader into a private training run."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from . import backends, checkpoint
from ._history import History
from ._plan import (
    check_delta,
    check_fit,
    check_noise_multiplier,
    groups,
    json_number,
    plan_divisor,
    plan_sampling,
    warn_of_earlier_training,
    warn_of_lost,
    warn_of_weaker_noise,
    whole_epochs,
)
from ._validate import CheckpointError, EngineError
from .accounting import Accountant, calibrate_noise_multiplier
from .clipping import ClippingMethod, resolve
from .entries import find_entries
from .flat_update import FlatUpdate
from .ledger import Ledger
from .noise import STREAM_SAMPLER, KeySource, delta_slack, epsilon_slack
from .optimizer import PrivateOptimizer, check_parameters
from .sampling import DrawCounter, PrivateDataLoader, Ticket
from .second_backward import CLIPPED_SUMS, NOT_PROVEN, CutHook, SecondBackward
from .session import ForwardHook, Session
from .weights import PER_SAMPLE_NORMS

_FORMAT = "dp-bitfit-checkpoint"


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
        self._session: Session | None = None
        self._optimizer: PrivateOptimizer | None = None
        self._loader: PrivateDataLoader | None = None
        self._hooks: list[Any] = []
        self._target_delta: float | None = None
        self._public_size: int | None = None
        self._clipping: ClippingMethod | None = None
        self._earlier = self.accountant.history.total_steps
        self._noise_steps = 0  # drawn under this key before the running session

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
                weight and its input's shape. Biases and small weights have rows in any case.
            clipped_sum: how large weights' clipped gradients are summed: ``"book_keeping"``, of what one backward left,
                or ``"second_backward"``, for comparison: its sensitivity is not proven. With ``per_sample_norm`` these
                are the methods of the literature: instantiate + book_keeping is Opacus's, ghost or mixed +
                book_keeping is BK, + second_backward are FastGradClip, GhostClip and MixGhostClip.

        Returns:
            (module, private optimizer, private loader).

        Raises:
            EngineError, OptimizerError, SamplingError, ClippingError, UnsupportedModuleError: naming the argument.
        """
        if self._session is not None:
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

        entries = find_entries(module, "instantiate" if hasattr(module, "_orig_mod") else per_sample_norm)
        check_parameters(optimizer, module, entries)
        method = resolve(clipping, max_grad_norm)
        backend = backends.select(entries[0].layers[0][0].backend, entries[0].parameter.device)
        plan = method.plan(groups(entries))
        loader: DataLoader[Any] | PrivateDataLoader = data_loader

        def on_ticket(ticket: Ticket) -> None:
            if self._session is not session:  # it samples at another rate than the running session charges
                raise EngineError("this private loader belongs to a detached engine: use that of the last make_private")
            session.on_ticket(ticket)

        if poisson_sampling:
            loader = self._loader = PrivateDataLoader(
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
        if twice and len(plan.bounds) > 1:
            raise EngineError("a second backward weighs whole samples: clipped_sum='second_backward' clips flat only")
        if twice:
            warnings.warn(NOT_PROVEN, stacklevel=2)
        ledger = Ledger(module, entries, plan, backend, per_sample_norm, twice)
        ledger.privacy_statement = self.privacy_statement
        session = self._session = Session(
            module,
            ledger,
            self._keys,
            self.accountant,
            noise_multiplier=float(noise_multiplier),
            sample_rate=rate,
            expected_batch_size=expected,
            mean_reduction=loss_reduction == "mean",
            loss_scale=loss_scale,
            poisson_sampling=poisson_sampling,
            padded=bool(pad) and poisson_sampling,
            secure_mode=self.secure_mode,
            again=SecondBackward() if twice else None,
        )
        session.skip_noise(self._noise_steps)
        self._clipping, self._public_size = method, public
        self._hooks = [module.register_forward_pre_hook(ForwardHook(session), with_kwargs=True)]
        if twice:
            self._hooks.append(module.register_forward_hook(CutHook(session)))
        flat = FlatUpdate.of(optimizer, entries, module)
        self._optimizer = PrivateOptimizer(optimizer, self._session, method.sensitivity, flat)
        if self._earlier:
            warnings.warn(
                f"the history already holds {self._earlier} charged steps: get_epsilon counts them, a target epsilon "
                "of this call covers new steps only (on resume, load_checkpoint continues them)",
                stacklevel=2,
            )
        return module, self._optimizer, loader

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        poisson_sampling: bool = True,
        sample_rate: float | None = None,
        **options: Any,
    ) -> tuple[nn.Module, PrivateOptimizer, DataLoader[Any] | PrivateDataLoader]:
        """As :meth:`make_private`, with noise such that ``epochs`` epochs spend at most ``target_epsilon``.

        Raises:
            AccountingError: the target cannot be met, or an argument is out of range.
        """
        rate, per_epoch, public = plan_sampling(data_loader, sample_rate, poisson_sampling)
        check_delta(target_delta, public)
        steps = whole_epochs(epochs) * per_epoch
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
            **options,
        )
        self._running.planned_releases = steps
        self._target_delta = target_delta
        return private

    def __copy__(self) -> PrivacyEngine:
        return copy.deepcopy(self)  # never shares a key; refused while a model is attached

    @property
    def _running(self) -> Session:
        if self._session is None:
            raise EngineError("the engine is not attached: call make_private first")
        return self._session

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
        self._running.declare(size)
        try:
            yield
        finally:
            self._running.undeclare()

    def get_epsilon(self, delta: float) -> float:
        """Epsilon spent so far, add-or-remove-one, at ``delta``; inf where noise was 0 or the seed was given.

        Raises:
            AccountingError: ``delta`` outside (0, 1).
        """
        check_delta(delta, self._public_size)
        return float(self.accountant.get_epsilon(delta))

    def privacy_statement(self, delta: float | None = None) -> dict[str, Any]:
        """What may be published about this run: plain values, JSON-ready."""
        session, delta = self._running, delta if delta is not None else self._target_delta
        assert self._clipping is not None
        epsilon = None if delta is None else self.get_epsilon(delta)
        return {
            "private": True,
            "mechanism": "DP-SGD, Gaussian, rounded to an integer grid",
            "sampling": "Poisson" if session.poisson_sampling else "none: every step at sample rate 1",
            "adjacency": "add or remove one record",
            "epsilon": None if epsilon is None else json_number(epsilon),
            "delta": delta,
            "numerical_slack": self._slack(epsilon),
            "accountant": self.accountant.kind,
            "clipping": self._clipping.name,
            "max_grad_norm": self._clipping.sensitivity,
            "sensitivity": "proven" if session.again is None else NOT_PROVEN,
            "expected_batch_size": session.expected_batch_size,
            "public_dataset_size": self._public_size,
            "secure_mode": self.secure_mode,
            "unsafe_deterministic_seed": self._keys.deterministic,
            "history": self.accountant.history.to_list(),
        }

    def _slack(self, epsilon: float | None) -> dict[str, float] | None:
        """What float64 noise of 64-bit words may add to epsilon and delta: ``noise.delta_slack``'s bound."""
        steps = self.accountant.history.total_steps
        if epsilon is None or not math.isfinite(epsilon) or not steps:
            return None
        sigma = max(s.noise_multiplier for s in self.accountant.history.segments)
        width = self._running.ledger.width
        return {"epsilon": epsilon_slack(sigma, width, steps), "delta": delta_slack(sigma, width, steps, epsilon)}

    def detach(self) -> None:
        """Give the model back to plain training; the accountant keeps its history."""
        session = self._running
        if session.dirty or session.draw is not None:
            warnings.warn("detach() drops a draw that was not released", stacklevel=2)
        for hook in self._hooks:
            hook.remove()
        session.end()
        if self._optimizer is not None:
            self._optimizer.detach()
        self._noise_steps = session.noise_steps
        self._session = self._optimizer = self._loader = None
        self._earlier = self.accountant.history.total_steps

    def _between_draws(self, what: str) -> Session:
        session = self._running
        if session.draw is not None or session.dirty:
            raise EngineError(f"{what} in the middle of a draw: call it after optimizer.step() returned True")
        return session

    def save_checkpoint(self, path: str, **objects: Any) -> None:
        """Save what a resumed run needs: trained parameters, optimizer, counters, history; never a key or a row.

        Args:
            path: written atomically; an existing file stays intact until the new one is complete.
            objects: more to keep: things with a ``state_dict`` (a scheduler), or plain values (an epoch number).

        Raises:
            EngineError: in the middle of a draw, whose unreleased sum may not be saved.
        """
        session = self._between_draws("save_checkpoint")
        assert self._optimizer is not None
        extra = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in objects.items()}
        checkpoint.write_checkpoint(
            path,
            {
                "format": _FORMAT,
                "parameters": {e.name: e.parameter.detach().cpu() for e in session.ledger.entries},
                "optimizer": self._optimizer.state_dict(),
                "optimizer_class": type(self._optimizer.original_optimizer).__name__,
                "history": self.accountant.history.to_list(),
                "noise_steps": session.noise_steps,
                "noise_multiplier": session.noise_multiplier,
                "draws": self._draws.value,
                "releases": session.releases,
                "objects": extra,
            },
        )

    def load_checkpoint(self, path: str, **objects: Any) -> dict[str, Any]:
        """Resume: call after the same make_private as before. The key is fresh; counters and history go on.

        Args:
            objects: things with ``load_state_dict`` that were saved under the same names.

        Returns:
            ``{"releases": ..., "epoch": ..., and the saved plain values}``. The private loader's next epoch has
            only the draws that are left of the interrupted one.

        Raises:
            CheckpointError: damaged or foreign; nothing was changed.
            EngineError: in the middle of a draw.
        """
        session = self._between_draws("load_checkpoint")
        assert self._optimizer is not None
        data = checkpoint.read_checkpoint(path)
        if data.get("format") != _FORMAT:
            raise CheckpointError(f"{path!r} is not a checkpoint of a PrivacyEngine")
        entries, original = session.ledger.entries, self._optimizer.original_optimizer
        check_fit(path, data, entries, type(original).__name__, objects)
        history = History.from_list(data["history"])
        try:
            original.load_state_dict(data["optimizer"])
        except ValueError as error:  # raised before it changes anything
            raise CheckpointError(f"{path!r} does not fit the optimizer ({error}); nothing was changed") from error
        for entry in entries:
            entry.parameter.data.copy_(data["parameters"][entry.name])
        self.accountant.history.merge(history.segments)
        self._draws.advance_to(data["draws"])
        session.continue_from(data["noise_steps"], data["releases"])
        asked = session.noise_multiplier
        session.set_noise_multiplier(data["noise_multiplier"])
        for name, target in objects.items():
            target.load_state_dict(data["objects"][name])
        per_epoch = len(self._loader) if self._loader is not None else 0
        result = {k: v for k, v in data["objects"].items() if k not in objects}
        result["releases"] = data["releases"]
        if per_epoch and self._loader is not None:
            result["epoch"], self._loader.skip_draws = divmod(data["releases"], per_epoch)
        warn_of_lost(self.accountant.history.total_steps - history.total_steps)
        warn_of_weaker_noise(asked, session.noise_multiplier)
        return result
