"""biases="informative": key biases that get no gradient stay as they are; those that get one are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import accounted
from test_families import FAMILIES, build, loss
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._signal import NO_SIGNAL, without_signal

WITHOUT = ("BERT", "RoBERTa", "ALBERT", "BART", "GPT-2", "OPT", "ViT", "DeiT", "CLIP", "SigLIP", "Wav2Vec2")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_out_has_no_gradient(name: str) -> None:
    model, batch, _ = build(name)
    parts = without_signal(model)
    assert bool(parts) == (name in WITHOUT)
    if not parts:
        return
    model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    loss(model, batch).backward()
    biases = [p.grad for n, p in model.named_parameters() if n.endswith("bias") and p.grad is not None]
    size = torch.stack([g.norm() for g in biases]).max()
    for parameter in model.parameters():
        part = parts.get(id(parameter))
        if part is not None and parameter.grad is not None:
            assert parameter.grad[part.start : part.stop].norm() <= 1e-13 * size
            assert part.whole or parameter.grad[part.stop :].norm() > 1e-6 * size


def test_rotary_keys_learn() -> None:
    model, batch, _ = build("Qwen2")
    assert not without_signal(model)
    loss(model, batch).backward()
    assert bool(model.model.layers[0].self_attn.k_proj.bias.grad.any())


@pytest.mark.parametrize("name", ["BERT", "ViT"])
def test_keys_of_their_own_are_frozen(name: str) -> None:
    model, _, _ = build(name)
    dpk.convert_model(model, biases="informative")
    accounted(model)
    frozen = [n for n, why in dpk.conversion_report(model).frozen.items() if why == NO_SIGNAL]
    assert len(frozen) == 2
    assert all(n.endswith(("key.bias", "k_proj.bias")) for n in frozen)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def test_parts_of_a_bias_stay_as_they_are_under_noise() -> None:
    torch.manual_seed(0)
    model = dpk.convert_model(Attention(), biases="informative")
    report = dpk.conversion_report(model)
    assert report.trained == {"inner.in_proj_bias": 12, "inner.out_proj.bias": 6}
    assert "elements 6 to 12 of 18" in report.partly["inner.in_proj_bias"]
    assert "trained in part" in str(report)
    before = model.inner.in_proj_bias.detach().clone()
    x = torch.randn(8, 5, 6)
    model, optimizer, loader = dpk.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8),
        noise_multiplier=5.0,
        max_grad_norm=1.0,
    )
    for (batch,) in loader:
        model(batch).square().mean((1, 2)).mean().backward()
        assert optimizer.step()
    moved = (model.inner.in_proj_bias.detach() - before) != 0
    assert not bool(moved[6:12].any())
    assert bool(moved[:6].all())
    assert bool(moved[12:].all())


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_beside_others_have_a_signal(options: dict[str, bool]) -> None:
    assert not without_signal(Attention(**options))
