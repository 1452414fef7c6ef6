"""dp-bitfit scan: the report of a model that is only named; and the shares of the paper's table 1."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from torch import nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import cli
from dp_bitfit_kernels.scan import scan

transformers = pytest.importorskip("transformers")


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.LayerNorm(4, bias=False))


def test_a_class_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scan", "BertModel"]) == 0
    shown = capsys.readouterr().out
    assert "102,912 of 109,482,240 parameters are trained" in shown
    assert cli.main(["scan", "BertModel", "--json", "--biases", "*.query.bias"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["trained"].values()) == 12 * 768
    assert report["frozen"]["pooler.dense.bias"] == "not matched by biases"
    assert cli.main(["scan", "BertModel", "--biases", "informative"]) == 0
    assert "key bias under softmax attention" in capsys.readouterr().out


def test_a_class_of_yours(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scan", "test_scan:Small"]) == 0
    assert "4 of 20 parameters" in capsys.readouterr().out
    assert cli.main(["scan", "test_scan:Small", "--add-missing-biases"]) == 0
    assert "8 of 24 parameters" in capsys.readouterr().out


def test_a_folder_with_a_configuration(tmp_path: pathlib.Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    assert "transformer.h.0.attn.c_attn.bias" in scan(str(tmp_path)).trained


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such-model", "no class of transformers"),
        ("BertConfig", "no model class"),
        ("test_scan:Missing", "Missing"),
        ("no_module:Class", "no_module"),
        ("builtins:dict", "a dict, not a torch"),
        ("torch.nn:Linear", "missing"),
        ("LlamaModel", "nothing to train"),
    ],
)
def test_what_cannot_be_scanned(model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scan", model]) == 1
    assert message in capsys.readouterr().err


def test_timm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="timm needs torchvision")
    assert cli.main(["scan", "timm:resnet18"]) == 0
    assert "batchnorm2d.bias" in capsys.readouterr().out


def vgg16() -> nn.Module:
    parts: list[nn.Module] = []
    before = 3
    for width, times in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(times):
            parts += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        parts.append(nn.MaxPool2d(2))
    head = [nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)]
    return nn.Sequential(*parts, nn.Flatten(), *head)


def of(kind: str, **options: Any) -> nn.Module:
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**options))


RESNET = {"embedding_size": 64, "num_labels": 10}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
PAPER = {
    "RoBERTa-base": (lambda: of("RobertaModel", **ROBERTA), 0.083),
    "RoBERTa-large": (lambda: of("RobertaModel", **ROBERTA, **LARGE), 0.077),
    "GPT2-large": (lambda: of("GPT2LMHeadModel", n_embd=1280, n_layer=36, n_head=20), 0.066),
    "ViT-large": (lambda: of("ViTForImageClassification", **LARGE, num_labels=10), 0.090),
    "VGG16": (vgg16, 0.009),
    "ResNet18": (
        lambda: of(
            "ResNetForImageClassification",
            **RESNET,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
        ),
        0.043,
    ),
    "ResNet50": (lambda: of("ResNetForImageClassification", **RESNET), 0.113),
}


@pytest.mark.parametrize("name", PAPER)
def test_shares_are_those_of_the_paper(name: str) -> None:
    make, percent = PAPER[name]
    with torch.device("meta"):
        model = make()
    dpk.convert_model(model)
    assert dpk.conversion_report(model).percent == pytest.approx(percent, abs=6e-4)
