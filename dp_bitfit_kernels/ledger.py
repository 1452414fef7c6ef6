"""The ledger: per-sample gradients of one physical batch, and their clipped integer sum.

One float32 buffer [B, P] holds the rows of all trained elements; each trained parameter owns a column
slice. Layers never write to it: a layer's Function takes a leaf ``rows`` that shares its slice and
returns the rows' gradient, so that autograd itself adds up a module used twice, a tied bias, a
checkpointed block, several backward calls.

What enters a release is a list of :class:`Contribution`: each gives squared norms first and, once the
clip factors of the whole row are known, adds its clipped integer sum. The dense rows are one of them; a
layer that never materialises its rows can be another.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import clipping
from ._precision import full_precision
from ._validate import EngineError
from .backends import Backend
from .entries import Entry, grouped
from .layers import BiasLayer
from .weights import WeightSink, Workshop


class Contribution(Protocol):
    """Per-sample gradients of a range of ledger columns that are known only through their norms and sums."""

    def squared_norms(self) -> Tensor:
        """[B, L] float64: squares of the rows, by clipping group, in the units of the raw gradient."""

    def add_clipped(self, total: Tensor, factors: Tensor) -> None:
        """Add sum_i round(factors[i] * row_i), int64, to the contribution's columns of ``total`` [P].

        Args:
            factors: [B, L] float64; a factor of exactly 0 selects the row out, whatever it holds.
        """


def _silence_layout_warning() -> None:
    """Spend autograd's once-a-process warning that a gradient slice of a wider buffer is not dense.

    The slices are meant to be so, and the in-place addition into them is what the ledger is built on.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide = torch.zeros(2, 3)
        leaf = wide[:, :2].data.requires_grad_()
        leaf.grad = torch.zeros(2, 3)[:, :2]
        (leaf * 0.0).sum().backward()


@dataclass
class _Slab:
    rows: Tensor  # [B, D] float32, D elements of the entries that have rows
    parts: list[Tensor]  # per such entry [B, p], views of rows
    mask: Tensor  # [B] bool
    leaves: list[Tensor] = field(default_factory=list)  # per such entry [B, p], of the open batch alone
    sinks: list[WeightSink] = field(default_factory=list)  # per other entry, of the open batch alone
    contributions: list[Contribution] = field(default_factory=list)
    clean_version: int = 0


def _note(reached: set[int], number: int, gradient: Tensor) -> None:
    reached.add(number)


class Ledger:
    """Rows of the open physical batch, and the running integer sum of the draw.

    Guarantees (design, sections 4 and 5): a row that is masked or not finite contributes exactly 0; every
    other row contributes an integer vector whose norm is at most ``clipping.GRID``; the sum over rows is exact.
    The graph of an earlier batch, kept by the user, never reaches the rows of a later one.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: Sequence[Entry],
        plan: clipping.ClipPlan,
        backend: Backend,
        norm: str = "mixed",
        twice: bool = False,
    ):
        _silence_layout_warning()
        self.entries = list(entries)
        self.dense = [entry for entry in entries if entry.dense]
        self.sunk = [entry for entry in entries if not entry.dense]
        self.width = self.entries[-1].stop  # P
        self.row_width = self.dense[-1].stop if self.dense else 0  # D
        self.plan = plan
        self.backend = backend
        self.device = self.entries[0].parameter.device
        self.total = torch.zeros(self.row_width, dtype=torch.int64, device=self.device)
        self._sums: list[Tensor | None] = [None] * len(self.sunk)  # of the others, where the draw has some
        self._keep_sums = False
        # Elements whose release is dropped. Which they are depends on no data, so that nothing is spent.
        self._still = [entry.still for entry in self.entries if entry.still.stop > entry.still.start]
        self.privacy_statement: object = None
        offsets, self._groups = grouped(self.entries, plan)
        self._offsets = torch.tensor(offsets, dtype=torch.int64, device=self.device)
        self._workshop = Workshop(backend, self.device, norm, twice)
        self._bounds = torch.tensor(plan.bounds, dtype=torch.float64, device=self.device)
        self._grid = torch.tensor(plan.grid, dtype=torch.float64, device=self.device)
        self._storage = torch.empty(0, dtype=torch.float32, device=self.device)
        self._masks = torch.empty(0, dtype=torch.bool, device=self.device)
        self._slab: _Slab | None = None
        self._open = False
        self._holder: weakref.ref[Any] | None = None
        self._reached: set[int] | None = None  # numbers of the entries that a watched batch has reached
        self.opened = 0  # batches so far
        self.shapes: list[tuple[int, ...]] = []  # of the tensors that the model was given last, where layers ask
        self.layers = [m for m in model.modules() if isinstance(m, BiasLayer)]
        for layer in self.layers:
            if layer.attachment is not None:
                raise EngineError("this model already has a PrivacyEngine attached: call its detach() first")
        for layer in self.layers:
            layer.attachment = self

    def release(self, key: Tensor, step: Tensor, stream: int, noise_std: float, scale: float) -> Tensor:
        """Noise on the sum of the draw, which is then forgotten -> [P] float32: scale * (S + round(noise_std z)).

        Args:
            key, step, stream: of the op ``noisy_sum_``; element n of the ledger takes block n, whatever part it is in.
        """
        arguments = (key, step, stream)
        release = torch.empty(self.width, dtype=torch.float32, device=self.device)
        for first, total in self._parts():
            part = release[first : first + len(total)]
            self.backend.noisy_sum_(part, total, *arguments, first, noise_std, scale)
        self.forget()
        for still in self._still:
            release[still].zero_()
        return release

    def _parts(self) -> Iterator[tuple[int, Tensor]]:
        """The integer sum of the draw by parts: the first of their elements, and the part [n] int64."""
        if self.dense:
            yield 0, self.total
        for entry, own in zip(self.sunk, self._sums, strict=True):
            yield entry.start, self._sum_of(entry) if own is None else own

    def _sum_of(self, entry: Entry) -> Tensor:
        return torch.zeros(entry.stop - entry.start, dtype=torch.int64, device=self.device)

    def forget(self) -> None:
        """Empty the sum of the draw. Those of weights without rows give their memory back: it is wanted elsewhere."""
        self.total.zero_()
        for number, own in enumerate(self._sums):
            if own is not None and self._keep_sums:
                own.zero_()
            else:
                self._sums[number] = None

    def detach(self) -> None:
        """Give the layers back to plain training."""
        self.close()
        for layer in self.layers:
            layer.attachment = None
            layer.__dict__["trained_before"] = self.opened > 0 or layer.trained_before

    @property
    def batch(self) -> int | None:
        """Number of physical rows of the open batch; None while none is open."""
        return self._slab.rows.shape[0] if self._open and self._slab is not None else None

    @property
    def dirty(self) -> bool:
        """Whether a backward has reached the open batch: autograd's own version counter of the rows says so."""
        slab = self._slab
        return (
            self._open
            and slab is not None
            and (
                slab.rows._version != slab.clean_version
                or bool(slab.contributions)
                or any(sink.used for sink in slab.sinks)
            )
        )

    def open(self, batch: int, mask: Tensor | None = None) -> None:
        """Make zeroed rows for ``batch`` samples and hand the leaves to the layers.

        Args:
            batch: B, physical rows.
            mask: [B] bool, False for rows that contribute nothing; None for all True.
        """
        self.close()
        slab = self._slab
        refilled_later = self.holder is not None and slab is not None and slab.rows.shape[0] == batch
        if slab is None or slab.rows.shape[0] != batch:
            slab = self._slab = self._allocate(batch)
        elif not refilled_later:
            slab.rows.zero_()
        slab.contributions.clear()
        if mask is None:
            slab.mask.fill_(True)
        else:
            slab.mask.copy_(mask, non_blocking=True)  # the host does not wait; what it wrote is taken at once
        self._open = True
        if refilled_later:
            slab.clean_version = slab.rows._version
        else:
            self._hand_out(slab)

    @property
    def holder(self) -> Any:
        """The captured step that opens batches by ``refill``, inside its own work; None: ``open`` does it all."""
        return None if self._holder is None else self._holder()

    def hold(self, holder: Any) -> None:
        if holder is not None and not self._keep_sums:  # a graph knows where they lie
            self._keep_sums = True
            self._sums = [self._sum_of(entry) for entry in self.sunk]
        self._holder = None if holder is None else weakref.ref(holder, self._left_alone)

    def _left_alone(self, holder: weakref.ref[Any]) -> None:
        """The step that held the ledger is gone: an open batch goes on eagerly."""
        if self._holder is holder and self._open:
            self.refill()

    @property
    def memory(self) -> tuple[Any, ...]:
        """Where the rows and the masks of all physical sizes lie: it changes when a larger one than before comes."""
        return self._storage.data_ptr(), self._masks.data_ptr()

    def refill(self) -> None:
        """Zero the rows of the open batch and hand out their leaves: what ``open`` leaves to a captured step."""
        slab = self._slab
        if slab is None or not self._open:
            raise EngineError("no batch is open")
        slab.rows.zero_()
        self._hand_out(slab)

    def _hand_out(self, slab: _Slab) -> None:
        """Give the layers new leaves: what leads to earlier ones adds nothing from now on."""
        slab.clean_version = slab.rows._version
        for leaf in slab.leaves:
            leaf.grad = None
        slab.leaves.clear()
        for entry, part in zip(self.dense, slab.parts, strict=True):
            # Shares memory with the rows, not their version counter; its value is never read. A new one for each
            # batch, so that a backward through the graph of an earlier batch finds a leaf that leads nowhere.
            leaf = part.data.requires_grad_()
            leaf.grad = part
            slab.leaves.append(leaf)
            for layer, own in entry.layers:
                layer.set_leaf(own, leaf)
        self._drop_sinks(slab)
        for entry, group in zip(self.sunk, self._groups, strict=True):
            sink = WeightSink(self._workshop, entry.name, entry.parameter.shape, group, len(slab.mask))
            slab.sinks.append(sink)
            for layer, own in entry.layers:
                layer.set_sink(own, sink)
        self.opened += 1

    def _drop_sinks(self, slab: _Slab) -> None:
        for sink in slab.sinks:
            sink.close()
        slab.sinks.clear()

    def _allocate(self, batch: int) -> _Slab:
        if self._storage.numel() < batch * self.row_width or self._masks.numel() < batch:
            self._slab = None  # let the smaller buffer go before the larger one comes
            self._storage = torch.empty(batch * self.row_width, dtype=torch.float32, device=self.device)
            self._masks = torch.empty(batch, dtype=torch.bool, device=self.device)
        rows = self._storage[: batch * self.row_width].view(batch, self.row_width)
        rows.zero_()
        parts = [rows[:, entry.start : entry.stop] for entry in self.dense]
        return _Slab(rows, parts, self._masks[:batch])

    def zero_rows(self) -> None:
        """Forget what was backpropagated into the open batch; it stays open, for forwards from now on."""
        slab = self._slab
        if slab is not None:
            slab.rows.zero_()
            slab.contributions.clear()
            self._hand_out(slab)

    def watch(self) -> None:
        """Note from now on, without looking at a value, which parameters the backward of the open batch reaches."""
        assert self._slab is not None
        self._reached = set()
        for number, leaf in enumerate(self._slab.leaves):
            leaf.register_hook(partial(_note, self._reached, number))

    def silent(self) -> list[str] | None:
        """Names of trained parameters that no gradient has reached since ``watch``; None where nothing was watched."""
        if self._reached is None or self._slab is None or self._slab.contributions:  # these go by no leaf
            return None
        silent = [entry.name for number, entry in enumerate(self.dense) if number not in self._reached]
        return silent + [sink.name for sink in self._slab.sinks if not sink.used]

    def contribute(self, contribution: Contribution) -> None:
        """Add a contribution to the open batch, beside the dense rows."""
        if self._slab is None or not self._open:
            raise EngineError("a contribution was made outside a batch")
        self._slab.contributions.append(contribution)

    def close(self) -> None:
        """Take the leaves away: a training forward outside a batch is then refused by the layers."""
        self._open, self._reached = False, None
        if self._slab is not None:
            for leaf in self._slab.leaves:
                leaf.grad = None
            self._slab.leaves.clear()
            self._drop_sinks(self._slab)
        for layer in self.layers:
            layer.drop_leaves()

    def absorb(self, scale: float, again: Callable[[Tensor], None] | None = None) -> None:
        """Clip the rows of the open batch, add them to the integer total, and close the batch.

        Args:
            again: runs the backward once more, with each sample weighed by its part of [B] float32; None where the
                sums of large weights are made of what the first backward left.
            scale: what one row is multiplied by to be the gradient of one sample's loss (undoes the loss scale
                and, for a mean, the division by the number of physical rows).
        """
        slab = self._slab
        if slab is None or not self._open:
            raise EngineError("no batch is open")
        plan = self.plan
        extra: Tensor | None = None
        for contribution in slab.contributions:
            squares = contribution.squared_norms()
            extra = squares if extra is None else extra + squares
        with full_precision():
            for sink in slab.sinks:
                if extra is None:
                    extra = torch.zeros((len(slab.mask), len(plan.bounds)), dtype=torch.float64, device=self.device)
                extra[:, sink.group] += sink.squares()
        factors, norms = self.backend.clip_factors(
            slab.rows, self._offsets, slab.mask, self._bounds, self._grid, extra, scale, plan.gamma
        )
        if plan.factor_fn is not None:
            factors = clipping.custom_factors(plan, norms, slab.mask, scale)
        self.backend.clipped_sum_(self.total, slab.rows, self._offsets, factors)
        for contribution in slab.contributions:
            contribution.add_clipped(self.total, factors)
        if again is not None:
            weights = (factors[:, 0] / clipping.GRID).float()
            for sink in slab.sinks:
                sink.weigh(weights)
            again(weights)
        with full_precision():
            self._add_sunk(slab, factors)
        slab.contributions.clear()
        self.close()

    def _add_sunk(self, slab: _Slab, factors: Tensor) -> None:
        # Those first that give most memory back, for the sums of the others.
        for number in sorted(range(len(slab.sinks)), key=lambda number: slab.sinks[number].balance):
            own = self._sums[number]
            fresh = own is None
            if own is None:
                entry = self.sunk[number]
                own = torch.empty(entry.stop - entry.start, dtype=torch.int64, device=self.device)
                self._sums[number] = own
            slab.sinks[number].add_clipped(own, factors, fresh)

    def free(self) -> None:
        """Give the memory of the rows and of the sum back for good, whoever still holds a graph with a leaf of them."""
        self._slab = None
        self._storage.untyped_storage().resize_(0)  # a leaf's value is never read
        self._storage = self.total = torch.empty(0, device=self.device)
        self._sums.clear()

    def discard(self) -> None:
        """Drop the rows of the open batch and the sum of the draw; nothing of them was released."""
        self.close()
        self.forget()
