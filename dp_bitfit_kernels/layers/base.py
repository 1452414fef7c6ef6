"""What every converted layer shares: the swap of its class, the tap on its output, the registry of kinds.

A layer is converted by giving the instance a subclass of its own class, so parameters, buffers, hooks,
``isinstance`` and state_dict keys stay as they are; restoring gives it its class back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._validate import BatchLayoutError, ConversionError, EngineError
from ..arrangement import PLAIN, Arrangement
from ..functional import BiasGradFunction, apply
from ..functional_weight import WeightRowsFunction, tell

if TYPE_CHECKING:
    from ..weight_uses import Use
    from ..weights import WeightSink

# Everything that a conversion or an engine sets on an instance; removed by restore_layer. Copies and pickles take the
# first six along.
STATE = (
    *("trained", "backend", "layer_name", "memory", "still", "in_phases"),
    *("attachment", "bias_rows", "weight_rows", "ran_in", "trained_before"),
    *("arrangement", "leaves", "calls", "tried", "written", "weight_sinks"),
    *("same_for_all", "trial_copies"),
)
_KEPT = STATE[:6]


class ConvertedLayer(nn.Module):
    """Mixin in front of a module's own class.

    Attributes:
        trained: names of the module's own parameters that are trained.
        backend: which backend serves its ops.
        layer_name: the module's name in the model, for messages.
        memory: "exact", "compact" or "off": what is kept for backward.
        still: name of a trained parameter -> (start, stop), elements of it that a release leaves as they are.
    """

    trained: frozenset[str] = frozenset()
    backend: str = "auto"
    layer_name: str = ""
    memory: str = "off"
    still: Mapping[str, tuple[int, int]] = MappingProxyType({})
    converted_from: type[nn.Module]
    mixin: type[ConvertedLayer]
    keeps_name = False  # whether the made class has the name of the module's: some classes are known by it
    stands_for: tuple[str, ...] = ("forward",)  # methods of the module's class that the mixin has on purpose
    keeps_little = False  # whether the lean form keeps next to nothing, rather than one tensor

    @property
    def lean(self) -> bool:
        """Whether this forward may run through a function that keeps less for backward than autograd would.

        Not under torch.compile, whose partitioner chooses itself what to keep and fuses what is around it, and not
        under the transforms of torch.func.
        """
        return (
            self.memory != "off"
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and not self.has_old_hooks()
            and self.gives_all_gradients()
        )

    def has_old_hooks(self) -> bool:
        """Hooks of register_backward_hook act on the node of the last operation, behind what hands sums over."""
        return bool(self._backward_hooks) and self._is_full_backward_hook is False

    def gives_all_gradients(self) -> bool:
        """Whether no parameter wants a gradient that the lean function of this class does not give."""
        return True

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Copies and pickles are unattached: per-sample gradients never travel with a model.
        own: Any = getattr(self, "__getstate__", lambda: self.__dict__)()  # Python 3.10 has no default one
        state = {k: v for k, v in own.items() if k not in STATE or k in _KEPT}
        kind = kind_of_class(self.converted_from)
        own = () if kind is not None and kind.mixin is self.mixin else (self.mixin,)
        return _rebuild, (self.converted_from, *own), state


class BiasLayer(ConvertedLayer):
    """A converted layer that can have a trained bias.

    Attributes:
        attachment: the ledger of the engine that is attached, or None.
        bias_rows, weight_rows: leaves [B, p] and [B, p * d] of the open batch, or None.
        arrangement: where its output holds the samples.
        sinkable: its parameters whose gradients it can give to a sink, without rows.
        in_phases: names of its parameters that any phase of the run trains; empty where there are none.
    """

    sinkable: frozenset[str] = frozenset()
    attachment: Any = None
    in_phases: frozenset[str] = frozenset()
    ran_in: int = -1  # number of the batch that it last ran on
    trained_before: bool = False  # by an engine that is detached
    bias_rows: Tensor | None = None
    weight_rows: Tensor | None = None
    arrangement: Arrangement = PLAIN

    channels_first = False
    holds_samples = True  # whether its output does, so that the proof of the layout asks where

    def trained_parameter(self, name: str) -> nn.Parameter | None:
        """The parameter of this name, one of ``trained``; None where it is no longer one."""
        return self._parameters.get(name)

    def set_leaf(self, name: str, leaf: Tensor) -> None:
        """Take the leaf of the open batch for the parameter of this name."""
        self.__dict__[f"{name}_rows"] = leaf

    def drop_leaves(self) -> None:
        """Forget the leaves: no batch is open."""
        for name in ("bias_rows", "weight_rows", "weight_sinks"):
            self.__dict__.pop(name, None)

    def has_leaves(self) -> bool:
        return self.open_batch() is not None

    def stays(self, own: str) -> tuple[int, int]:
        """(start, stop), the elements of this parameter that a release leaves as they are."""
        return self.still.get(own, (0, 0))

    def open_batch(self) -> int | None:
        """Samples of the open batch; None while there is none."""
        for rows in (self.bias_rows, self.weight_rows):
            if rows is not None:
                return rows.shape[0]
        return next((sink.batch for sink in self.__dict__.get("weight_sinks", {}).values()), None)

    def set_sink(self, name: str, sink: WeightSink) -> None:
        """Take the sink of the open batch for the parameter of this name, one of ``sinkable``."""
        self.__dict__.setdefault("weight_sinks", {})[name] = sink

    def plain_bias(self) -> Tensor | None:
        """The bias as the operation sees it: cut from autograd where the tap delivers its gradient."""
        if "bias" in self.trained:
            return self.own_bias().detach()
        bias: Tensor | None = getattr(self, "bias", None)
        return bias

    @property
    def private_weight(self) -> bool:
        """Whether the weight is trained by an engine: cut from autograd, its gradient taken from the output's."""
        return "weight" in self.trained and self.attachment is not None

    def plain_weight(self) -> Any:
        """The weight as the operation sees it."""
        weight: Any = self.weight
        return weight.detach() if self.private_weight else weight

    def weighed(self, output: Tensor, inputs: Tensor, make: Callable[..., Use]) -> Tensor:
        """Pass ``output`` on; its gradient will also give the weight's rows, or reach its sink.

        make: (grad, inputs, kind=, batch=) -> what they say of the weight's gradient.
        """
        if not self.private_weight or not self.recording():
            return output
        self.check_rows(output)
        batch = self.open_batch()
        make = partial(make, kind=self.kind, batch=batch)
        sink = self.__dict__.get("weight_sinks", {}).get("weight")
        if sink is not None:
            return tell(output, inputs, sink, make, self.layer_name)
        height = self.trained_parameter("weight").shape[0]  # type: ignore[union-attr]
        return apply(WeightRowsFunction, output, inputs.detach(), self.weight_rows, make, height, self.layer_name)

    def own_bias(self) -> Tensor:
        """The trained bias, looked up directly: getattr takes four times as long."""
        bias = self._parameters.get("bias")
        if bias is None:
            raise ConversionError(
                f"the bias of layer {self.layer_name!r} is no longer its parameter (pruned, parametrized or removed "
                "after convert_model): change the model first, then convert it"
            )
        return bias

    def recording(self) -> bool:
        """True while gradients of this forward are to be taken; refuses a private forward outside a batch."""
        if not self.trained:
            return False
        ledger = self.attachment
        if ledger is None:
            return torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            # A checkpointed block runs again in the backward: then only for the batch that it ran on before.
            if torch._C._current_graph_task_id() == -1:
                self.__dict__["ran_in"] = ledger.opened
            elif self.ran_in != ledger.opened:
                raise EngineError(
                    f"layer {self.layer_name!r} is computed again for the backward of an earlier batch than the open "
                    "one: call backward() before the next batch is drawn"
                )
        if not torch.is_grad_enabled():
            return False
        if not self.has_leaves():
            raise EngineError(
                f"layer {self.layer_name!r} of a private model ran a training forward outside a batch: call the "
                "model itself on a batch of the private loader, or use `with engine.batch(B):`; "
                "for evaluation use torch.no_grad(); beside a captured step, close() it first"
            )
        return True

    def unbatched(self) -> bool:
        """For an input without a batch dimension: True, so that the layer runs as it did before, by autograd alone;
        refused where gradients of samples are to be taken."""
        if self.trained and self.attachment is not None and self.recording():
            raise BatchLayoutError(f"layer {self.layer_name!r}: its input has no batch dimension")
        return True

    def check_rows(self, output: Tensor) -> None:
        """Refuse an output that does not hold the batch as was proven."""
        batch = self.open_batch()
        if batch is None or (output.dim() > 1 and output.shape[0] == batch and self.arrangement is PLAIN):
            return
        if self.arrangement is PLAIN or not self.arrangement.holds(output.shape, batch, self.attachment.shapes):
            raise BatchLayoutError(
                f"layer {self.layer_name!r}: output of shape {tuple(output.shape)} does not have the batch "
                f"({batch} samples) where it was proven to be. A sequence-first, folded or flattened layout is "
                "proven by a forward in eager mode, on a batch whose samples lead the model's inputs"
            )

    def tap(self, output: Tensor) -> Tensor:
        """Pass ``output`` on; its gradient will also give the bias's rows (or, with no engine, its sum)."""
        if "bias" not in self.trained or not self.recording():
            return output
        self.check_rows(output)
        rows = self.bias_rows
        bias = self.own_bias() if rows is None else None
        kind = None if rows is None else self.kind
        return apply(BiasGradFunction, output, bias, rows, self.channels_first, self.backend, kind)

    @property
    def kind(self) -> str | None:
        """The kind of its arrangement; None where each sample is one row."""
        return None if self.arrangement is PLAIN else self.arrangement.kind

    def through(self, function: Any, input: Tensor, *arguments: Any) -> Tensor:
        """``function`` of the input, which gives the bias its gradient itself where each sample is one row."""
        plain = self.arrangement is PLAIN
        target = (self.target(input) if plain else None) or (None, None)
        output = apply(function, input, *target, *arguments)
        return output if plain else self.tap(output)

    def target(self, input: Tensor) -> Target | None:
        """What a function that computes the output itself is to deliver the bias's gradient to; None: nothing."""
        if "bias" not in self.trained or not self.recording():
            return None
        self.check_rows(input)
        rows = self.bias_rows
        return Target(self.own_bias() if rows is None else None, rows)


class Target(NamedTuple):
    """Where a bias's gradient goes: to the bias, summed over the batch, or to its leaf ``rows`` [B, p], per sample."""

    bias: Tensor | None
    rows: Tensor | None


def _rebuild(original: type[nn.Module], mixin: type[ConvertedLayer] | None = None) -> nn.Module:
    if mixin is None:
        kind = kind_of_class(original)
        if kind is None:
            raise ConversionError(f"no layer kind is registered for {original.__name__}")
        mixin = kind.mixin
    cls = converted_class(original, mixin)
    return cls.__new__(cls)


@dataclass(frozen=True)
class LayerKind:
    """How one family of layers is converted.

    Attributes:
        name: for the report.
        base: the class whose forward the mixin stands in for.
        mixin: the forward with the tap, or the one that keeps less for backward.
        bias_names: parameters whose per-sample gradients the kind gives.
        whole_names: parameters it can train when its module is trained whole.
        freezes_statistics: running statistics are used as they are, in training too.
        keeps_less: in which settings of ``memory`` it is swapped though nothing of it is trained.
        methods: methods that the mixin's forward relies on; a subclass that overrides one is not of this kind.
        gives_below: names the part of an instance below it whose parameters it gives, if any.
        problem: says why an instance cannot be converted, or returns None.
    """

    name: str
    base: type[nn.Module]
    mixin: type[ConvertedLayer]
    bias_names: tuple[str, ...] = ("bias",)
    whole_names: tuple[str, ...] = ("bias",)
    freezes_statistics: bool = False
    keeps_less: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("forward",)
    gives_below: Callable[[nn.Module], str | None] = lambda module: None
    problem: Callable[[nn.Module], str | None] = lambda module: None


_KINDS: list[LayerKind] = []
_LAZY: list[Callable[[type], LayerKind | None]] = []
_CLASSES: dict[tuple[type, type], type[ConvertedLayer]] = {}


def register(kind: LayerKind) -> LayerKind:
    """Add a kind; later kinds are looked at first, so that a subclass may have its own."""
    _KINDS.insert(0, kind)
    return kind


def register_lazy(find: Callable[[type], LayerKind | None]) -> None:
    """Add a finder for classes of packages that may not be installed; called with the module's class."""
    _LAZY.append(find)


def kind_of_class(cls: type) -> LayerKind | None:
    """The kind that serves ``cls``: the class itself, or a subclass with the parent's forward and helpers."""
    for find in _LAZY:
        kind = find(cls)
        if kind is not None:
            return kind
    for kind in _KINDS:
        if issubclass(cls, kind.base) and all(
            getattr(cls, m, None) is getattr(kind.base, m, None) for m in kind.methods
        ):
            return kind
    return None


def lookup(module: nn.Module) -> LayerKind | None:
    """The kind of ``module``, converted or not; None where no kind fits."""
    if "forward" in module.__dict__:  # an instance whose forward was replaced is not what its class says
        return None
    return kind_of_class(module.converted_from if isinstance(module, ConvertedLayer) else type(module))


def is_converted(module: nn.Module) -> bool:
    return isinstance(module, ConvertedLayer)


def converted_class(cls: type[nn.Module], mixin: type[ConvertedLayer]) -> type[ConvertedLayer]:
    """The subclass ``(mixin, cls)``, made once for each class."""
    found = _CLASSES.get((cls, mixin))
    if found is None:
        prefix = "Bias" if issubclass(mixin, BiasLayer) else "Lean"
        name, own = f"{prefix}{cls.__name__}", {"converted_from": cls, "mixin": mixin, "__module__": __name__}
        if mixin.keeps_name:
            name, own["__module__"], own["__qualname__"] = cls.__name__, cls.__module__, cls.__qualname__
        found = _CLASSES[cls, mixin] = type(name, (mixin, cls), own)
    return found


def convert_layer(module: nn.Module, kind: LayerKind) -> None:
    """Swap the class of ``module`` in place."""
    module.__class__ = converted_class(type(module), kind.mixin)


def shadowed(module: nn.Module, mixin: type[ConvertedLayer]) -> list[str]:
    """Names of the mixin that the module or its class has for something else."""
    ours = {name for cls in mixin.__mro__ if issubclass(cls, ConvertedLayer) for name in vars(cls)}
    parts = (vars(module), module._parameters, module._buffers, module._modules)
    theirs = {name for part in parts for name in part.keys()}  # noqa: SIM118  a scripted module's is no dict
    theirs |= {name for cls in type(module).__mro__ if cls not in nn.Module.__mro__ for name in vars(cls)}
    shared = {name for name in (ours | set(STATE)) & theirs if not name.startswith("__")}
    return sorted(shared - {*mixin.stands_for, "_abc_impl"})


def restore_layer(module: nn.Module) -> None:
    """Give ``module`` its own class back and remove what conversion set on it."""
    if isinstance(module, ConvertedLayer):
        for name in STATE:
            module.__dict__.pop(name, None)
        module.__class__ = module.converted_from  # type: ignore[assignment]
