"""One optimizer update for all trained parameters together, in place of one for each.

Hundreds of biases of a few hundred elements: per parameter, an update is launches and Python. So while an engine is
attached the trained parameters lie side by side in one tensor, in the order of the ledger, each a view of its piece,
and the user's own optimizer steps on that tensor with the release as its gradient. Its state, too, is kept in whole
tensors, of which ``optimizer.state`` has views: state_dict, load_state_dict and checkpoints are those of any optimizer.

This is for torch's element-wise optimizers only, where the update of a whole is that of its elements: bit for bit,
except that fused kernels (``fused=True``, here the default for Adam, AdamW and SGD on a CUDA device) may round the last
elements of a tensor otherwise than the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from ._nested import dense_in
from .entries import Entry

_FUSED = (optim.Adam, optim.AdamW, optim.SGD)
_ELEMENTWISE = (
    *_FUSED,
    optim.Adadelta,
    optim.Adagrad,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
)
_COUNTERS = ("step", "mu_product")  # state without dimensions, one for each parameter


@dataclass
class _Run:
    """Neighbours in the ledger that are in one parameter group."""

    group: int
    entries: list[Entry]
    values: nn.Parameter  # [stop - start], the parameters' memory

    @property
    def start(self) -> int:
        return self.entries[0].start

    @property
    def stop(self) -> int:
        return self.entries[-1].stop


def watched(optimizer: Optimizer) -> bool:
    """Whether hooks look at the optimizer's step: they must find its parameters and gradients as they are."""
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    everywhere = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    return any(hooks) or any(everywhere)


def _why_not(optimizer: Optimizer, entries: Sequence[Entry], model: nn.Module) -> str | None:
    """Why the parameters must stay apart, or None."""
    if type(optimizer) not in _ELEMENTWISE:
        return f"{type(optimizer).__name__} is not known to work element by element"
    if watched(optimizer):
        return "hooks look at the optimizer's step"
    memory: dict[int, int] = defaultdict(int)
    for tensor in chain.from_iterable(map(dense_in, chain(model.parameters(), model.buffers()))):
        if tensor.layout == torch.strided:
            memory[tensor.untyped_storage().data_ptr()] += 1
    for entry in entries:
        parameter = entry.parameter
        shared = parameter.is_shared() and not parameter.is_cuda  # memory of a CUDA device always counts as shared
        if type(parameter) is not nn.Parameter or not parameter.is_contiguous() or shared:
            return f"{entry.name} is no ordinary parameter"
        storage = parameter.untyped_storage()
        own = storage.nbytes() == parameter.numel() * parameter.element_size()
        if not own or memory[storage.data_ptr()] != 1:
            return f"{entry.name} shares its memory"
    return None


class FlatUpdate:
    """The trained parameters as one tensor for each parameter group (more, where groups alternate in the ledger).

    Guarantee: after each update, parameters and optimizer state have the values of the optimizer's step on each
    parameter by itself, up to the rounding of fused kernels.
    """

    def __init__(self, original: Optimizer, entries: Sequence[Entry]):
        self._original = original
        self._runs = _runs(original, entries)
        self._state: dict[nn.Parameter, dict[str, Any]] = defaultdict(dict)  # of whole runs
        self._views: Any = None  # what original.state was set to
        self._spread: list[tuple[Tensor, Tensor]] = []  # (copies [n], the run's own counter)
        self._versions: list[int] = []  # of the copies
        self._shown: list[Any] = []  # every value in it
        self._seen: list[Any] = []  # the state that the views are of
        self._generation = 0  # of the memory of parameters and state
        self._rates: list[Tensor] = []  # of the groups, on the device, for captured updates
        self._move_in()

    @classmethod
    def of(cls, original: Optimizer, entries: Sequence[Entry], model: nn.Module) -> FlatUpdate | None:
        """None where the parameters must stay apart, or there is nothing to gain."""
        if _why_not(original, entries, model) is not None:
            return None
        if len(_grouped(original, entries)) == len(entries):
            return None
        flat = cls(original, entries)
        return flat if flat.take_up() else None

    def take_up(self) -> bool:
        """Follow what was done from outside since the last update: parameters moved, a state loaded.

        Returns:
            False where that cannot be followed; the parameters are then on their own again, for good.
        """
        followed = not watched(self._original)
        if followed and self._moved():
            followed = all(
                entry.parameter.device == run.values.device and entry.parameter.dtype == run.values.dtype
                for run in self._runs
                for entry in run.entries
            )
            if followed:
                self._move_in()
        if followed and not self._as_shown():
            followed = self._join_state()
            if followed:
                self._show_state()
        if not followed:
            self.give_up()
        return followed

    def update(self, release: Tensor) -> None:
        """Let the optimizer step on the release [P] float32."""
        self._step(release, in_graph=False)
        self._show_new_state()

    def update_in_graph(self, release: Tensor) -> None:
        """The same, to be captured after ``prepare_capture``: device work only."""
        self._step(release, in_graph=True)

    def _step(self, release: Tensor, in_graph: bool) -> None:
        for run in self._runs:
            run.values.grad = release[run.start : run.stop].to(run.values.dtype)
        try:
            with self._in_place_of_the_parameters(in_graph):
                self._original.step()
        finally:
            for run in self._runs:
                run.values.grad = None
        for copies, counter in self._spread:
            copies.copy_(counter)
        self.note_versions()

    def note_versions(self) -> None:
        """From here on, who writes to the counters that the user's state shows does so from outside."""
        self._versions = [copies._version for copies, _ in self._spread]

    def give_up(self) -> None:
        """Give each parameter memory and state of its own again."""
        for run in self._runs:
            for entry in run.entries:
                if entry.parameter.data_ptr() == self._piece(run, entry).data_ptr():
                    entry.parameter.data = entry.parameter.data.clone()
        if self._original.state is self._views:
            for state in self._original.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        state[key] = value.clone()
        self._views, self._state, self._spread, self._shown, self._seen = None, defaultdict(dict), [], [], []
        for run in self._runs:
            run.values.data = run.values.data[:0].clone()  # a captured step may still hold this update

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may hold the update: it then reads its learning rate and counters on the device."""
        return type(self._original) in _FUSED and self._runs[0].values.is_cuda

    def prepare_capture(self) -> None:
        """Learning rates and counters onto the device, where a captured update reads them."""
        device = self._runs[0].values.device
        self._rates = [torch.zeros((), device=device) for _ in self._original.param_groups]
        self.set_rates()
        for state in self._state.values():
            for key in _COUNTERS:
                if isinstance(state.get(key), Tensor):
                    state[key] = state[key].to(device=device, dtype=torch.float32)
        self._show_new_state()

    def set_rates(self) -> None:
        """Bring the rates that a scheduler set to the device; before each replay."""
        for rate, group in zip(self._rates, self._original.param_groups, strict=True):
            if isinstance(group["lr"], Tensor):
                rate.copy_(group["lr"])
            else:
                rate.fill_(group["lr"])

    def signature(self) -> tuple[Any, ...]:
        """Changes when a captured update no longer does what an update would do: hyperparameters, state, memory."""
        settings = tuple(
            (key, id(value) if isinstance(value, Tensor) else value)
            for group in self._original.param_groups
            for key, value in group.items()
            if key not in ("params", "lr", "initial_lr")
        )
        return settings, self._generation

    def _piece(self, run: _Run, entry: Entry) -> Tensor:
        piece = run.values.detach()[entry.start - run.start : entry.stop - run.start]
        return piece.view(entry.parameter.shape)

    def _moved(self) -> bool:
        for run in self._runs:
            size = run.values.element_size()
            begin = run.values.data_ptr() - size * run.start
            for entry in run.entries:
                parameter = entry.parameter
                if parameter.data_ptr() != begin + size * entry.start or not parameter.is_contiguous():
                    return True
        return False

    def _move_in(self) -> None:
        """The parameters' values into one new tensor (the user may hold on to what was moved), and they onto it."""
        for run in self._runs:
            run.values.data = torch.cat([entry.parameter.detach().flatten() for entry in run.entries])
        for run in self._runs:
            for entry in run.entries:
                # By way of DLPack, so that each has a storage of its own extent: who saves a parameter, or asks whether
                # two share memory (safetensors), sees that one only.
                piece = self._piece(run, entry)
                with torch.cuda.device_of(piece):
                    entry.parameter.data = torch.utils.dlpack.from_dlpack(piece) if piece.numel() else piece
        self._generation += 1

    @contextmanager
    def _in_place_of_the_parameters(self, in_graph: bool) -> Iterator[None]:
        original = self._original
        groups, state = original.param_groups, original.state
        whole = [{**group, "params": [], **self._settings(i, group, in_graph)} for i, group in enumerate(groups)]
        for run in self._runs:
            whole[run.group]["params"].append(run.values)
        original.param_groups, original.state = whole, self._state  # type: ignore[assignment]
        try:
            yield
        finally:
            original.param_groups, original.state = groups, state

    def _settings(self, number: int, group: dict[str, Any], in_graph: bool) -> dict[str, Any]:
        if in_graph:
            capturable = {"capturable": True} if "capturable" in group else {}
            return {"lr": self._rates[number], "fused": True, "foreach": None, **capturable}
        chosen = group.get("fused") is not None or group.get("foreach") is not None
        if type(self._original) in _FUSED and self._runs[0].values.is_cuda and not chosen:
            return {"fused": True}
        return {}

    def _values(self) -> list[Any]:
        return [value for run in self._runs for value in self._state.get(run.values, {}).values()]

    def _show_new_state(self) -> None:
        """Where the optimizer made a state, the user's one gets views of it."""
        values = self._values()
        if len(values) != len(self._seen) or any(a is not b for a, b in zip(values, self._seen, strict=True)):
            self._show_state()

    def _show_state(self) -> None:
        views: Any = defaultdict(dict)
        trained = {id(entry.parameter) for run in self._runs for entry in run.entries}
        self._spread = []
        for run in self._runs:
            for key, value in self._state.get(run.values, {}).items():
                counter = isinstance(value, Tensor) and key in _COUNTERS
                copies = value.expand(len(run.entries)).clone() if counter else None
                if copies is not None:
                    self._spread.append((copies, value))
                for number, entry in enumerate(run.entries):
                    if copies is not None:
                        views[entry.parameter][key] = copies[number]
                    elif isinstance(value, Tensor):
                        piece = value[entry.start - run.start : entry.stop - run.start]
                        views[entry.parameter][key] = piece.view(entry.parameter.shape)
                    else:
                        views[entry.parameter][key] = value
        for parameter, state in self._original.state.items():
            if id(parameter) not in trained:  # of frozen parameters: none of our business
                views[parameter] = state
        self._original.state = self._views = views
        self._shown = [value for state in views.values() for value in state.values()]
        self.note_versions()
        self._generation += 1
        self._seen = self._values()

    def _as_shown(self) -> bool:
        """Whether the user's optimizer has the state that was put there, as it was put there."""
        if self._original.state is not self._views:
            return False
        present = [value for state in self._views.values() for value in state.values()]
        if len(present) != len(self._shown) or any(a is not b for a, b in zip(present, self._shown, strict=True)):
            return False
        return [copies._version for copies, _ in self._spread] == self._versions

    def _join_state(self) -> bool:
        """The state of the single parameters as that of the runs; False where it differs between neighbours."""
        joined: dict[nn.Parameter, dict[str, Any]] = defaultdict(dict)
        for run in self._runs:
            states = [self._original.state.get(entry.parameter, {}) for entry in run.entries]
            if any(state.keys() != states[0].keys() for state in states):
                return False
            for key in states[0]:
                values = [state[key] for state in states]
                if isinstance(values[0], Tensor) and key not in _COUNTERS:
                    if any(v.shape != e.parameter.shape for v, e in zip(values, run.entries, strict=True)):
                        return False
                    joined[run.values][key] = torch.cat([value.detach().flatten() for value in values])
                elif any(value != values[0] for value in values):
                    return False
                else:
                    first = values[0]
                    joined[run.values][key] = first.clone() if isinstance(first, Tensor) else first
        self._state = joined
        return True


def _grouped(original: Optimizer, entries: Sequence[Entry]) -> list[tuple[int, list[Entry]]]:
    """Ledger order, cut where the parameter group or the dtype changes."""
    group_of = {id(p): i for i, group in enumerate(original.param_groups) for p in group["params"]}
    cut: list[tuple[int, list[Entry]]] = []
    for entry in entries:
        group = group_of[id(entry.parameter)]
        if not cut or cut[-1][0] != group or cut[-1][1][-1].parameter.dtype != entry.parameter.dtype:
            cut.append((group, []))
        cut[-1][1].append(entry)
    return cut


def _runs(original: Optimizer, entries: Sequence[Entry]) -> list[_Run]:
    return [
        _Run(group, own, nn.Parameter(own[0].parameter.new_empty(own[-1].stop - own[0].start)))
        for group, own in _grouped(original, entries)
    ]
