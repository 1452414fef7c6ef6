"""What is proven of the layout of a model's layers, for which calls it holds, and when it is asked again."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from . import layout
from ._nested import form, tensors_in
from ._validate import BatchLayoutError, EngineError
from .layers import BiasLayer
from .layout import modules_of

_MANY = 32  # ways of calling a model that are remembered


class Proofs:
    """Of one model in one private training run.

    Guarantees:
        Layers go by the proof of the present training modes and of the form of the present call, or by none.
        The layout is asked on batches 1, 2, 4, 8, ..., on each new form of call, in each new set of training modes,
        and, where windows of fixed sizes are folded into the batch, for each new size of the inputs.

    Attributes:
        asked: whether the open batch was shown to the proof.
        traced: inputs of a compiled forward of the open batch; nothing can be asked while a model is traced.
        impossible: no layout can be proven: the batch was declared and is not to be seen in the inputs.
    """

    def __init__(self, model: nn.Module, layers: list[BiasLayer]):
        self.model, self.layers = model, layers
        self.asked = False
        self.traced: tuple[Any, Any] | None = None
        self.impossible = False
        self._warned = False
        self._known: dict[bytes, dict[Any, layout.Proof]] = {}  # training modes -> form of call, sizes -> proof
        self._applied: layout.Proof | None = None  # what the layers go by
        self._shared: set[tuple[int, ...]] = set()  # inputs that once were not B long: see ``_learn``

    def modes(self) -> bytes:
        """A model may mix samples, or write a buffer, in training mode only: each combination is proven by itself."""
        return bytes([module.training for module in modules_of(self.model)])

    @property
    def settled(self) -> bool:
        """Whether all that is asked of the model in its present modes has been asked once."""
        return self.impossible or self.modes() in self._known

    def open(self) -> None:
        """A new batch."""
        self.asked, self.traced = False, None

    def before_forward(self, args: Any, kwargs: Any, batch: int, opened: int) -> None:
        """Let the layers go by what is proven of this call; ask where nothing is.

        opened: number of batches so far, with this one.

        Raises:
            BatchLayoutError: see ``layout.prove``.
        """
        self._learn(args, kwargs, batch)
        if self.asked:
            return
        # What batches hold may change what a model does with them: asked again, ever more rarely.
        again = opened & (opened - 1) == 0
        known = self._of((args, kwargs))
        if again or known is None:
            self._prove(args, kwargs, batch)
        elif known is not self._applied:  # a call of another form before may have arranged layers otherwise
            self._apply(known)

    def before_step(self, batch: int, declared: bool) -> None:
        """Ask what the forward could not: the model was compiled, or only modules inside it were called.

        Raises:
            BatchLayoutError: also where compiled code took the layout for another.
            EngineError: nothing was seen that could be asked.
        """
        if self.asked or self.settled:
            return
        if self.traced is not None:
            self._prove(*self.traced, batch, late=True)
        elif declared:
            self._warn("only modules inside the private model were called")
        else:
            raise EngineError(
                "only modules inside the private model were called, not the model itself: the layout of its layers "
                "cannot be proven. Call the model once on a batch, or declare the batch: `with engine.batch(B):`"
            )

    def _prove(self, args: Any, kwargs: Any, batch: int, late: bool = False) -> None:
        """Prove the layout, and tell the layers; ``late``: after a forward that relied on what they knew before."""
        self.asked = True
        if batch not in layout.leading_sizes(args, kwargs):
            self._warn("no tensor input of the model has the batch as its leading dimension")
            return
        modes = self.modes()
        shared, earlier = self._learn(args, kwargs, batch), self._of((args, kwargs))
        try:
            proof = layout.prove(self.model, args, kwargs, batch, self.layers, shared, earlier is not None)
        except layout.NoNumbers:
            if earlier is None:
                raise
            self._apply(earlier)
            return
        unlike = proof.unlike_before() if late else []
        self._apply(proof)
        if unlike:
            raise BatchLayoutError(
                f"the compiled model took the rows of layer {unlike[0]!r} for samples, which they are not. Now its "
                "layout is known: compile the model again (torch.compiler.reset()), or run one eager forward before"
            )
        if proof.complete:  # else the next batch is asked again
            sizes = _sizes((args, kwargs)) if proof.of_these_sizes else None
            known = self._known.setdefault(modes, {})
            known[form((args, kwargs), numbers=True), sizes] = proof
            if len(known) > _MANY:
                del known[next(iter(known))]
                self._warn_of_many()

    def _learn(self, args: Any, kwargs: Any, batch: int) -> frozenset[int]:
        """Places of inputs that had their present leading size in a batch of another: masks [T, T] and class weights,
        which are as long as the batch by chance now. Of other sizes nothing is known: a mask for all samples, [1, T],
        may be one of each in the next batch."""
        tensors = list(tensors_in((args, kwargs)))
        dims = tuple(tensor.dim() for tensor in tensors)
        sizes = {place: tensor.shape[0] for place, tensor in enumerate(tensors) if tensor.dim()}
        self._shared |= {(place, size, *dims) for place, size in sizes.items() if size != batch}
        return frozenset(place for place, size in sizes.items() if (place, size, *dims) in self._shared)

    def _of(self, arguments: Any) -> layout.Proof | None:
        known, asked = self._known.get(self.modes(), {}), form(arguments, numbers=True)
        return known.get((asked, _sizes(arguments))) or known.get((asked, None))

    def _apply(self, proof: layout.Proof) -> None:
        proof.apply()
        self._applied = proof

    def _warn_of_many(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the model was called in more than {_MANY} ways, by a number or a word in its arguments, or by sizes "
                "of images: the layout is asked for each, which takes longer than the step. Keep a number that "
                "changes with each batch in a tensor or an attribute",
                stacklevel=6,
            )

    def _warn(self, why: str) -> None:
        if not self.impossible:
            self.impossible = True
            warnings.warn(
                f"{why}: the layout of the layers cannot be proven with one more sample, only their leading sizes are "
                "checked",
                stacklevel=5,
            )


def _sizes(arguments: Any) -> tuple[tuple[int, ...], ...]:
    """Of every tensor but for the leading dimension."""
    return tuple(tuple(tensor.shape[1:]) for tensor in tensors_in(arguments))
