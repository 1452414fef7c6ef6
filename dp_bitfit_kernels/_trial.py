"""Runs of a model on one sample more, and what they show."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _slices, evidence
from ._attributes import Attributes
from ._nested import form, map_tensors, tensors_in
from ._validate import BatchLayoutError
from ._widened import HALF, Widened
from .layers import BiasLayer
from .layers.one_by_one import Call, OneByOneLayer
from .layers.own_forward import OwnForwardLayer
from .layers.spread import Copies

Calls = dict[OneByOneLayer, tuple[Call, ...]]
FAILURES = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)


@dataclasses.dataclass
class Run:
    """What one run of the model showed."""

    output: Any
    seen: list[evidence.Seen]  # one for each call of a converted layer
    called: list[evidence.Called]  # one for each call of a layer that is run one sample at a time
    buffers: dict[str, Tensor]  # after the run
    attributes: dict[str, Any]  # numbers and tensors that modules hold besides and that it wrote
    at_once: set[tuple[OneByOneLayer, tuple[Any, ...]]]  # forms of calls that vmap runs, of those that were tried


@contextlib.contextmanager
def python_generators_kept() -> Iterator[None]:
    """Python's and NumPy's generators, too: stochastic depth and layer drop use them in some models."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the one that models use
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def _eager() -> AbstractContextManager[Any]:
    """Compiled models run as they were written: else the hooks of a trial would be compiled along."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


_TRIES = 128  # runs to find samples by
_FAR = 1e3  # times the usual size


@dataclasses.dataclass
class Trial:
    """Runs the model on rows of its inputs; generators, buffers and attributes are as before afterwards."""

    model: nn.Module
    args: Any
    kwargs: Any
    batch: int
    layers: list[BiasLayer]
    spread: set[BiasLayer] = dataclasses.field(default_factory=set)  # what they share is copied for each sample
    shared: frozenset[int] = frozenset()  # places of inputs that are the same for all samples, of whatever size
    _copies: dict[int, Any] = dataclasses.field(default_factory=dict)  # of tensors among the attributes
    _sizes: set[int] = dataclasses.field(default_factory=set)  # numbers of rows that were run as they are

    def run(
        self,
        rows: list[int],
        first: bool = False,
        calls: Calls | None = None,
        instead: Calls | None = None,
        changed: tuple[bool, ...] = (),
        exact: torch.dtype | None = None,
        hold: bool = False,
        same_draws: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> Run:
        """One run on these rows of the inputs.

        changed: of which samples the copies are other than what they are copies of. exact: asked for its
        outputs alone, in this dtype, where it is wider and the model can. same_draws: makes what random numbers come
        from. hold: attributes stay as the run left them.

        first: layers with a forward of their own are tried in it. calls: layers run one sample at a time are compared
        with themselves. instead: these are run so, and the model goes on with that.
        """
        wide = exact is not None and (exact == torch.float64 or self.half)  # which may run the model itself
        if wide and len(rows) not in self._sizes:  # what it keeps for each size is made in its own dtype
            self.run(rows)
        run = Run(None, [], [], {}, {}, set())
        at_once: dict[tuple[OneByOneLayer, tuple[Any, ...]], bool] = {}
        watches: dict[OneByOneLayer, tuple[evidence.Watch, Any]] = {}

        def look(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
            if first and isinstance(layer, OwnForwardLayer) and not layer.adds_its_bias_last(args, kwargs):
                raise BatchLayoutError(
                    f"layer {layer.layer_name!r} has a forward of its own, and in this model its bias is not what it "
                    "adds last. Leave it frozen, or convert the model with sample_batch=, which runs the module around "
                    "it one sample at a time",
                    [layer],
                )
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor):
                run.seen.append(evidence.Seen.of(layer, (args, kwargs), output, len(rows)))

        def look_before(layer: Any, args: Any, kwargs: Any) -> None:
            given = map_tensors((args, kwargs), torch.clone) if calls or instead else None  # it may change them
            watches[layer] = evidence.Watch.of(layer, (args, kwargs)), given

        def look_around(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
            watch, given = watches.pop(layer)
            watch.check(layer, (args, kwargs))
            if instead is not None and layer.mixin is OneByOneLayer:
                own = form((args, kwargs))
                call = next((call for call in instead.get(layer, ()) if call.form == own), None)
                if call is not None:  # else evaluation calls it in another way
                    return (layer.mapped if call.at_once else layer.sliced)(call, given, len(rows), {})
            if calls is not None and layer.mixin is OneByOneLayer:
                own = form((args, kwargs))
                call = next(call for call in calls[layer] if call.form == own)
                _slices.require_same(layer, call, given, len(rows))
                tried = _slices.works_at_once(layer, call, given, len(rows))
                at_once[layer, own] = at_once.get((layer, own), True) and tried
            run.called.append(evidence.Called.of(layer, (args, kwargs), output, len(rows)))
            return None

        handles = [
            layer.register_forward_hook(look_around, with_kwargs=True)
            if isinstance(layer, OneByOneLayer)
            else layer.register_forward_hook(look, with_kwargs=True)
            for layer in self.layers
            if layer.trained and layer.holds_samples and exact is None
        ]
        handles += [
            layer.register_forward_pre_hook(look_before, with_kwargs=True)
            for layer in self.layers
            if layer.trained and isinstance(layer, OneByOneLayer) and exact is None
        ]
        owned = [
            (module, name, own, buffer, buffer._version, buffer.clone())
            for name, module in self.model.named_modules()
            for own, buffer in module._buffers.items()
            if buffer is not None
        ]
        attributes = Attributes(self.model, self._copies)
        for layer in self.spread:
            layer.__dict__["trial_copies"] = Copies(len(rows), changed or (False,) * len(rows))
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=self.devices),
                python_generators_kept(),
                _eager(),
                Widened(exact) if wide and exact is not None else nullcontext(),
                nullcontext() if same_draws is None else same_draws(),
            ):
                chosen = self.chosen(rows)
                run.output = self.model(*chosen[0], **chosen[1])
            run.attributes = attributes.written()
            for module, name, own, *_ in owned:
                value = module._buffers[own]
                if value is not None:
                    run.buffers[f"{name}.{own}" if name else own] = value.clone()
            run.at_once.update(key for key, works in at_once.items() if works)
        finally:
            for layer in self.spread:
                layer.__dict__.pop("trial_copies", None)
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for module, _, own, buffer, version, before in owned:
                    module._buffers[own] = buffer  # also where the model put another tensor there
                    if buffer._version != version or not torch.equal(buffer, before):
                        buffer.copy_(before)
                if not hold:
                    attributes.put_back()
        if not wide:
            self._sizes.add(len(rows))
        return run

    @property
    def devices(self) -> list[int]:
        """Indices of the CUDA devices that the model is on."""
        return sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Seeds the generators that a run puts back."""
        torch.default_generator.manual_seed(seed)
        for index in self.devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        yield

    def after(self, others: list[int], rows: list[int]) -> Run:
        """A run on ``rows`` that finds what one on ``others`` left in attributes."""
        kept = dict(self._copies)
        before = Attributes(self.model, kept)
        try:
            self.run(others, hold=True)
            return self.run(rows, hold=True)
        finally:
            with torch.no_grad():
                before.put_back()
            self._copies = kept

    def sums(self) -> dict[str, Tensor]:
        """Of the parameters, to see whether a forward writes them."""
        return {
            name: p.detach().sum(dtype=torch.complex128 if p.is_complex() else torch.float64)
            for name, p in self.model.named_parameters()
            if p.dtype.itemsize > 1 and not p.is_meta and type(p).__torch_dispatch__ is Tensor.__torch_dispatch__
        }

    def chosen(self, rows: list[int]) -> Any:
        """(args, kwargs) of these rows."""
        places = itertools.count()
        return map_tensors(
            (self.args, self.kwargs),
            lambda tensor: tensor.clone() if next(places) in self.shared else _take(tensor, self.batch, rows),
        )

    def of_samples(self) -> Iterator[Tensor]:
        """The inputs that hold the samples."""
        for place, tensor in enumerate(tensors_in((self.args, self.kwargs))):
            if place not in self.shared and tensor.dim() > 0 and tensor.shape[0] == self.batch:
                yield tensor

    def of_usual(self) -> Trial:
        """The same without samples that are not finite where most are, or far larger: others stand in their places.

        What is no number is like anything, and beside a huge number all others are alike: it would hide which rows are
        a sample's, and that samples mix.
        """
        odd = torch.zeros(self.batch, dtype=torch.bool)
        for tensor in self.of_samples():
            if tensor.is_floating_point() and tensor.numel():
                flat = tensor.detach().reshape(self.batch, -1)
                finite = flat.isfinite()
                sizes = torch.where(finite, flat, 0.0).abs().amax(1).double().cpu()
                strange = ~finite.all(1).cpu()
                if 2 * int(strange.sum()) <= self.batch:
                    odd |= strange
                if bool((sizes > 0).any()):
                    odd |= sizes > _FAR * sizes[sizes > 0].median()
        return self._of([i for i in range(self.batch) if not odd[i]])

    def of_finite(self) -> Trial | None:
        """The same without samples in which layers give what is no number; None where there are no others, or none are
        found soon."""
        tries = itertools.count()

        def finite(rows: list[int]) -> list[int]:
            if next(tries) >= _TRIES:
                return []
            try:
                seen = self.run([rows[i % len(rows)] for i in range(self.batch + 1)]).seen
            except FAILURES:
                return []
            if all(call.finite for call in seen):
                return rows
            half = len(rows) // 2
            return finite(rows[:half]) + finite(rows[half:]) if half else []

        found = finite([*range(self.batch)])
        return self._of(found) if found else None

    def _of(self, found: list[int]) -> Trial:
        """With these rows in the places of all others."""
        if not 0 < len(found) < self.batch:
            return self
        args, kwargs = self.chosen([i if i in found else found[i % len(found)] for i in range(self.batch)])
        return dataclasses.replace(self, args=args, kwargs=kwargs, _copies={}, _sizes=set())

    @functools.cached_property
    def half(self) -> bool:
        """Whether something runs in half precision that float32 can stand in for."""
        autocast = any(torch.is_autocast_enabled(kind) for kind in {p.device.type for p in self.model.parameters()})
        if not autocast and not any(p.dtype in HALF for p in self.model.parameters()):
            return False
        self.__dict__["half"] = True
        try:
            self.run([0], exact=torch.float32)
        except FAILURES:
            return False
        return True


def _take(tensor: Tensor, batch: int, rows: list[int]) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[0] != batch:
        return tensor.clone()  # which a model may change in place
    taken = tensor[torch.tensor([max(row, 0) for row in rows], device=tensor.device)]
    if -1 in rows:
        taken[torch.tensor([row == -1 for row in rows], device=tensor.device)] = _changed(tensor[0])
    if MIXED in rows:
        unlike = (tensor != tensor[:1]).flatten(1).any(1) if tensor.dim() > 1 else tensor != tensor[0]
        # The last that differs: the other added row is the first.
        taken[rows.index(MIXED)] = tensor[batch - 1 - int(unlike.flip(0).int().argmax())] if unlike.any() else tensor[0]
    return taken


MIXED = -2  # of each input another row than the first


def _changed(row: Tensor) -> Tensor:
    """Another valid content for a row: signs turned, or the same numbers in another order, or one less."""
    if row.dtype == torch.bool:
        return row
    if row.is_floating_point() or row.is_complex():
        return 1 - row
    return row.flip(-1) if row.dim() and not bool((row == row.flip(-1)).all()) else (row - 1).clamp(min=0)


def another_row(trial: Trial) -> int | None:
    """A row whose content differs from row 0 in some input; where all are alike, -1: row 0 changed; None: neither."""
    batch, held = trial.batch, list(trial.of_samples())
    for tensor in held:
        if batch > 1:
            different = (tensor[1:] != tensor[:1]).flatten(1).any(1) if tensor.dim() > 1 else tensor[1:] != tensor[0]
            if bool(different.any()):
                return 1 + int(different.int().argmax())
    return -1 if any(not torch.equal(tensor[0], _changed(tensor[0])) for tensor in held) else None
