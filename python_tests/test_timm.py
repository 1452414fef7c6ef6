"""timm's layers and layouts, where timm is installed; stand-ins always run (layouts.py, test_own_forward.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dp_bitfit_kernels as dpk

timm = pytest.importorskip("timm", reason="timm needs torchvision, which has no build beside the pinned torch")

# what each stands for
MODELS = {
    "vit_tiny_patch16_224": "LayerNorm and Linear subclasses of timm's own",
    "swin_tiny_patch4_window7_224": "windows folded into the batch",
    "swinv2_tiny_window8_256": "q_bias and v_bias, and tables without a batch",
    "convnext_atto": "LayerNorm2d",
    "convnextv2_atto": "GlobalResponseNorm",
    "beit_base_patch16_224": "q_bias and v_bias",
    "eva02_tiny_patch14_224": "q_bias and v_bias beside rotary positions",
    "resnetv2_50x1_bit": "standardised convolutions, GroupNorm with an activation",
    "resnet18": "BatchNorm with an activation beside it",
    "efficientnet_b0": "BatchNormAct2d, squeeze and excitation",
    "regnety_002": "BatchNormAct2d behind grouped convolutions",
    "mobilevit_xxs": "patches folded into the batch",
    "maxvit_nano_rw_256": "windows and grids",
    "levit_128s": "BatchNorm over flattened tokens, tables of biases",
    "coat_lite_tiny": "convolutions of relative positions called several times",
    "sequencer2d_s": "LSTMs over rows and columns",
}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y * torch.linspace(-1.0, 1.0, y.shape[1])).mean(1).sin().mean()


@pytest.mark.parametrize("name", MODELS)
def test_every_bias_has_its_samples_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).double().eval()  # untrained, some amplify rounding a thousandfold
    with torch.no_grad():  # heads and scales that start at zero let no gradient pass
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
    size = model.default_cfg["input_size"]
    x = torch.randn(2, *size, dtype=torch.float64)
    dpk.convert_model(model, sample_batch=x)
    report = dpk.conversion_report(model)
    reasons = {why for why in report.frozen.values() if why != "not a bias"}
    assert all("never called" in why or "table" in why for why in reasons)
    check = dpk.check_model(model, x, loss)
    assert check.worst < 1e-6
    assert len(check.silent) < 0.2 * len(report.trained)  # key biases of plain attention
