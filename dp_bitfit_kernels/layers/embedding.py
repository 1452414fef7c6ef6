"""Embeddings: their weight is trained only where the module is named whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._validate import BatchLayoutError
from ..arrangement import by_sample
from ..weight_uses import Lookup
from .base import BiasLayer, LayerKind, register
from .spread import Copies


class EmbeddingLayer(BiasLayer):
    """y [B, ..., d], the rows of W [V, d] that the tokens [B, ...] number.

    The gradient of a sample is one vector for each token that it has. ``padding_idx`` gets none, as in PyTorch, nor
    noise, where no other layer has the weight.
    """

    sinkable = frozenset({"weight"})
    same_for_all = False  # whether its tokens are the same for all samples: positions, [1, T] or [T]
    trial_copies: Copies | None = None

    def stays(self, own: str) -> tuple[int, int]:
        m: Any = self
        if own != "weight" or m.padding_idx is None:
            return super().stays(own)
        return m.padding_idx * m.embedding_dim, (m.padding_idx + 1) * m.embedding_dim

    def forward(self, input: Tensor) -> Any:
        if self.trial_copies is not None:
            return self.trial_copies.of(_of_one(super().forward(input)))
        if not self.private_weight:
            return super().forward(input)
        m: Any = self
        if self.same_for_all and self.recording():
            input = input.reshape(1, input.shape[-1]).expand(self.open_batch() or 0, -1)
        try:
            output = F.embedding(input, self.plain_weight(), m.padding_idx)
        except IndexError as error:
            raise BatchLayoutError(
                f"layer {self.layer_name!r}: a token number lies outside of 0 to {m.num_embeddings - 1}"
            ) from error
        return self.weighed(output, input, partial(_use, padding=m.padding_idx))


def _of_one(output: Tensor) -> Tensor:
    """[T, d] or [1, T, d] as [1, T, d]."""
    return output.reshape(1, *output.shape[-2:])


def _use(grad: Tensor, inputs: Tensor, kind: str | None, batch: int, padding: int | None) -> Lookup:
    width = grad.shape[-1]
    if kind is not None:
        grad, inputs = by_sample(grad, kind, batch), by_sample(inputs.unsqueeze(-1), kind, batch)
    ids = inputs.reshape(batch, inputs.numel() // max(1, batch)).to(torch.int64)
    grad = grad.reshape(batch, ids.shape[1], width)
    if padding is not None:
        grad = torch.where((ids == padding).unsqueeze(2), 0.0, grad)
    return Lookup(ids, grad)


def _counts_the_batch(module: nn.Module) -> str | None:
    if getattr(module, "scale_grad_by_freq", False):
        return "scale_grad_by_freq divides a sample's gradient by how often the whole batch has its tokens"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm scales the weight in place in each forward"
    return None


register(
    LayerKind(
        "embedding",
        nn.Embedding,
        EmbeddingLayer,
        bias_names=(),
        whole_names=("weight",),
        problem=_counts_the_batch,
    )
)
