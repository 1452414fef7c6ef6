"""Small configurations and inputs for any model class of transformers, by what its configuration names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS, WORDS = 3, 8, 64
# Parts of a name -> value; the first that fits. Where a value is smaller already it stays.
_SIZES: tuple[tuple[tuple[str, ...], int], ...] = (
    (("vocab_size",), WORDS),
    (("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    (("head_dim", "d_kv", "dim_head", "attention_head_dim", "kv_channels"), 8),
    (("num_attention_heads", "attention_heads", "num_heads", "n_head", "n_heads", "decoder_heads", "encoder_heads"), 4),
    (("num_experts_per_tok", "num_selected_experts", "moe_topk", "top_k"), 2),
    (("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    (("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "d_inner", "n_inner", "inner_dim", "mlp_dim"), 48),
    (("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"), 2),
    (("embedding_size", "hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "projection_dim", "dim"), 32),
    (("image_size", "img_size"), 32),
    (("patch_size",), 8),
    (("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    (("num_mel_bins", "feature_size"), 8),
)
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id")


def shrink(config: Any) -> Any:
    """The configuration, with its sizes made small in place."""
    sections = "mrope_section" in str(_get(config, "rope_parameters")) + str(_get(config, "rope_scaling"))
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif isinstance(value, bool) or not isinstance(value, int | list | tuple):
            continue
        elif isinstance(value, int):
            small = None if sections and name == "head_dim" else _small(name)
            if small is not None and value > small:
                _set(config, name, small)
            elif name.endswith(("_token_index", "_id")) and value >= WORDS:
                _set(config, name, WORDS - 1 - len(name) % 7)
    for name in _IDS:
        value = _get(config, name)
        if isinstance(value, int) and value >= WORDS:
            _set(config, name, _IDS.index(name) % WORDS)
    layers, kinds = _get(config, "num_hidden_layers"), _get(config, "layer_types")
    if isinstance(kinds, list) and isinstance(layers, int) and len(kinds) > layers:
        _set(config, "layer_types", kinds[:layers])
    if _get(config, "use_cache"):
        _set(config, "use_cache", False)
    for name, usual in (("pad_token_id", 0), ("vocab_size", WORDS)):
        if name in vars(config) and _get(config, name) is None:
            _set(config, name, usual)
    if isinstance(_get(config, "num_heads"), list | tuple) and isinstance(_get(config, "embed_dim"), int):
        _set(config, "embed_dim", 24)  # stages of 3, 6, 12, 24 heads
    expand, width, head = (_get(config, name) for name in ("expand", "hidden_size", "head_dim"))
    if isinstance(expand, int) and width and head and _get(config, "num_heads"):
        _set(config, "num_heads", expand * width // head)
    if _get(config, "kv_lora_rank"):  # every head has keys of its own
        _set(config, "num_key_value_heads", _get(config, "num_attention_heads"))
    if _get(config, "rotary_dim"):
        _set(config, "rotary_dim", min(8, _get(config, "rotary_dim")))
    return config


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except (ValueError, RuntimeError, AttributeError):  # an attribute that differs from layer to layer
        return None


def _small(name: str) -> int | None:
    for parts, value in _SIZES:
        if any(name == part or name.endswith("_" + part) for part in parts):
            return value
    return None


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError, TypeError, ValueError):  # a property, or a value that it refuses
        return


def _find(config: Any, name: str, usual: Any) -> Any:
    """An attribute of the configuration or of one inside it."""
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "model_type"))):
        value = _get(part, name)
        if value is not None:
            return value
    return usual


def inputs_of(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Batches to try, the likeliest first."""
    config: Any = model.config
    known = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    words = min(WORDS, int(_find(config, "vocab_size", WORDS) or WORDS))

    def ids(length: int = TOKENS) -> Tensor:
        return torch.randint(4, max(6, words - 8), (BATCH, length), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    side = _find(config, "image_size", 32)
    side = side if isinstance(side, int) else (list(side.values()) if isinstance(side, dict) else list(side))[0]
    channels = int(_find(config, "num_channels", 3))
    bins = int(_find(config, "num_mel_bins", 8))
    made: dict[str, list[Tensor]] = {
        "input_ids": [ids(), torch.stack([ids(), ids()], 1)],
        "decoder_input_ids": [ids(5)],
        "pixel_values": [noise(channels, s, s) for s in dict.fromkeys((side, 32, 64, 224))]
        + [noise(4, channels, side, side)],
        "input_features": [noise(bins, 128), noise(128, bins), noise(bins, 40)],
        "input_values": [noise(400), noise(1600), noise(1, 400), noise(int(_find(config, "max_length", 64)), bins)],
        "inputs_embeds": [noise(TOKENS, 32)],
        "audio_values": [noise(1, 400)],
        "past_values": [noise(64, 7), noise(64)],
        "hidden_states": [noise(TOKENS, 32)],
    }
    main = getattr(model, "main_input_name", "input_ids")
    main = main if isinstance(main, str) else main[0]
    second = "decoder_input_ids" if "decoder_input_ids" in known else None
    for first in dict.fromkeys((main, "pixel_values", "input_ids", "input_features", "input_values")):
        if first not in known or first not in made:
            continue
        for tensor in made[first]:
            for names in ((), (second,), ("pixel_values",), ("input_ids",), ("input_ids", "attention_mask")):
                batch = {first: tensor}
                for name in names:
                    if name == "attention_mask" and name in known:
                        batch[name] = torch.ones(BATCH, TOKENS, dtype=torch.long)
                    elif name is not None and name in known and name in made:
                        batch.setdefault(name, made[name][0])
                if len(batch) == 1 + len([n for n in names if n is not None]) or not names:
                    yield batch
