"""Model families by name: every bias trained or excluded for a stated reason, each sample's gradient its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._nested import tensors_in

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
BOTH_STACKS = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def ids(length: int = 8) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 50, (4, length))}


def two_stacks() -> dict[str, Tensor]:
    return {**ids(), "decoder_input_ids": torch.randint(5, 50, (4, 5))}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32)}


# class, what its configuration is given, inputs, classes that are run one sample at a time
Family = tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]], set[str]]
FAMILIES: dict[str, Family] = {
    "BERT": ("BertForMaskedLM", TEXT, ids, set()),
    "RoBERTa": ("RobertaForSequenceClassification", TEXT, ids, set()),
    "ALBERT": ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 16}, ids, set()),
    "DeBERTa": (
        "DebertaForSequenceClassification",
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        ids,
        {"DebertaLayerNorm", "DisentangledSelfAttention"},
    ),
    "DeBERTa-v2": (
        "DebertaV2ForSequenceClassification",
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        ids,
        {"DisentangledSelfAttention"},
    ),
    "XLNet": (
        "XLNetForSequenceClassification",
        {"vocab_size": 60, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        ids,
        set(),
    ),
    "Longformer": ("LongformerForSequenceClassification", {**TEXT, "attention_window": 4}, ids, set()),
    "ModernBERT": ("ModernBertForMaskedLM", {**TEXT, "pad_token_id": 0}, ids, set()),
    "BART": ("BartModel", {"vocab_size": 60, "max_position_embeddings": 40, **BOTH_STACKS}, two_stacks, set()),
    "FSMT": (
        "FSMTModel",
        {"src_vocab_size": 60, "tgt_vocab_size": 60, "max_position_embeddings": 40, "use_cache": False, **BOTH_STACKS},
        two_stacks,
        set(),
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False},
        ids,
        set(),
    ),
    "OPT": (
        "OPTForCausalLM",
        {
            "vocab_size": 60,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 40,
            "word_embed_proj_dim": 32,
            "use_cache": False,
        },
        ids,
        set(),
    ),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED, ids, set()),
    "gpt-oss": (
        "GptOssForCausalLM",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
        ids,
        {"GptOssExperts", "GptOssTopKRouter"},
    ),
    "Mamba": (
        "MambaForCausalLM",
        {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
        ids,
        {"MambaMixer"},
    ),
    "Mamba2": (
        "Mamba2ForCausalLM",
        {
            "vocab_size": 60,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
            "use_cache": False,
        },
        ids,
        {"Mamba2Mixer"},
    ),
    "Whisper": (
        "WhisperModel",
        {
            "vocab_size": 60,
            "max_source_positions": 20,
            "max_target_positions": 20,
            "num_mel_bins": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "use_cache": False,
            **BOTH_STACKS,
        },
        lambda: {"input_features": torch.randn(3, 8, 40), "decoder_input_ids": torch.randint(5, 50, (3, 5))},
        set(),
    ),
    "Wav2Vec2": (
        "Wav2Vec2ForSequenceClassification",
        {
            **{k: v for k, v in TEXT.items() if k != "max_position_embeddings"},
            "conv_dim": (16, 16),
            "conv_kernel": (3, 3),
            "conv_stride": (2, 2),
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
        lambda: {"input_values": torch.randn(3, 200)},
        set(),
    ),
    "ViT": ("ViTForImageClassification", IMAGE, pixels, set()),
    "DeiT": ("DeiTForImageClassification", IMAGE, pixels, set()),
    "BEiT": ("BeitForImageClassification", {**IMAGE, "use_relative_position_bias": True}, pixels, set()),
    "Swin": ("SwinForImageClassification", WINDOWS, pixels, set()),
    "SwinV2": ("Swinv2ForImageClassification", WINDOWS, pixels, {"Swinv2SelfAttention"}),
    "MobileViT": (
        "MobileViTForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "num_attention_heads": 2,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 12, 16, 16, 24, 32],
            "initializer_range": 0.3,  # else its features vanish
        },
        lambda: {"pixel_values": torch.randn(3, 3, 64, 64)},
        set(),
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        pixels,
        set(),
    ),
    "ConvNeXtV2": (
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        pixels,
        {"ConvNextV2GRN"},
    ),
    "ResNet": (
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
        pixels,
        set(),
    ),
    "SAM": (
        "SamVisionModel",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_dim": 48,
            "image_size": 32,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [1],
            "output_channels": 16,
        },
        pixels,
        set(),
    ),
    "CLIP": ("CLIPForImageClassification", {"vision_config": IMAGE, "text_config": TEXT}, pixels, set()),
    "SigLIP": ("SiglipForImageClassification", {"vision_config": IMAGE, "text_config": TEXT}, pixels, set()),
}
WITHOUT_BIASES: dict[str, Family] = {
    "T5": (
        "T5Model",
        {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "use_cache": False},
        two_stacks,
        set(),
    ),
    "Llama": ("LlamaForCausalLM", GROUPED, ids, set()),
    "Mistral": ("MistralForCausalLM", GROUPED, ids, set()),
    "Gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 8}, ids, set()),
    "Qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, ids, set()),
    "Phi-3": ("Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}, ids, set()),
    "Mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, ids, set()),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor], set[str]]:
    kind, options, inputs, alone = {**FAMILIES, **WITHOUT_BIASES}[name]
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**options))
    logging.disable(logging.NOTSET)
    return model.eval(), inputs(), alone


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    size = len(next(iter(batch.values())))
    output = next(t for t in tensors_in(model(**batch)) if t.is_floating_point() and t.dim() > 1 and len(t) == size)
    weights = torch.linspace(-1.0, 1.0, output[0].numel()).view(output.shape[1:])
    return (output * weights).flatten(1).mean(1).sin().mean()


def is_bias(name: str) -> bool:
    own = name.rpartition(".")[2]
    return own == "bias" or own.endswith("_bias") or own.startswith("bias_")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_bias_has_its_samples_gradients(name: str) -> None:
    model, batch, alone = build(name)
    biases = {n for n, _ in model.named_parameters() if is_bias(n)}
    with torch.no_grad():
        expected = loss(model, batch)
    dpk.convert_model(model, sample_batch=batch)
    report = dpk.conversion_report(model)
    assert set(report.one_by_one.values()) == alone
    excluded = {n: why for n, why in report.frozen.items() if n in biases}
    assert set(excluded.values()) <= {
        "never called on sample_batch: it would only receive noise",
        "attention/relative-position table, not a bias",
    }
    assert biases - set(excluded) == set(report.trained)
    with torch.no_grad():
        torch.testing.assert_close(loss(model, batch), expected)
    check = dpk.check_model(model, batch, loss)
    assert check.worst < 1e-5
    assert len(check.silent) <= 0.25 * len(report.trained)


@pytest.mark.parametrize("name", WITHOUT_BIASES)
def test_families_without_biases_are_given_some(name: str) -> None:
    model, batch, _ = build(name)
    with pytest.raises(dpk.ConversionError, match="nothing to train"):
        dpk.convert_model(model, sample_batch=batch)
    dpk.convert_model(model, sample_batch=batch, add_missing_biases=True)
    report = dpk.conversion_report(model)
    assert set(report.added) == set(report.trained)
    assert dpk.check_model(model, batch, loss).worst < 1e-5
