"""Files of trained biases: what is in them, what they fit, and how damage and foreign files are refused."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

import pytest
import torch
from networks import equal, network, trained, values
from torch import Tensor, nn

from dp_bitfit_kernels import checkpoint
from dp_bitfit_kernels._validate import CheckpointError, ConversionError
from dp_bitfit_kernels.checkpoint import load_biases, save_biases
from dp_bitfit_kernels.convert import conversion_report, convert_model, restore_model

safetensors_torch = pytest.importorskip("safetensors.torch")


def edited(path: pathlib.Path, change: Any, *, sign: bool = True) -> None:
    """Rewrite a bias file after change(metadata, tensors), with a digest that fits if `sign`."""
    with checkpoint_open(path) as file:
        metadata = dict(file.metadata())
    tensors = safetensors_torch.load(path.read_bytes())
    digest = metadata.pop("digest")
    change(metadata, tensors)
    metadata["digest"] = checkpoint._digest(metadata, tensors) if sign else digest
    path.write_bytes(safetensors_torch.save(tensors, metadata))


def checkpoint_open(path: pathlib.Path) -> Any:
    import safetensors

    return safetensors.safe_open(str(path), framework="pt")


class Compiled(nn.Module):
    """Names its parameters as the module that torch.compile returns does, without the ten seconds of its import."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("target", ["converted", "restored", "plain", "bfloat16", "wrapped", "compiled"])
def test_biases_round_trip(target: str, tmp_path: pathlib.Path) -> None:
    source = trained()
    save_biases(source, tmp_path / "task.safetensors")
    model = network()
    if target == "converted":
        convert_model(model, biases=("0.bias",))
    elif target == "restored":
        restore_model(convert_model(model))
    elif target == "bfloat16":
        model.to(torch.bfloat16)
    elif target == "compiled":
        model = Compiled(model)
    elif target == "wrapped":
        model = nn.DataParallel(model)
    statement = load_biases(model, tmp_path / "task.safetensors")
    assert statement == {"private": False, "reason": "no privacy engine was attached when this file was written"}
    expected = [tensor.to(torch.bfloat16) for tensor in values(source)] if target == "bfloat16" else values(source)
    assert equal([tensor.to(want.dtype) for tensor, want in zip(values(model), expected, strict=True)], expected)


def test_only_what_was_trained_is_in_the_file(tmp_path: pathlib.Path) -> None:
    source = trained()
    save_biases(source, tmp_path / "task.safetensors")
    tensors = safetensors_torch.load((tmp_path / "task.safetensors").read_bytes())
    assert set(tensors) == set(conversion_report(source).trained) == {"0.bias", "1.bias", "3.weight", "3.bias"}
    assert os.listdir(tmp_path) == ["task.safetensors"]


def test_a_parameter_unfrozen_after_conversion_is_saved_too(tmp_path: pathlib.Path) -> None:
    source = convert_model(network())
    source[0].weight.requires_grad_()
    source[1].bias.requires_grad_(False)
    save_biases(source, tmp_path / "f")
    assert {"0.weight", "1.bias"} <= set(safetensors_torch.load((tmp_path / "f").read_bytes()))


class Attached:
    """Stands in for what an engine attaches to a layer."""

    def privacy_statement(self, delta: float | None) -> dict[str, Any]:
        return {"private": True, "epsilon": 3.0, "delta": delta}


def test_privacy_statement_travels_with_the_file(tmp_path: pathlib.Path) -> None:
    source = trained()
    source[0].attachment = Attached()
    save_biases(source, tmp_path / "f", delta=1e-5)
    assert load_biases(network(), tmp_path / "f") == {"private": True, "epsilon": 3.0, "delta": 1e-5}
    with pytest.raises(CheckpointError, match="digest does not match"):  # a statement cannot be bettered by hand
        edited(tmp_path / "f", lambda meta, _: meta.update(privacy='{"private": true, "epsilon": 0.1}'), sign=False)
        load_biases(network(), tmp_path / "f")


class TiedHead(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(6, 3)
        self.bias = nn.Parameter(torch.zeros(6))
        self.decoder = nn.Linear(3, 6)
        if tie:
            self.decoder.bias = self.bias


def test_a_tied_parameter_is_saved_once_and_loaded_everywhere(tmp_path: pathlib.Path) -> None:
    source = convert_model(TiedHead())
    with torch.no_grad():
        source.bias.copy_(torch.arange(6.0))
    save_biases(source, tmp_path / "f")
    assert list(safetensors_torch.load((tmp_path / "f").read_bytes())) == ["bias"]
    with checkpoint_open(tmp_path / "f") as file:
        assert json.loads(file.metadata()["tied"]) == {"bias": ["decoder.bias"]}
    for tie in (True, False):
        model = TiedHead(tie)
        load_biases(model, tmp_path / "f")
        assert torch.equal(model.bias, torch.arange(6.0))
        assert torch.equal(model.decoder.bias, torch.arange(6.0))
    untied = convert_model(TiedHead(tie=False), biases=("decoder.bias",))
    untied.bias.requires_grad_()
    with torch.no_grad():
        untied.bias.add_(1)
    save_biases(untied, tmp_path / "g")
    with pytest.raises(CheckpointError, match=r"two different values for 'decoder\.bias'"):
        load_biases(TiedHead(), tmp_path / "g", strict=False)


def flip(path: pathlib.Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def nan(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["0.bias"][2] = float("nan")


def shape(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["0.bias"] = torch.zeros(9)


def name(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["7.bias"] = tensors.pop("0.bias")


FAULTS = {
    "empty": (lambda path: path.write_bytes(b""), "damaged, or not a safetensors file"),
    "not safetensors": (lambda path: path.write_bytes(b"hello, this is no such file"), "damaged, or not a safetensors"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "damaged, or not a safetensors file"),
    "one bit of a value": (lambda path: flip(path, -3), "digest does not match"),
    "missing": (lambda path: path.unlink(), "cannot be read"),
    "foreign": (
        lambda path: path.write_bytes(safetensors_torch.save({"0.bias": torch.zeros(8)})),
        "not one that save_biases wrote",
    ),
    "newer format": (lambda path: edited(path, lambda meta, _: meta.update(format_version="2")), "format version 2"),
    "another value": (lambda path: edited(path, lambda _, t: t["0.bias"].add_(1), sign=False), "digest does not match"),
    "another fingerprint": (
        lambda path: edited(path, lambda meta, _: meta.update(base_weights="0"), sign=False),
        "digest does not match",
    ),
    "NaN": (lambda path: edited(path, nan), r"0\.bias: holds NaN"),
    "wrong shape": (lambda path: edited(path, shape), r"0\.bias has shape \(8,\), saved \(9,\)"),
    "wrong name": (lambda path: edited(path, name), r"7\.bias is not in the model"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_bad_bias_file_is_refused_whole(fault: str, strict: bool, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "task.safetensors"
    save_biases(trained(), path)
    spoil, message = FAULTS[fault]
    spoil(path)
    model = network()
    before = values(model)
    with pytest.raises(CheckpointError, match=message):
        load_biases(model, path, strict=strict)
    assert equal(before, values(model))


def test_every_flipped_byte_is_noticed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "f"
    save_biases(trained(), path)
    whole, model = path.read_bytes(), network()
    before = values(model)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            load_biases(model, path)
    assert equal(before, values(model))


def test_a_base_model_with_other_weights_is_refused_unless_not_strict(tmp_path: pathlib.Path) -> None:
    source = trained()
    save_biases(source, tmp_path / "f")
    other = network(seed=1)
    before = values(other)
    with pytest.raises(CheckpointError, match=r"other frozen weights.*strict=False"):
        load_biases(other, tmp_path / "f")
    assert equal(before, values(other))
    load_biases(other, tmp_path / "f", strict=False)
    assert torch.equal(other[0].bias, source[0].bias)
    assert torch.equal(other[0].weight, before[0])
    statistics = network()
    statistics[1].running_mean.add_(1)
    with pytest.raises(CheckpointError, match="other frozen weights"):
        load_biases(statistics, tmp_path / "f")


@pytest.mark.parametrize("strict", [True, False])
def test_another_architecture_is_refused(strict: bool, tmp_path: pathlib.Path) -> None:
    save_biases(trained(), tmp_path / "f")
    deeper = network()
    deeper.append(nn.Linear(3, 3))
    before = values(deeper)
    with pytest.raises(CheckpointError, match="another architecture"):
        load_biases(deeper, tmp_path / "f", strict=strict)
    with pytest.raises(CheckpointError, match="does not fit this Sequential"):
        load_biases(network(width=9), tmp_path / "f", strict=strict)
    assert equal(before, values(deeper))


def test_a_value_that_overflows_the_target_dtype_is_refused(tmp_path: pathlib.Path) -> None:
    source = trained()
    with torch.no_grad():
        source[3].bias[0] = 1e6
    save_biases(source, tmp_path / "f")
    model = network().half()
    before = values(model)
    with pytest.raises(CheckpointError, match=r"3\.bias as torch.float16: holds NaN or infinity"):
        load_biases(model, tmp_path / "f", strict=False)
    assert equal(before, values(model))


def test_saving_what_cannot_be_loaded_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "f"
    with pytest.raises(ConversionError, match="is not converted"):
        save_biases(network(), path)
    source = trained()
    save_biases(source, path)
    old = path.read_bytes()
    with torch.no_grad():
        source[0].bias[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"0\.bias: holds NaN or infinity; nothing was written"):
        save_biases(source, path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_biases(trained(), tmp_path / "no folder" / "f")
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="meta device"):
        save_biases(convert_model(meta), path)
    assert path.read_bytes() == old


def test_missing_safetensors_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        save_biases(trained(), tmp_path / "f")
