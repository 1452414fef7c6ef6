"""Biases that no gradient reaches: of keys, under softmax attention that knows positions from its inputs alone.

A key bias b adds q . b to every score of a query q, and softmax does not see what is added to all of its inputs. With
rotary or relative positions in the scores that no longer holds (Qwen2's key biases learn), nor where keys are
normalised. So the rule goes by families that were looked at, each of which a test confirms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

NO_SIGNAL = "key bias under softmax attention: its gradient is zero"

# Packages of transformers whose attention is softmax(q k^T) with nothing else in the scores but masks.
_FAMILIES = frozenset((
    "albert", "bart", "beit", "bert", "bert_generation", "blenderbot", "blenderbot_small", "blip", "camembert",
    "clip", "data2vec", "deit", "distilbert", "electra", "ernie", "gpt2", "hubert", "m2m_100", "marian",
    "mbart", "opt", "pegasus", "roberta", "roberta_prelayernorm", "siglip", "trocr", "vit", "vit_mae",
    "vit_msn", "wav2vec2", "xlm_roberta", "xmod",
))  # fmt: skip
_TRIPLES = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))


class Part(NamedTuple):
    """Elements ``start`` to ``stop`` of a bias, of ``size``."""

    start: int
    stop: int
    size: int

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.size


def without_signal(model: nn.Module) -> dict[int, Part]:
    """id of a bias -> the part of it whose gradient is zero whatever the input."""
    found: dict[int, Part] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            bias = module.in_proj_bias
            if bias is not None and module.bias_k is None and not module.add_zero_attn:
                width = module.embed_dim
                found[id(bias)] = Part(width, 2 * width, 3 * width)
        elif _family(module) in _FAMILIES:
            found.update(_of_transformers(module))
    return found


def _family(module: nn.Module) -> str:
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else ""


def _of_transformers(module: nn.Module) -> dict[int, Part]:
    for names in _TRIPLES:
        children = [module._modules.get(name) for name in names]
        if all(isinstance(child, nn.Linear) for child in children):
            bias: Any = getattr(children[1], "bias", None)
            return {} if bias is None else {id(bias): Part(0, bias.numel(), bias.numel())}
    # GPT-2: query, key, value side by side; key and value where queries come from elsewhere.
    bias = getattr(module._modules.get("c_attn"), "bias", None)
    if bias is None or not type(module).__name__.endswith("Attention"):
        return {}
    parts = 2 if getattr(module, "is_cross_attention", False) else 3
    width = bias.numel() // parts
    start = 0 if parts == 2 else width
    return {id(bias): Part(start, start + width, bias.numel())}
