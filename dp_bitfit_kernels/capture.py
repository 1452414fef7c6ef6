"""A private step as two CUDA graphs, so that the host launches two things where it launched hundreds.

*accumulate*: zero the rows, forward, backward, clip, add to the integer sum, for one padded physical batch.
*release*: noise under the next number of the counter, scale, the optimizer's update.

The host replays the first once for each physical batch of a draw, hence ceil(draw / capacity) times: no draw is cut
short. It charges the accountant, then replays the second. The counter of the noise, the sum and the mask lie on the
device, so that every replay of the release draws fresh noise.

A graph repeats operations on memory and knows nothing of Python. So what it has built in is compared before each
replay: the kind of the batch, the model's state (:class:`Fingerprint`), what the release depends on. Whatever has
changed runs eagerly first, as a step without capture would, and is captured once it is the same again. In another
phase of a run it begins anew.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._nested import map_tensors, tensors_in
from ._validate import EngineError
from .fingerprint import Fingerprint, outline
from .flat_update import FlatUpdate
from .graphs import GRAPHS, Graph, Repetition
from .optimizer import PrivateOptimizer

if TYPE_CHECKING:
    from .ledger import Ledger
    from .session import Session

# Physical batches that run eagerly before a capture, so that libraries have set themselves up; PyTorch asks for three.
WARM_UP = 3
# Kinds of batches (shapes, plain values, training modes) that have a graph at one time.
MOST_KINDS = 8

_TOO_MANY = (
    f"more than {MOST_KINDS} kinds of batches came to a captured step (shapes, plain values among the arguments, "
    "training modes); each needs a graph of its own, and most steps run eagerly. Pad inputs to a few lengths, and pass "
    "numbers that change as tensors"
)

_UNSTEADY = (
    "the model changes an attribute or puts another tensor in the place of a buffer in its forward, which a graph "
    "would not repeat: the captured step runs eagerly. Write to the buffer in place, or keep the number elsewhere"
)


@dataclasses.dataclass
class _Accumulation:
    """One captured physical batch: its inputs, and the graph that reads them."""

    inputs: list[Tensor]
    graph: Graph


def capture_step(optimizer: PrivateOptimizer, loss: Callable[..., Tensor]) -> CapturedStep:
    """Turn the body of a training loop into one call that replays CUDA graphs.

    ::

        step = dpk.capture_step(optimizer, lambda x, y: F.cross_entropy(model(x), y))
        for x, y in loader:
            if step(x, y):          # True when the draw was released
                scheduler.step()

    Args:
        optimizer: of ``make_private``, with ``pad_physical_batches=True`` (or ``poisson_sampling=False``): a graph has
            one batch size.
        loss: takes what the step is called with, tensors moved to the model's device, and returns the loss (0-dim) of
            the physical batch, reduced and scaled as ``make_private`` was told. What it does once, the replays repeat.
            So it, and a clipping function of your own, must not read values of tensors in Python, and what they use
            beside the arguments and the model (class weights, a teacher) must stay the same tensors. Checkpointed
            blocks need ``preserve_rng_state=False``. No ``backward()``, no ``optimizer.step()``. Batches are fetched on
            the stream that the step is called on.

    Returns:
        The step. Its first calls run eagerly: until two draws were released, and three batches at least; so do the
        first batch of each kind (shapes, plain values among the arguments, training modes) and the first release after
        a change. On a device without graphs every call does, with the same results.

    Raises:
        EngineError: the optimizer is not private, or physical batches have no fixed size.
    """
    return CapturedStep(optimizer, loss)


class CapturedStep:
    """See :func:`capture_step`.

    Guarantees, given the same rows as eager steps: the same integer sums, charges and noise; a release is charged
    before its noise is drawn; no replay runs on other parameters, buffers, training modes, modules, hooks or
    attributes of modules, learning rate, hyperparameters, noise multiplier or key than the present ones.

    Attributes:
        loss: the last physical batch's loss, 0-dim on the device, overwritten by the next call. It is raw: not private.
    """

    def __init__(self, optimizer: PrivateOptimizer, loss: Callable[..., Tensor]):
        if not isinstance(optimizer, PrivateOptimizer):
            raise EngineError(f"capture_step takes the optimizer of make_private, got {type(optimizer).__name__}")
        if not callable(loss):
            raise EngineError(f"capture_step: loss must be a function of a batch, got {type(loss).__name__}")
        session = optimizer.session
        if session.poisson_sampling and not session.padded:
            raise EngineError(
                "a captured step needs physical batches of one size: make_private(..., pad_physical_batches=True, "
                "max_physical_batch_size=...)"
            )
        self.loss: Tensor | None = None
        self._optimizer, self._function = optimizer, loss
        self._graph: type[Graph] = GRAPHS.get(self._ledger.device.type, Repetition)
        self._calls = 0  # that ran eagerly
        self._sizes: dict[Any, int] = {}  # physical rows of each kind of batch that ran eagerly
        self._closed = False
        self._warned: set[str] = set()
        self._steady = True  # no forward changed what graphs would have built in
        self._accumulations: dict[Any, _Accumulation] = {}  # least recently used first
        self._fingerprint: Fingerprint | None = None  # of the model, when the graphs were captured
        self._release: Graph | None = None
        self._built_in: tuple[Any, ...] | None = None  # into the release
        self._last: tuple[Any, ...] | None = None  # what the last release depended on
        self._released: Tensor | None = None  # [P], where a captured release leaves it
        self._renew()

    @property
    def _session(self) -> Session:
        return self._optimizer.session

    @property
    def _ledger(self) -> Ledger:
        return self._session.ledger

    def _renew(self) -> None:
        device = self._ledger.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # The accumulations never run at the same time and leave nothing in it: they share their memory.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @property
    def captured(self) -> bool:
        """Whether calls replay by now."""
        return bool(self._accumulations)

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        """Accumulate one physical batch; at the end of its draw, release and update.

        Returns:
            True when a release was made.

        Raises:
            EngineError: the step was closed, the engine detached, gradients are switched off, a raw gradient reached a
                parameter, or the step cannot be captured. The draw is dropped, nothing is released.
        """
        if self._closed:
            raise EngineError("this captured step was closed: call capture_step again")
        if not torch.is_grad_enabled():
            raise EngineError("a captured step trains: do not call it under torch.no_grad()")
        self._optimizer.check()
        self._session.check()
        other = self._ledger.holder
        if other is not None and other is not self:  # a step that was captured before, and is not called any more
            other.drop_graphs()
        flat = self._optimizer.flat_update()  # parameters that were moved from outside return to their place
        fingerprint = self._present_fingerprint() if self._accumulations else None
        if self._fingerprint != fingerprint:
            self.drop_graphs()
        key = self._kind(args, kwargs)
        found = self._accumulations.pop(key, None)
        ready = key in self._sizes and self._calls >= WARM_UP and self._session.settled and self._steady
        if found is None and not ready:
            return self._eager(key, args, kwargs)
        self._session.open_without_ticket(self._sizes[key])
        try:
            if found is None:
                found = self._capture(args, kwargs)
            else:
                for static, value in zip(found.inputs, tensors_in((args, kwargs)), strict=True):
                    static.copy_(value, non_blocking=True)
            self._accumulations[key] = found
            found.graph.replay()
            if found.graph.runs_python:
                self._session.check()
            self._ledger.close()
            if not self._session.end_batch():
                return False
            self._session.charge()
            self._release_and_update(flat)
        except BaseException:  # what may be half done is never done again, nor released later
            self._session.abandon()
            raise
        return True

    def close(self) -> None:
        """Free the graphs and their memory; the model then trains eagerly again."""
        self.drop_graphs()
        self._closed = True

    def drop_graphs(self) -> None:
        """Forget what was captured; the next calls capture anew."""
        self._accumulations.clear()
        self._release = self._built_in = self._released = None
        if self._ledger.holder is self:
            self._ledger.hold(None)
            if self._ledger.batch is not None:  # the batch that is open then goes on eagerly
                self._ledger.refill()

    def _eager(self, key: Any, args: Any, kwargs: Any) -> bool:
        self._calls += 1
        held = self._ledger.holder is self
        if held:  # another kind beside graphs of others
            self._ledger.hold(None)
            if self._ledger.batch is not None:
                self._ledger.refill()
        try:
            self._session.drop_rows()  # of a call that was broken off
            with self._beside():
                args, kwargs = self._on_device((args, kwargs))
                before = Fingerprint(self._session.model, ())
                loss = self._checked(self._function(*args, **kwargs))
                loss.backward()
                self._steady = before == Fingerprint(self._session.model, ())
                if not self._steady:
                    self._warn_once(_UNSTEADY)
                self._note_size(key)
                return self._optimizer.step()
        finally:
            self._last = None  # its release may have made a state of the optimizer
            if held:
                self._ledger.hold(self)

    def _note_size(self, key: Any) -> None:
        assert self._ledger.batch is not None
        self._sizes[key] = self._ledger.batch
        if len(self._sizes) > 4 * MOST_KINDS:
            del self._sizes[next(iter(self._sizes))]
            self._warn_once(_TOO_MANY)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)

    def _present_fingerprint(self) -> Fingerprint:
        return Fingerprint(self._session.model, self._ledger.memory)

    def _capture(self, args: Any, kwargs: Any) -> _Accumulation:
        if len(self._accumulations) >= MOST_KINDS:
            del self._accumulations[next(iter(self._accumulations))]
            self._warn_once(_TOO_MANY)
        static = self._on_device((args, kwargs), copy=True)
        self._ledger.hold(self)
        step = weakref.proxy(self)  # a graph that repeats Python would else keep the step alive, and the step the graph

        def accumulate() -> None:
            step._ledger.refill()
            loss = step._checked(step._function(*static[0], **static[1]))
            loss.backward()
            step._session.add_rows()

        graph = self._recorded(accumulate, self._pool)
        try:
            self._session.check()  # the backward has run in Python: no raw gradient may have come of it
        except EngineError:
            self.drop_graphs()
            raise
        self._fingerprint = self._present_fingerprint()
        return _Accumulation(list(tensors_in(static)), graph)

    def _recorded(self, work: Callable[[], None], pool: Any) -> Graph:
        try:
            return self._graph(work, self._stream, pool)
        except BaseException as error:
            self.drop_graphs()
            self._renew()  # what a capture was broken off on is not used again
            if not isinstance(error, RuntimeError):
                raise
            raise EngineError(
                "the step cannot be captured; the draw was dropped and nothing was released. Mostly the loss function "
                "or the model reads a tensor's value in Python, copies from the host, or asks for a generator's state "
                f"(checkpoint with preserve_rng_state=True): {error}"
            ) from error

    def _release_and_update(self, flat: FlatUpdate | None) -> None:
        """Replay the release; eagerly, where what it depends on is not what it was at the last one."""
        inside = flat if flat is not None and flat.capturable else None
        present = self._present(inside)
        if self._release is None or not _unchanged(self._built_in, present):
            if not _unchanged(self._last, present):
                self._optimizer.apply(self._session.noisy_sum(), flat)
                self._last = self._present(inside)
                self._release = self._built_in = self._released = None
                return
            self._capture_release(inside)
        elif inside is not None:
            inside.set_rates()
        assert self._release is not None
        self._release.replay()
        self._optimizer.note_step()
        if inside is None:
            assert self._released is not None
            self._optimizer.apply(self._released, flat)
        else:
            inside.note_versions()

    def _capture_release(self, inside: FlatUpdate | None) -> None:
        step = weakref.proxy(self)
        if inside is None:
            self._released = torch.zeros(self._ledger.width, device=self._ledger.device)

        def release() -> None:
            noisy = step._session.noisy_sum()
            if inside is None:
                step._released.copy_(noisy)
            else:
                inside.update_in_graph(noisy)

        if inside is not None:
            inside.prepare_capture()
        self._release = self._recorded(release, None)
        self._built_in = self._last = self._present(inside)

    def _present(self, inside: FlatUpdate | None) -> tuple[Any, ...]:
        session = self._session
        key = session.keys.key_tensor(self._ledger.device)
        return session.noise_multiplier, key, inside, None if inside is None else inside.signature()

    def _checked(self, loss: Any) -> Tensor:
        """The loss, kept for whoever logs it."""
        if not isinstance(loss, Tensor) or loss.dim():
            given = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise EngineError(f"the loss function must return a loss without dimensions, got {given}")
        value = loss.detach()
        if self.loss is None:
            self.loss = torch.zeros_like(value)
        self.loss.copy_(value)
        return loss

    def _kind(self, args: Any, kwargs: Any) -> Any:
        """What is built into a graph of the batch's kind; it serves calls that are alike in this."""
        device = self._ledger.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return self._session.proofs.modes(), autocast, outline((args, kwargs))

    def _on_device(self, value: Any, copy: bool = False) -> Any:
        device = self._ledger.device
        return map_tensors(value, lambda t: t.detach().to(device, non_blocking=True, copy=copy))

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the captures, so that what is set up on first use is there before they begin."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # also after an error: what is still running must not meet the next batch
            current.wait_stream(self._stream)


def _unchanged(before: tuple[Any, ...] | None, after: tuple[Any, ...]) -> bool:
    """The same objects, or equal plain values."""
    if before is None:
        return False
    return all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(before, after, strict=True))
