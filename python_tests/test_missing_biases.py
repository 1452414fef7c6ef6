"""add_missing_biases: zeros where a layer has no bias, outputs as before, trained, saved and kept like all others."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from networks import accounted, same, snapshot
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._validate import ConversionError

transformers = pytest.importorskip("transformers")


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_cache=False, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits.square().mean((1, 2)).sin().mean()


@pytest.mark.parametrize(
    ("model", "config", "elements", "percent"),
    [
        ("LlamaForCausalLM", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
          "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}, 1_376_256, 0.0171),
        ("LlamaForCausalLM", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
          "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
         376_832, 0.0305),
        ("MistralForCausalLM", {"num_key_value_heads": 8, "intermediate_size": 14336}, 1_376_256, 0.0190),
        ("MixtralForCausalLM", {}, 327_680, 0.0007),
        ("T5ForConditionalGeneration", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
         202_752, 0.0910),
    ],
    ids=["Llama-3-8B", "Llama-3.2-1B", "Mistral-7B", "Mixtral-8x7B", "T5-base"],
)  # fmt: skip
def test_counts_on_the_meta_device(model: str, config: dict[str, Any], elements: int, percent: float) -> None:
    kind = getattr(transformers, model)
    with torch.device("meta"):
        network = kind(kind.config_class(**config))
    dpk.convert_model(network, add_missing_biases=True)
    report = dpk.conversion_report(network)
    assert report.trained_elements == elements
    assert report.percent == pytest.approx(percent, abs=2e-4)  # of the model with its new biases
    assert set(report.added) == set(report.trained)
    assert not any("lm_head" in name for name in report.trained)


def test_outputs_stay_and_each_bias_is_trained() -> None:
    model = llama()
    tokens = torch.randint(0, 40, (4, 6))
    expected = model(tokens).logits
    dpk.convert_model(model, add_missing_biases=True)
    accounted(model)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-6, atol=1e-6)
    report = dpk.conversion_report(model)
    assert len(report.added) == 2 * 7
    assert "given to layers that had none" in str(report)
    assert dpk.check_model(model, tokens, loss).silent == ()


def test_patterns_may_name_modules() -> None:
    model = dpk.convert_model(llama(), add_missing_biases=True, biases="*v_proj")
    wanted = {f"model.layers.{i}.self_attn.v_proj.bias" for i in range(2)}
    assert set(dpk.conversion_report(model).trained) == wanted
    assert model.model.layers[0].self_attn.q_proj.bias is None
    model = dpk.convert_model(llama(), add_missing_biases=True, biases=("*", "!*.mlp.*", "!*k_proj"))
    assert len(dpk.conversion_report(model).trained) == 2 * 3
    assert model.model.layers[0].mlp.up_proj.bias is None


def test_what_is_never_called_gets_none() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = dpk.convert_model(Idle(), add_missing_biases=True, sample_batch=torch.randn(2, 3))
    assert dpk.conversion_report(model).added == ("used.bias",)
    assert model.idle.bias is None


def test_convolutions_and_norms_too() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ConvTranspose2d(4, 3, 3, bias=False), nn.Flatten(2),
        nn.LayerNorm(36, bias=False), nn.Linear(36, 2),
    )  # fmt: skip
    x = torch.randn(4, 2, 6, 6)
    expected = model(x)
    dpk.convert_model(model, add_missing_biases=True)
    assert set(dpk.conversion_report(model).added) == {"0.bias", "1.bias", "3.bias"}
    torch.testing.assert_close(model(x), expected)
    check = dpk.check_model(model, x, lambda m, b: m(b).square().mean((1, 2)).mean())
    assert check.worst < 1e-6
    assert check.silent == ()


def test_an_error_leaves_no_bias_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3, track_running_stats=False))
    before = snapshot(model)
    with pytest.raises(ConversionError):
        dpk.convert_model(model, add_missing_biases=True)
    assert same(before, snapshot(model))
    with pytest.raises(ConversionError, match="True or False"):
        dpk.convert_model(model, add_missing_biases="all")  # type: ignore[arg-type]


def test_trained_saved_loaded_and_restored(tmp_path: pathlib.Path) -> None:
    model = llama()
    fresh, tokens = copy.deepcopy(model), torch.randint(0, 40, (4, 6))
    dpk.convert_model(model, add_missing_biases=True)
    engine = dpk.PrivacyEngine()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=4)
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0,
        poisson_sampling=False,
    )  # fmt: skip
    loss(model, tokens).backward()
    optimizer.step()
    engine.detach()
    path = tmp_path / "task.safetensors"
    dpk.save_biases(model, str(path))
    dpk.convert_model(fresh, add_missing_biases=True)
    dpk.load_biases(fresh, str(path))
    with torch.no_grad():
        assert torch.equal(fresh(tokens).logits, model(tokens).logits)
        plain = dpk.restore_model(fresh)
        assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
        assert bool(plain.model.layers[0].mlp.up_proj.bias.any())
        assert torch.equal(plain(tokens).logits, model(tokens).logits)
