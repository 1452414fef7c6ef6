"""Quantised weights of bitsandbytes and torchao: what lies over them is trained, they are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from attach import attach
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import dp_bitfit_kernels as dpk

bnb = pytest.importorskip("bitsandbytes")
B, T = 4, 12
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
SIZES |= {"intermediate_size": 128, "max_position_embeddings": 32}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES))


def llama() -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, pad_token_id=0))


def four_bits(layer: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    # Where a CPU has bfloat16, an evaluation forward packs the weights so that no gradient comes through any more.
    made.support_avx512bf16_for_cpu = False
    return made


def eight_bits(layer: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    return made


def by_bitsandbytes(model: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name not in ("classifier", "score"):
                made: Any = change(child)
                made.bias = None if child.bias is None else nn.Parameter(child.bias.detach().clone())
                setattr(module, name, made)
    return model.to("cpu")  # quantises


def by_torchao(model: nn.Module) -> nn.Module:
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: isinstance(m, nn.Linear) and not name.endswith(("classifier", "score")),
    )
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bitsandbytes, 4 bits": lambda model: by_bitsandbytes(model, four_bits),
    "bitsandbytes, 8 bits": lambda model: by_bitsandbytes(model, eight_bits),
    "torchao, 8 bits": by_torchao,
}


def exact(model: nn.Module) -> nn.Module:
    """4-bit layers as ordinary ones: bitsandbytes has no gradient for their biases with inputs of three dimensions."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is bnb.nn.Linear4bit:
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                plain.weight = nn.Parameter(bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state))
                plain.bias = child.bias
                setattr(module, name, plain)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("what", ["bitfit", "lora", "lora_and_bitfit"])
def test_what_lies_over_them_is_trained(way: str, make: Callable[[], nn.Module], what: str) -> None:
    torch.manual_seed(0)
    model = WAYS[way](make())
    if "lora" in what:
        queries = ["query", "value"] if make is bert else ["q_proj", "v_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=queries, init_lora_weights=False))
    model.eval()
    ids, labels = torch.randint(1, 100, (B, T)), torch.randint(0, 2, (B,))
    reference = exact(copy.deepcopy(model))
    dpk.convert_model(model, **getattr(dpk.presets, what)())
    assert dpk.conversion_report(model).one_by_one == {}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) >= 8
    own = {name: p.requires_grad_(name in trained) for name, p in reference.named_parameters()}
    rows = []
    for i in range(B):
        loss = reference(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss
        wanted = [own[name] for name in trained]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)])
    bound = 1.5 * max(float(torch.cat([g.flatten() for g in row]).norm()) for row in rows)
    engine, model, optimizer, _ = attach(model, torch.zeros(B, 1), poisson_sampling=False, bound=bound)
    before = {name: model.get_parameter(name).detach().clone() for name in trained}
    with engine.batch(B):
        model(input_ids=ids, labels=labels).loss.backward()
        assert optimizer.step()
    for name, *gradients in zip(trained, *rows, strict=True):
        moved = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(moved, torch.stack(gradients).mean(0), rtol=1e-3, atol=1e-5 * bound)


@pytest.mark.parametrize("way", WAYS)
def test_they_are_refused_by_name(way: str) -> None:
    with pytest.raises(dpk.UnsupportedModuleError, match=r"attention\.self\.query\.weight: .*torch\.u?int8"):
        dpk.convert_model(WAYS[way](bert()), **dpk.presets.full())


@pytest.mark.parametrize("way", WAYS)
def test_what_was_trained_over_them_is_saved_and_loaded(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = dpk.convert_model(WAYS[way](bert()))
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    dpk.save_biases(model, tmp_path / "task.safetensors")
    dpk.load_biases(fresh, tmp_path / "task.safetensors")
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(fresh.get_parameter(name), p)


def test_float8_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    quantize_(model[0], Float8WeightOnlyConfig())
    with pytest.raises(dpk.UnsupportedModuleError, match=r"0\.weight: .*float8"):
        dpk.convert_model(model, **dpk.presets.full())
