"""Small models with adapters of peft or by hand, and the step that an oracle of one sample at a time takes on them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._nested import map_tensors, tensors_in

Batch = dict[str, Tensor]
TEXT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False}
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def bert() -> nn.Module:
    return built("BertForSequenceClassification", **TEXT)


def roberta() -> nn.Module:
    return built("RobertaForSequenceClassification", **TEXT)


def gpt2() -> nn.Module:
    return built("GPT2LMHeadModel", **GPT2)


def llama() -> nn.Module:
    return built("LlamaForCausalLM", **TEXT, num_key_value_heads=2, use_cache=False)


def vit() -> nn.Module:
    return built("ViTForImageClassification", **IMAGE)


def built(kind: str, **options: Any) -> nn.Module:
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    # A wide start, or a sample's gradient would hardly differ from its batch-mates'.
    model: nn.Module = cls(cls.config_class(initializer_range=0.3, **options)).eval()
    logging.disable(logging.NOTSET)
    return model


def ids() -> Batch:
    tokens = torch.randint(5, 50, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def pixels() -> Batch:
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True)
class Case:
    """What is wrapped in what, trained by which preset, and which biases of the base model that adds.

    merges: whether peft can merge what was trained into the base weights.
    alone: classes that are run one sample at a time.
    """

    base: Callable[[], nn.Module]
    config: Callable[[], Any]
    preset: dict[str, Any]
    batch: Callable[[], Batch] = ids
    merges: bool = True
    alone: frozenset[str] = frozenset()


SAVED, CLS, LM = "*.modules_to_save", "SEQ_CLS", "CAUSAL_LM"
CASES: dict[str, Case] = {
    "LoRA": Case(bert, lambda: peft.LoraConfig(task_type=CLS, r=4), dpk.presets.lora(head=SAVED)),
    "LoRA and all biases": Case(
        roberta, lambda: peft.LoraConfig(task_type=CLS, r=4, bias="all"), dpk.presets.lora_and_bitfit(head=SAVED)
    ),
    "LoRA on Conv1D": Case(
        gpt2, lambda: peft.LoraConfig(task_type=LM, r=4, fan_in_fan_out=True), dpk.presets.lora_and_bitfit()
    ),
    "LoRA of images": Case(
        vit,
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
        dpk.presets.lora(head=SAVED),
        pixels,
    ),
    "rsLoRA on all Linear layers": Case(
        llama,
        lambda: peft.LoraConfig(task_type=LM, r=4, use_rslora=True, target_modules="all-linear"),
        dpk.presets.lora(),
    ),
    "LoRA of an embedding": Case(
        llama,
        lambda: peft.LoraConfig(task_type=LM, r=4, target_modules=["embed_tokens", "q_proj"]),
        dpk.presets.lora(),
        alone=frozenset({"Embedding"}),
    ),
    "DoRA": Case(
        bert,
        lambda: peft.LoraConfig(task_type=CLS, r=4, use_dora=True),
        dpk.presets.lora(head=SAVED),
        alone=frozenset({"Linear"}),
    ),
    "IA3": Case(bert, lambda: peft.IA3Config(task_type=CLS), dpk.presets.ia3(head=SAVED), alone=frozenset({"Linear"})),
    "IA3 and biases": Case(
        gpt2,
        lambda: peft.IA3Config(task_type=LM, fan_in_fan_out=True),
        dpk.presets.ia3_and_bitfit(),
        alone=frozenset({"Linear"}),
    ),
    "prompt tuning": Case(
        gpt2,
        lambda: peft.PromptTuningConfig(task_type=LM, num_virtual_tokens=3),
        dpk.presets.prompts(),
        merges=False,
    ),
    "prompt tuning and biases": Case(
        bert,
        lambda: peft.PromptTuningConfig(task_type=CLS, num_virtual_tokens=3),
        dpk.presets.prompts_and_bitfit(head=SAVED),
        merges=False,
    ),
    "prefix tuning": Case(
        bert,
        lambda: peft.PrefixTuningConfig(task_type=CLS, num_virtual_tokens=3),
        dpk.presets.prompts(head=SAVED),
        merges=False,
    ),
    "prefix tuning with a projection": Case(
        gpt2,
        lambda: peft.PrefixTuningConfig(
            task_type=LM, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
        ),
        dpk.presets.prompts(),
        merges=False,
    ),
    "P-tuning by an LSTM": Case(
        gpt2,
        lambda: peft.PromptEncoderConfig(
            task_type=LM, num_virtual_tokens=3, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
        ),
        dpk.presets.prompts(),
        merges=False,
    ),
    "P-tuning": Case(
        bert,
        lambda: peft.PromptEncoderConfig(task_type=CLS, num_virtual_tokens=3, encoder_hidden_size=16),
        dpk.presets.prompts(head=SAVED),
        merges=False,
    ),
    "LayerNorm tuning": Case(
        bert,
        lambda: peft.LNTuningConfig(task_type=CLS, target_modules=["LayerNorm"]),
        {"biases": (), "train_modules": ("*ln_tuning_layers", SAVED)},
    ),
    "VeRA": Case(
        llama,
        lambda: peft.VeraConfig(task_type=LM, r=4, target_modules=["q_proj", "o_proj"]),
        {"biases": (), "train_modules": ("*vera_lambda*",)},
        alone=frozenset({"Linear"}),
    ),
}


def wrapped(case: Case) -> nn.Module:
    """The base in evaluation mode, wrapped by peft, with what peft made moved off its start (a B of zeros)."""
    torch.manual_seed(0)
    model: nn.Module = peft.get_peft_model(case.base(), case.config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """A mean over samples of something that is linear in none of them, of outputs scaled up to have a gradient."""
    size = len(next(iter(batch.values())))
    output = next(t for t in tensors_in(model(**batch)) if t.is_floating_point() and t.dim() > 1 and len(t) == size)
    weights = torch.linspace(-1.0, 1.0, output[0].numel(), dtype=output.dtype).view(output.shape[1:])
    return (output * weights).flatten(1).sum(1).sin().mean()


def oracle_rows(model: nn.Module, names: list[str], batch: Batch) -> Tensor:
    """Gradients [B, P] float64 of the loss of each sample alone, by plain autograd on an unconverted copy."""
    twin = copy.deepcopy(model).double()
    parameters = dict(twin.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    wanted = [parameters[name].requires_grad_() for name in names]
    rows = []
    for i in range(len(next(iter(batch.values())))):
        sample = map_tensors(batch, lambda t, i=i: (t.double() if t.is_floating_point() else t)[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss(twin, sample), wanted)]))
    return torch.stack(rows)
