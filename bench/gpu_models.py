"""Models of the GPU step bench: transformers' own, random weights, their loss under bf16 autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GpuCase:
    """``build`` makes the model on the current default device; ``inputs(B)`` its integer or image input."""

    build: Callable[[], nn.Module]
    batch: int
    inputs: Callable[[int], Tensor]
    argument: str  # that takes the inputs
    embedded: str  # that takes them where gradients can flow to them: for the floor


def loss_of(model: nn.Module, argument: str, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over the samples; models without a classifier give the mean square of their last states."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        output = model(**{argument: inputs})
    if "logits" in output:
        return nn.functional.cross_entropy(output["logits"].float(), labels)
    return output["last_hidden_state"].float().square().mean()


def _tokens(length: int, words: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(4, words, (batch, length), device="cuda")


def _images(batch: int) -> Tensor:
    return torch.randn((batch, 3, 224, 224), device="cuda")


def _roberta(layers: int, width: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        config = RobertaConfig(
            vocab_size=50_265,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            max_position_embeddings=514,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return RobertaForSequenceClassification(config)

    return build


def _gpt2_large() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(
        GPT2Config(n_embd=1280, n_layer=36, n_head=20, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    )


def _vit_large() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            image_size=224,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _text(build: Callable[[], nn.Module], batch: int, length: int, words: int = 50_000) -> GpuCase:
    return GpuCase(build, batch, _tokens(length, words), "input_ids", "inputs_embeds")


CASES = {
    "roberta_base_t128": _text(_roberta(12, 768), 32, 128),
    "roberta_base_t512": _text(_roberta(12, 768), 32, 512),
    "roberta_large_t128": _text(_roberta(24, 1024), 32, 128),
    "roberta_large_t512": _text(_roberta(24, 1024), 32, 512),
    "gpt2_large_t512": _text(_gpt2_large, 8, 512),
    "vit_large_224": GpuCase(_vit_large, 64, _images, "pixel_values", "pixel_values"),
    "tiny": _text(_roberta(1, 64), 4, 16),
}
