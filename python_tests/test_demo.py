"""The demonstration, with settings so small that only its machinery is tested, not how well it learns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("rich")
pytest.importorskip("tqdm")
pytest.importorskip("dp_accounting")

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import cli
from dp_bitfit_kernels.demo.digits import handwritten_digits
from dp_bitfit_kernels.demo.glyphs import CHARACTERS, glyph_set, master_glyphs, text_fonts
from dp_bitfit_kernels.demo.network import GlyphNet
from dp_bitfit_kernels.demo.outcome import Settings
from dp_bitfit_kernels.demo.report import print_table
from dp_bitfit_kernels.demo.run import BIASES_FILE, run_demo

TINY = Settings(
    epsilons=(8.0, 2.0), epochs=1, plain_rates=(0.01,), glyphs=256, pretrain_epochs=1, hidden=16, channels=8
)


def test_every_font_shows_each_character_differently() -> None:
    images, labels = master_glyphs()
    count, fonts = len(CHARACTERS), len(text_fonts())
    assert len(images) == count * fonts and fonts >= 10
    for font in images.view(fonts, count, -1):
        assert len({tuple(character.tolist()) for character in font}) == count
    assert labels.view(fonts, count).equal(torch.arange(count).expand(fonts, count))


def test_glyphs_follow_from_the_seed_alone() -> None:
    first, again, other = glyph_set(64, 1), glyph_set(64, 1), glyph_set(64, 2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (64, 1, 16, 16) and first[0].min() >= 0 and first[0].max() <= 1


def test_the_test_split_is_held_out() -> None:
    digits = handwritten_digits(0)
    train = {image.numpy().tobytes() for image in digits.images}
    assert not train & {image.numpy().tobytes() for image in digits.test_images}
    assert len(digits.images) + len(digits.test_images) == 1797


def test_the_network_trains_every_bias_and_no_weight() -> None:
    report = dpk.conversion_report(dpk.convert_model(GlyphNet()))
    assert set(report.trained) == {name for name, _ in GlyphNet().named_parameters() if name.endswith("bias")}


def test_demo_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_demo(TINY, tmp_path)
    assert [row.method for row in outcome.private] == ["DP-BiTFiT, epsilon = 2", "DP-BiTFiT, epsilon = 8"]
    for row, target in zip(outcome.private, (2.0, 8.0), strict=True):
        assert row.epsilon is not None and 0.8 * target < row.epsilon <= target
    assert outcome.reloaded == outcome.private[-1].accuracy
    assert outcome.saved_statement["epsilon"] == outcome.private[-1].epsilon
    assert outcome.saved == tmp_path / BIASES_FILE and outcome.saved.stat().st_size < 16_000
    assert outcome.figure.read_bytes().startswith(b"\x89PNG")
    json.dumps(outcome.to_dict())
    assert "epsilon spent" in capsys.readouterr().err
    print_table(outcome)
    assert "gap closed" in capsys.readouterr().out


def test_the_saved_biases_fit_only_their_own_network(tmp_path: Path) -> None:
    saved = run_demo(dataclasses.replace(TINY, epsilons=(8.0,)), tmp_path, quiet=True).saved
    with pytest.raises(dpk.CheckpointError):
        dpk.load_biases(GlyphNet(channels=8, hidden=16), saved)


@pytest.mark.parametrize(
    "argument", [["--epsilons", "0"], ["--epsilons", "inf"], ["--epochs", "0"], ["--seed", "-1"], []]
)
def test_the_command_refuses_what_has_no_meaning(argument: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *argument] if argument else [])
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_missing_package_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_DEMO_NEEDS", ("rich", "no_such_package"))
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "no_such_package" in capsys.readouterr().err and not (tmp_path / "out").exists()
