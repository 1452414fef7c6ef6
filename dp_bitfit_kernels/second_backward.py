"""The clipped sum of trained weights by a second backward, as the methods before book-keeping take it.

FastGradClip (Lee and Kifer 2021), GhostClip (Li et al., arXiv 2110.05679) and MixGhostClip (Bu et al., arXiv
2205.10683) run the backward twice: for the norms, and once more with each sample's part multiplied by its clip factor.
They are here to be compared with. The sum that comes of it is rounded to the integer grid once, and is within the
sensitivity only up to the float32 rounding of a whole backward, which nothing here bounds: engines say so, and
``secure_mode`` refuses it. Biases and small weights, which have rows, are summed from these and keep their guarantee.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ._nested import map_tensors
from ._validate import BatchLayoutError

CLIPPED_SUMS = ("book_keeping", "second_backward")

NOT_PROVEN = (
    "clipped_sum='second_backward' is there for comparison: the sensitivity of large weights holds up to the float32 "
    "rounding of a second backward, which is not bounded. Train with 'book_keeping'"
)


class SecondBackward:
    """Cuts the model's outputs off what follows, so that the step can run the backward through the model twice."""

    def __init__(self) -> None:
        self._cuts: list[tuple[Tensor, Tensor]] = []  # an output of the model, and the leaf that stands in for it

    @property
    def dirty(self) -> bool:
        """Whether a backward has come as far as the model's outputs."""
        return any(leaf.grad is not None for _, leaf in self._cuts)

    def clear(self) -> None:
        self._cuts.clear()

    def cut(self, output: Any, batch: int) -> Any:
        """The output with leaves in the places of its tensors.

        Raises:
            BatchLayoutError: one of them has no row a sample, so that no sample's part can be weighed.
        """

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            if tensor.dim() == 0 or tensor.shape[0] != batch:
                raise BatchLayoutError(
                    f"clipped_sum='second_backward' weighs each sample's output, but the model gives a tensor of shape "
                    f"{tuple(tensor.shape)} for {batch} samples: take the loss outside of the model"
                )
            own = tensor.detach().requires_grad_()
            self._cuts.append((tensor, own))
            return own

        return map_tensors(output, leaf)

    def first(self) -> None:
        """Backpropagate what reached the outputs, and keep the graph."""
        self._run([leaf.grad for _, leaf in self._cuts], keep=True)

    def second(self, weights: Tensor) -> None:
        """The same with each sample's part times its weight; weights [B] float32, 0 for a sample that is left out."""
        grads = []
        for _, leaf in self._cuts:
            grad, weight = leaf.grad, weights.view(-1, *(1,) * (leaf.dim() - 1))
            grads.append(None if grad is None else torch.where(weight == 0.0, 0.0, grad * weight).to(grad.dtype))
        self._run(grads, keep=False)

    def _run(self, grads: list[Tensor | None], keep: bool) -> None:
        pairs = [(output, grad) for (output, _), grad in zip(self._cuts, grads, strict=True) if grad is not None]
        torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs], retain_graph=keep)


class CutHook:
    """Cuts the outputs of the forwards of a private model; a copy or pickle of the model is not private."""

    def __init__(self, session: Any):
        self._session = ref(session) if session is not None else None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        session = self._session() if self._session is not None else None
        return output if session is None else session.after_forward(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return CutHook, (None,)
