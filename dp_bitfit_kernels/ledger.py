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
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import clipping
from ._validate import EngineError, UnsupportedModuleError
from .backends import Backend
from .layers import BiasLayer


class Contribution(Protocol):
    """Per-sample gradients of a range of ledger columns that are known only through their norms and sums."""

    def squared_norms(self) -> Tensor:
        """[B, L] float64: squares of the rows, by clipping group, in the units of the raw gradient."""

    def add_clipped(self, total: Tensor, factors: Tensor) -> None:
        """Add sum_i round(factors[i] * row_i), int64, to the contribution's columns of ``total`` [P].

        Args:
            factors: [B, L] float64; a factor of exactly 0 selects the row out, whatever it holds.
        """


@dataclass(frozen=True)
class Entry:
    """One trained parameter: columns ``start:stop`` of the ledger."""

    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    layers: tuple[tuple[BiasLayer, str], ...]  # every layer that gives its gradient, and its name there

    @property
    def still(self) -> slice:
        """Columns that a release leaves as they are."""
        layer, own = self.layers[0]
        start, stop = layer.still.get(own, (0, 0))
        return slice(self.start + start, self.start + stop)


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


def find_entries(model: nn.Module) -> list[Entry]:
    """The trained parameters of ``model`` in the order of ``named_parameters``, tied ones once.

    Raises:
        UnsupportedModuleError: a parameter with ``requires_grad`` is not trained by any converted layer.
    """
    owners: dict[int, list[tuple[BiasLayer, str]]] = {}
    for module in model.modules():
        if isinstance(module, BiasLayer):
            for own in sorted(module.trained):
                parameter = module.trained_parameter(own)
                if parameter is None:
                    raise UnsupportedModuleError(
                        f"parameter {own!r} of layer {module.layer_name!r} is no longer a parameter (pruned, "
                        "parametrized or removed after convert_model): change the model first, then convert it"
                    )
                if not parameter.requires_grad:
                    raise UnsupportedModuleError(
                        f"parameter {own!r} of layer {module.layer_name!r} was frozen after convert_model: "
                        "restore_model and leave it out by biases=('*', '!name'), or let it require a gradient again"
                    )
                owners.setdefault(id(parameter), []).append((module, own))
    entries: list[Entry] = []
    start = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) not in owners:
            raise UnsupportedModuleError(
                f"parameter {name!r} requires a gradient but no converted layer gives its per-sample gradient: "
                "run convert_model first, and freeze what it does not train"
            )
        stop = start + parameter.numel()
        entries.append(Entry(name, parameter, start, stop, tuple(owners[id(parameter)])))
        start = stop
    if not entries:
        raise UnsupportedModuleError("the model has no trained parameter: run convert_model first")
    devices = {e.parameter.device for e in entries}
    if len(devices) != 1:
        raise UnsupportedModuleError(f"trained parameters lie on several devices: {sorted(map(str, devices))}")
    return entries


@dataclass
class _Slab:
    rows: Tensor  # [B, P] float32
    parts: list[Tensor]  # per entry [B, p], views of rows
    mask: Tensor  # [B] bool
    leaves: list[Tensor] = field(default_factory=list)  # per entry [B, p], of the open batch alone
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

    def __init__(self, model: nn.Module, entries: Sequence[Entry], plan: clipping.ClipPlan, backend: Backend):
        _silence_layout_warning()
        self.entries = list(entries)
        self.width = self.entries[-1].stop  # P
        self.plan = plan
        self.backend = backend
        self.device = self.entries[0].parameter.device
        self.total = torch.zeros(self.width, dtype=torch.int64, device=self.device)
        self.privacy_statement: object = None
        self._offsets = torch.tensor(plan.offsets, dtype=torch.int64, device=self.device)
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

    def still(self) -> Tensor | None:
        """[P] bool: elements whose release is dropped. Which they are depends on no data, so that nothing is spent."""
        mask = torch.zeros(self.width, dtype=torch.bool, device=self.device)
        for entry in self.entries:
            mask[entry.still] = True
        return mask if any(entry.still.stop > entry.still.start for entry in self.entries) else None

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
            self._open and slab is not None and (slab.rows._version != slab.clean_version or bool(slab.contributions))
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
        for entry, part in zip(self.entries, slab.parts, strict=True):
            # Shares memory with the rows, not their version counter; its value is never read. A new one for each
            # batch, so that a backward through the graph of an earlier batch finds a leaf that leads nowhere.
            leaf = part.data.requires_grad_()
            leaf.grad = part
            slab.leaves.append(leaf)
            for layer, own in entry.layers:
                layer.set_leaf(own, leaf)
        self.opened += 1

    def _allocate(self, batch: int) -> _Slab:
        if self._storage.numel() < batch * self.width:
            self._slab = None  # let the smaller buffer go before the larger one comes
            self._storage = torch.empty(batch * self.width, dtype=torch.float32, device=self.device)
            self._masks = torch.empty(batch, dtype=torch.bool, device=self.device)
        rows = self._storage[: batch * self.width].view(batch, self.width)
        rows.zero_()
        parts = [rows[:, entry.start : entry.stop] for entry in self.entries]
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
        return [entry.name for number, entry in enumerate(self.entries) if number not in self._reached]

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
        for layer in self.layers:
            layer.drop_leaves()

    def absorb(self, scale: float) -> None:
        """Clip the rows of the open batch, add them to the integer total, and close the batch.

        Args:
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
        factors, norms = self.backend.clip_factors(
            slab.rows, self._offsets, slab.mask, self._bounds, self._grid, extra, scale, plan.gamma
        )
        if plan.factor_fn is not None:
            factors = clipping.custom_factors(plan, norms, slab.mask, scale)
        self.backend.clipped_sum_(self.total, slab.rows, self._offsets, factors)
        for contribution in slab.contributions:
            contribution.add_clipped(self.total, factors)
        slab.contributions.clear()
        self.close()

    def free(self) -> None:
        """Give the memory of the rows and of the sum back for good, whoever still holds a graph with a leaf of them."""
        self._slab = None
        self._storage.untyped_storage().resize_(0)  # a leaf's value is never read
        self._storage = self.total = torch.empty(0, device=self.device)

    def discard(self) -> None:
        """Drop the rows of the open batch and the sum of the draw; nothing of them was released."""
        self.close()
        self.total.zero_()
