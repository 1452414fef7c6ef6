"""A private step as two CUDA graphs, so that the host launches two things where it launched hundreds.

*accumulate*: zero the rows, forward, backward, clip, add to the integer sum, for one padded physical batch.
*release*: noise under the next number of the counter, scale, the optimizer's update.

The host replays the first once for each physical batch of a draw, hence ceil(draw / capacity) times: no draw is cut
short. It charges the accountant, then replays the second. The counter of the noise, the sum and the mask lie on the
device, so that every replay of the release draws fresh noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from . import layout
from ._validate import EngineError
from .flat_update import FlatUpdate
from .optimizer import PrivateOptimizer

# Physical batches that run eagerly before a capture, so that libraries have set themselves up; PyTorch asks for three.
WARM_UP = 3
# Shapes of batches (padded lengths, for example) that get a graph of their own.
MOST_SHAPES = 8


class Graph(Protocol):
    """Work of the device that was recorded once and is replayed on the same memory."""

    def __init__(self, work: Callable[[], None], stream: Any, pool: Any) -> None: ...

    def replay(self) -> None: ...


class _CudaGraph:
    def __init__(self, work: Callable[[], None], stream: Any, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's pinning thread may allocate meanwhile, which is no part of the capture.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        self._graph.replay()


class _Repetition:
    """Where a device has no graphs, the work itself, each time."""

    def __init__(self, work: Callable[[], None], stream: Any, pool: Any) -> None:
        self.replay = work


GRAPHS: dict[str, type[Graph]] = {"cuda": _CudaGraph}


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
            the physical batch, reduced and scaled as ``make_private`` was told. It must not read values of tensors in
            Python: what it does once, the replays repeat. No ``backward()``, no ``optimizer.step()``.

    Returns:
        The step. Its first calls run eagerly: until two draws were released, and three batches at least; so does the
        first batch of each shape. On a device without graphs every call does, with the same results.

    Raises:
        EngineError: the optimizer is not private, or physical batches have no fixed size.
    """
    return CapturedStep(optimizer, loss)


class CapturedStep:
    """See :func:`capture_step`.

    Guarantees, given the same inputs as eager steps: the same integer sums, charges and noise; a release is charged
    before its noise is drawn; a captured step never runs on parameters, a learning rate, a noise multiplier, a key or
    training modes other than the present ones (what changed is captured anew).

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
        self._optimizer, self._session, self._ledger = optimizer, session, session.ledger
        self._function = loss
        device = self._ledger.device
        self._graph: type[Graph] = GRAPHS.get(device.type, _Repetition)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # The accumulations never run at the same time and leave nothing in it: they share their memory.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._calls = 0  # that ran eagerly
        self._warm: set[Any] = set()  # kinds of batches among them
        self._closed = False
        self._holds_ledger = False
        self._accumulations: dict[Any, _Accumulation] = {}
        self._release: Graph | None = None
        self._released = torch.zeros(self._ledger.width, device=device)  # [P]
        self._memory: list[int] = []  # of parameters and buffers, when the graphs were captured
        self._built_in: tuple[Any, ...] = ()  # into the release

    @property
    def captured(self) -> bool:
        """Whether calls replay by now."""
        return bool(self._accumulations)

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        """Accumulate one physical batch; at the end of its draw, release and update.

        Returns:
            True when a release was made.

        Raises:
            EngineError: the step was closed, the engine detached, gradients are switched off, or a batch of another
                size came.
        """
        if self._closed:
            raise EngineError("this captured step was closed: call capture_step again")
        if self._ledger.captured and not self._holds_ledger:
            raise EngineError("another captured step runs on this model: close() it first")
        if not torch.is_grad_enabled():
            raise EngineError("a captured step trains: do not call it under torch.no_grad()")
        self._optimizer.check()
        self._session.check()
        key = self._key(args, kwargs)
        flat = self._optimizer.flat_update()  # parameters that were moved from outside return to their place
        if self._accumulations and self._memory != self._addresses():
            self._drop_graphs()
        found = self._accumulations.get(key)
        if found is None and not (key in self._warm and self._calls >= WARM_UP and self._session.settled):
            self._warm.add(key)
            return self._eager(args, kwargs)
        self._session.open_without_ticket(args, kwargs)
        if found is None:
            found = self._capture(key, args, kwargs)
        else:
            for static, value in zip(found.inputs, layout.tensors_in((args, kwargs)), strict=True):
                static.copy_(value, non_blocking=True)
        try:
            found.graph.replay()
        except BaseException:
            self._session.abandon()
            raise
        self._ledger.close()
        if not self._session.end_batch():
            return False
        try:
            self._session.charge()
            self._release_graph(flat).replay()
        except BaseException:  # no charge or no noise: the sum must not stay behind for the next release
            self._session.abandon()
            raise
        if flat is None:
            self._optimizer.update(self._released)
        elif not flat.capturable:
            flat.update(self._released)
        return True

    def close(self) -> None:
        """Free the graphs and their memory; the model then trains eagerly again."""
        self._drop_graphs()
        self._closed = True

    def _eager(self, args: Any, kwargs: Any) -> bool:
        self._calls += 1
        if self._holds_ledger:  # a new shape or mode beside graphs of others, whose rows stay where they are
            self._session.open_without_ticket(args, kwargs)
            self._ledger.captured = False
            self._ledger.refill()
        try:
            with self._beside():
                args, kwargs = self._on_device((args, kwargs))
                loss = self._function(*args, **kwargs)
                self._keep(loss)
                loss.backward()
                return self._optimizer.step()
        finally:
            self._ledger.captured = self._holds_ledger

    def _capture(self, key: Any, args: Any, kwargs: Any) -> _Accumulation:
        if len(self._accumulations) == MOST_SHAPES:
            self._session.abandon()
            raise EngineError(
                f"more than {MOST_SHAPES} shapes of batches came, and each has a graph of its own: pad the inputs to a "
                "few lengths"
            )
        self._ledger.captured = self._holds_ledger = True
        static = self._on_device((args, kwargs), copy=True)

        def accumulate() -> None:
            self._ledger.refill()
            loss = self._function(*static[0], **static[1])
            self._keep(loss)
            loss.backward()
            self._session.add_rows()

        try:
            self._wait()
            graph = self._graph(accumulate, self._stream, self._pool)
        except BaseException as error:
            self._drop_graphs()
            self._session.abandon()
            if not isinstance(error, RuntimeError):
                raise
            raise EngineError(
                "the step cannot be captured; the draw was dropped and nothing was released. Mostly the loss function "
                f"or the model reads a tensor's value in Python, or copies from the host: {error}"
            ) from error
        # Capturing closed the batch without running anything: it is open as far as the replay is concerned.
        found = self._accumulations[key] = _Accumulation(list(layout.tensors_in(static)), graph)
        self._memory = self._addresses()
        return found

    def _release_graph(self, flat: FlatUpdate | None) -> Graph:
        """The release, captured anew where what it has built in is not what holds now."""
        inside = flat if flat is not None and flat.capturable else None

        def release() -> None:
            noisy = self._session.noisy_sum()
            if inside is None:
                self._released.copy_(noisy)
            else:
                inside.update_in_graph(noisy)

        if self._release is not None and _unchanged(self._built_in, self._present(inside)):
            if inside is not None:
                inside.set_rates()
            return self._release
        if inside is not None:
            inside.prepare_capture()
        self._wait()
        self._release = self._graph(release, self._stream, None)
        self._built_in = self._present(inside)
        return self._release

    def _present(self, inside: FlatUpdate | None) -> tuple[Any, ...]:
        session = self._session
        key = session.keys.key_tensor(self._ledger.device)
        return session.noise_multiplier, key, inside, None if inside is None else inside.signature()

    def _drop_graphs(self) -> None:
        self._accumulations.clear()
        self._release = None
        if not self._holds_ledger:
            return
        self._ledger.captured = self._holds_ledger = False
        if self._ledger.batch is not None:  # the batch that is open then goes on eagerly
            self._ledger.refill()

    def _keep(self, loss: Tensor) -> None:
        if not isinstance(loss, Tensor) or loss.dim():
            raise EngineError(f"the loss function must return a loss without dimensions, got {_named(loss)}")
        value = loss.detach()
        if self.loss is None:
            self.loss = torch.zeros_like(value)
        self.loss.copy_(value)

    def _key(self, args: Any, kwargs: Any) -> Any:
        """What a graph has built in, beside memory: it serves calls that are alike in this."""
        device = self._ledger.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return self._session.modes(), autocast, _outline((args, kwargs))

    def _addresses(self) -> list[int]:
        model = self._session.model
        return [tensor.data_ptr() for tensors in (model.parameters(), model.buffers()) for tensor in tensors]

    def _on_device(self, value: Any, copy: bool = False) -> Any:
        device = self._ledger.device
        return layout.map_tensors(value, lambda t: t.detach().to(device, non_blocking=True, copy=copy))

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the captures, so that what is set up on first use is there before they begin."""
        if self._stream is None:
            yield
            return
        self._wait()
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))


def _named(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _unchanged(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """The same objects, or equal plain values."""
    if len(before) != len(after):
        return False
    return all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(before, after, strict=True))


def _outline(value: Any) -> Any:
    """The structure of a batch with its tensors' shapes and its plain values, to compare and to look up by."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return tuple((key, _outline(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_outline, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_outline(getattr(value, field.name)) for field in dataclasses.fields(value))
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device):
        return type(value), value
    raise EngineError(f"a captured step takes tensors and plain values, got {type(value).__name__}")
