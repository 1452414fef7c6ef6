"""The models whose kept bytes are measured: full width, random weights, every size of input from a function.

Bytes kept grow in proportion to the number of layers, so that fewer layers give the same ratios; the depth is the
model's own all the same where a forward takes seconds.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass(frozen=True)
class MemoryCase:
    """build() makes the model in train mode, inputs(batch, size) its batch, run(model, inputs) what a loss starts from.

    exact, compact: the most that may be kept, as a part of what plain autograd keeps for the biases alone.
    """

    name: str
    reason: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    run: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    sizes: tuple[tuple[int, int], ...]  # (batch, size) of the table
    curve: tuple[int, ...]  # sizes of the figure
    exact: float
    compact: float | None


def _tokens(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 8000, (batch, length), generator=torch.Generator().manual_seed(1))}


def _images(name: str) -> Callable[[int, int], dict[str, Tensor]]:
    def draw(batch: int, side: int) -> dict[str, Tensor]:
        return {name: torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))}

    return draw


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output: Any = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def _states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    states: Tensor = model(**inputs, use_cache=False).last_hidden_state
    return states


def _language_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    return loss


def roberta(layers: int = 12) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        num_hidden_layers=layers, max_position_embeddings=514, vocab_size=8192, attention_probs_dropout_prob=0.0
    )
    return RobertaForSequenceClassification(config).train()


def vit(layers: int = 12) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_hidden_layers=layers)).train()


def gpt2(layers: int = 12, head: bool = False) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

    config = GPT2Config(
        n_layer=layers, attn_pdrop=0.0, vocab_size=50257 if head else 8192, bos_token_id=0, eos_token_id=0
    )
    return (GPT2LMHeadModel if head else GPT2Model)(config).train()


def resnet(depths: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(depths=list(depths), num_labels=10)).train()


def conv_groupnorm() -> nn.Module:
    """Five blocks of convolution, GroupNorm, ReLU."""
    widths, parts = (3, 64, 64, 128, 128, 256), []
    for number, (before, width) in enumerate(itertools.pairwise(widths)):
        parts += [nn.Conv2d(before, width, 3, 1 + number % 2, 1), nn.GroupNorm(32, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)).train()


CASES = {
    case.name: case
    for case in (
        MemoryCase(
            *("resnet50", "BatchNorm, ReLU, max pooling", resnet, _images("pixel_values"), _logits),
            *(((2, 224), (1, 512)), (64, 128, 224, 384, 512), 1 / 12, None),
        ),
        MemoryCase(
            *("resnet152", "the same, deep", lambda: resnet((3, 8, 36, 3)), _images("pixel_values"), _logits),
            *(((1, 224), (1, 512)), (), 1 / 12, None),
        ),
        MemoryCase(
            *("roberta", "text, dropout 0.1", roberta, _tokens, _logits),
            *(((4, 128), (1, 512)), (64, 128, 256, 512), 0.84, 0.45),
        ),
        MemoryCase(*("vit", "images as tokens", vit, _images("pixel_values"), _logits, ((2, 224),), (), 1.0, 0.55)),
        MemoryCase(
            *(
                "gpt2",
                "gelu_new in six operations",
                gpt2,
                _tokens,
                _states,
                ((1, 512),),
                (128, 256, 512, 1024),
                0.40,
                0.21,
            )
        ),
        MemoryCase(
            *("gpt2_loss", "loss over 50,257 words included", lambda: gpt2(head=True), _tokens, _language_loss),
            *(((1, 512),), (), 0.50, 0.35),
        ),
        MemoryCase(
            *("conv_groupnorm", "GroupNorm and ReLU", conv_groupnorm, _images("input"), _logits),
            *(((4, 224),), (64, 128, 224, 384, 512), 0.55, 0.20),
        ),
    )
}
