"""What to train, as one line: each preset returns a new dict of keyword arguments for ``convert_model``.

    dpk.convert_model(model, **dpk.presets.bitfit_and_head("classifier"))

The dict is the caller's: change or add to it. ``head`` is a pattern, or several, of module names to train whole; of a
peft model ``"*.modules_to_save"`` is the heads that its configuration names. Presets of adapters of any kind need a
model that has some (``peft.get_peft_model``): without, ``convert_model`` says that a pattern matches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Patterns = str | Sequence[str]

# Ends of names, since names of convolutions and blocks that hold a norm have the same words in them. The pair around
# "e" leaves out transformer layers that are named for a StableLayerNorm.
_NORMS = "class:" + "|".join(
    (
        *("LayerNorm", "*[!e]LayerNorm", "*[!l]eLayerNorm", "*LayerNorm2d"),
        *("*GroupNorm", "_NormBase"),  # the latter: torch's BatchNorm and InstanceNorm
        *("*RMSNorm", "*RMSNormGated", "RmsNorm", "RmsNorm2d", "NoNorm"),
    )
)


def full() -> dict[str, Any]:
    """Everything: DP-SGD of all parameters (Abadi et al., arXiv 1607.00133; Li et al., arXiv 2110.05679).

    >>> dpk.convert_model(model, **dpk.presets.full())
    """
    return {"biases": "all", "train_modules": ("*",)}


def bitfit() -> dict[str, Any]:
    """All biases (Bu et al., arXiv 2210.00036): what ``convert_model`` does by itself.

    >>> dpk.convert_model(model, **dpk.presets.bitfit())
    """
    return {"biases": "all", "train_modules": ()}


def bitfit_and_head(head: Patterns) -> dict[str, Any]:
    """All biases, and a head that is new to the model (Bu et al., arXiv 2210.00036, section 4).

    >>> dpk.convert_model(model, **dpk.presets.bitfit_and_head("classifier"))
    """
    return {"biases": "all", "train_modules": _several(head)}


def linear_probe(head: Patterns) -> dict[str, Any]:
    """The head alone, over frozen features (Tramer and Boneh, arXiv 2011.11660).

    >>> dpk.convert_model(model, **dpk.presets.linear_probe("classifier"))
    """
    return {"biases": (), "train_modules": _several(head)}


def norms(head: Patterns = ()) -> dict[str, Any]:
    """Scales and biases of all normalisation layers, found by class: LayerNorm, RMSNorm, GroupNorm, BatchNorm (its
    running statistics stay), InstanceNorm (Frankle et al., arXiv 2003.00152; Qi et al., arXiv 2211.08682).

    >>> dpk.convert_model(model, **dpk.presets.norms(head="classifier"))
    """
    return {"biases": (), "train_modules": (_NORMS, *_several(head))}


def embeddings_and_biases(head: Patterns = ()) -> dict[str, Any]:
    """Every ``nn.Embedding`` and all biases. Where a head's weight is tied to an embedding it must be named, too.

    >>> dpk.convert_model(model, **dpk.presets.embeddings_and_biases(head="lm_head"))
    """
    return {"biases": "all", "train_modules": ("class:Embedding", *_several(head))}


def lora(head: Patterns = ()) -> dict[str, Any]:
    """The low-rank pairs of a peft LoRA model (Hu et al., arXiv 2106.09685; private: Yu et al., arXiv 2110.06500).

    >>> dpk.convert_model(get_peft_model(model, LoraConfig()), **dpk.presets.lora())
    """
    return {"biases": (), "train_modules": ("*lora_*", *_several(head))}


def lora_and_bitfit(head: Patterns = ()) -> dict[str, Any]:
    """The low-rank pairs of a peft LoRA model and all biases, also over quantised weights.

    >>> dpk.convert_model(get_peft_model(model, LoraConfig()), **dpk.presets.lora_and_bitfit())
    """
    return {**lora(head), "biases": "all"}


def adapters(modules: Patterns = "*adapter*", head: Patterns = ()) -> dict[str, Any]:
    """Bottlenecks put between layers (Houlsby et al., arXiv 1902.00751; private: Yu et al., arXiv 2110.06500).

    modules: what they are called in the model.

    >>> dpk.convert_model(model, **dpk.presets.adapters(head="classifier"))
    """
    return {"biases": (), "train_modules": (*_several(modules), *_several(head))}


def adapters_and_bitfit(modules: Patterns = "*adapter*", head: Patterns = ()) -> dict[str, Any]:
    """Bottlenecks put between layers, and all biases.

    >>> dpk.convert_model(model, **dpk.presets.adapters_and_bitfit(head="classifier"))
    """
    return {**adapters(modules, head), "biases": "all"}


def ia3(head: Patterns = ()) -> dict[str, Any]:
    """The vectors that scale features in a peft IA3 model (Liu et al., arXiv 2205.05638).

    >>> dpk.convert_model(get_peft_model(model, IA3Config()), **dpk.presets.ia3())
    """
    return {"biases": (), "train_modules": ("*ia3_l", *_several(head))}


def ia3_and_bitfit(head: Patterns = ()) -> dict[str, Any]:
    """The vectors that scale features in a peft IA3 model, and all biases.

    >>> dpk.convert_model(get_peft_model(model, IA3Config()), **dpk.presets.ia3_and_bitfit())
    """
    return {**ia3(head), "biases": "all"}


def prompts(head: Patterns = ()) -> dict[str, Any]:
    """The virtual tokens of a peft model: prompt tuning (Lester et al., arXiv 2104.08691), prefix tuning (Li and Liang,
    arXiv 2101.00190), P-tuning (Liu et al., arXiv 2103.10385).

    >>> dpk.convert_model(get_peft_model(model, PromptTuningConfig()), **dpk.presets.prompts())
    """
    return {"biases": (), "train_modules": ("*prompt_encoder", *_several(head))}


def prompts_and_bitfit(head: Patterns = ()) -> dict[str, Any]:
    """The virtual tokens of a peft model, and all biases.

    >>> dpk.convert_model(get_peft_model(model, PromptTuningConfig()), **dpk.presets.prompts_and_bitfit())
    """
    return {**prompts(head), "biases": "all"}


def _several(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
