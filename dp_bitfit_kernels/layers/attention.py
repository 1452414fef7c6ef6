"""nn.MultiheadAttention: taps on its projections, the attention itself as in PyTorch."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._nested import tensors_in
from .._validate import BatchLayoutError
from ..arrangement import MAJOR
from ..functional import BiasGradFunction, SpreadFunction, apply
from ..functional_weight import WeightRowsFunction, tell
from .base import LayerKind, register
from .linear import linear_use
from .one_by_one import OneByOneLayer

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)
_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


class MultiheadAttentionLayer(OneByOneLayer):
    """Gives its projections' weights and biases, ``bias_k`` and ``bias_v`` their rows in one forward of the batch.

    Where the samples are not in the dimension that ``batch_first`` names, it is run one sample at a time.
    """

    sinkable = frozenset(_WEIGHTS)
    num_heads: int
    head_dim: int
    batch_first: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.attachment is None or not self.recording():
            return super().forward(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        call = self.call_of((args, kwargs))
        bound = _SIGNATURE.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, query, key, value, *options = bound.arguments.values()
        axes = {id(tensor): axis for tensor, axis in zip(given, call.inputs, strict=True)}
        own = 0 if self.batch_first else 1
        if query.dim() != 3 or any(axes[id(tensor)] != own for tensor in (query, key, value)):
            if self.__dict__.get("weight_sinks"):
                raise BatchLayoutError(
                    f"layer {self.layer_name!r}: its samples are not where batch_first={self.batch_first} says, so "
                    "that it is run one sample at a time, and its weights are too large for rows: "
                    "make_private(per_sample_norm='instantiate')"
                )
            return super().forward(*args, **kwargs)
        return self.attend(query, key, value, *options)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The forward of nn.MultiheadAttention (F.multi_head_attention_forward), for a batch."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True needs an attn_mask")  # as PyTorch says
        if self.batch_first:
            same = (key is query, value is key)
            query = query.transpose(0, 1)
            key = query if same[0] else key.transpose(0, 1)
            value = key if same[1] else value.transpose(0, 1)
        q, k, v = self.projections(query, key, value)  # [T, N, E], [S, N, E], [S, N, E]
        (length, samples, width), heads = q.shape, self.num_heads
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else _added(attn_mask, q)
        mask = mask.unsqueeze(0) if mask is not None and mask.dim() == 2 else mask
        padding = _added(key_padding_mask, q)
        extra = 0
        if self.bias_k is not None:
            k = torch.cat([k, self.repeated("bias_k", samples)])
            v = torch.cat([v, self.repeated("bias_v", samples)])
            extra += 1
        q, k, v = (t.view(t.shape[0], samples * heads, self.head_dim).transpose(0, 1) for t in (q, k, v))
        if self.add_zero_attn:
            nothing = k.new_zeros(samples * heads, 1, self.head_dim)
            k, v = torch.cat([k, nothing], 1), torch.cat([v, nothing], 1)
            extra += 1
        mask = F.pad(mask, (0, extra)) if mask is not None and extra else mask
        if padding is not None:
            padding = F.pad(padding, (0, extra)).view(samples, 1, 1, -1).expand(-1, heads, -1, -1)
            padding = padding.reshape(samples * heads, 1, -1)
            mask = padding if mask is None else mask + padding
        dropout: float = self.dropout if self.training else 0.0  # type: ignore[assignment]
        if need_weights:
            scaled, turned = q * math.sqrt(1.0 / self.head_dim), k.transpose(1, 2)
            scores = torch.bmm(scaled, turned) if mask is None else torch.baddbmm(mask, scaled, turned)
            weights = F.dropout(scores.softmax(-1), dropout)
            mixed = torch.bmm(weights, v).transpose(0, 1).reshape(length * samples, width)
            weights = weights.view(samples, heads, length, -1)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            if mask is not None:
                mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.view(samples, heads, -1, k.shape[1])
            q, k, v = (t.view(samples, heads, -1, self.head_dim) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, hint)
            mixed, weights = out.permute(2, 0, 1, 3).reshape(length * samples, width), None
        own: nn.Linear = self.out_proj  # type: ignore[assignment]
        output = F.linear(mixed, own.weight.detach(), _cut_off(own.bias)).view(length, samples, width)
        output = self.told(output, mixed.view(length, samples, width), "out_proj.weight", 0)
        output = self.tapped(output, self.leaves.get("out_proj.bias"))
        return (output.transpose(0, 1) if self.batch_first else output), weights

    def projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, each [T, N, E]; one matrix product for those of the same input."""
        width: int = self.embed_dim  # type: ignore[assignment]
        if not self._qkv_same_embed_dim:
            inputs = ((query, "q_proj_weight"), (key, "k_proj_weight"), (value, "v_proj_weight"))
            return tuple(self.project(x, name, 0, width, n * width) for n, (x, name) in enumerate(inputs))
        name = "in_proj_weight"
        if query is key and key is value:
            return tuple(part.contiguous() for part in self.project(query, name, 0, 3 * width, 0).chunk(3, -1))
        q = self.project(query, name, 0, width, 0)
        if key is value:
            both = self.project(key, name, width, 3 * width, width)
            return q, *(part.contiguous() for part in both.chunk(2, -1))
        k = self.project(key, name, width, 2 * width, width)
        return q, k, self.project(value, name, 2 * width, 3 * width, 2 * width)

    def project(self, x: Tensor, name: str, first: int, last: int, start: int) -> Tensor:
        """x [T, N, d] by rows ``first`` to ``last`` of the weight, plus as many elements of the bias from ``start``."""
        weight: Any = self._parameters[name]
        stop, bias, rows = start + last - first, _cut_off(self.in_proj_bias), self.leaves.get("in_proj_bias")
        output = F.linear(x, weight.detach()[first:last], None if bias is None else bias[start:stop])
        output = self.told(output, x, name, first)
        return self.tapped(output, None if rows is None else rows[:, start:stop])

    def told(self, output: Tensor, x: Tensor, name: str, first: int) -> Tensor:
        """output [T, N, p] of x [T, N, d], whose gradient also gives the weight's rows from ``first`` on."""
        sink, rows = self.__dict__.get("weight_sinks", {}).get(name), self.leaves.get(name)
        if sink is None and rows is None:
            return output
        batch = self.open_batch()
        assert batch is not None
        output, x = output.transpose(0, 1), x.transpose(0, 1)
        make = partial(linear_use, kind=None if output.shape[0] == batch else MAJOR, batch=batch)
        if sink is not None:
            output = tell(output, x, sink, partial(make, first=first), self.layer_name)
        else:
            height, width = output.shape[2], x.shape[2]
            part = rows[:, first * width : (first + height) * width]  # type: ignore[index]
            output = apply(WeightRowsFunction, output, x.detach(), part, make, height, self.layer_name)
        return output.transpose(0, 1)

    def tapped(self, output: Tensor, rows: Tensor | None) -> Tensor:
        """output [T, N, p], whose gradient also gives ``rows`` [B, p]; N = B k, the k of a sample side by side."""
        if rows is None:
            return output
        tapped = apply(BiasGradFunction, output.transpose(0, 1), None, rows, False, self.backend, MAJOR)
        return tapped.transpose(0, 1)

    def repeated(self, name: str, samples: int) -> Tensor:
        """bias_k or bias_v once for each of N samples, [1, N, E]."""
        bias, rows = self._parameters[name], self.leaves.get(name)
        assert bias is not None
        if rows is None:
            return bias.repeat(1, samples, 1)
        copies = apply(SpreadFunction, bias.detach(), rows).flatten(1)
        return copies.repeat_interleave(samples // len(copies), 0).unsqueeze(0)


def _cut_off(bias: Any) -> Tensor | None:
    return None if bias is None else bias.detach()


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as what is added to scores: -inf where a boolean one is True."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


register(LayerKind("multiheadattention", nn.MultiheadAttention, MultiheadAttentionLayer, bias_names=(), whole_names=()))
