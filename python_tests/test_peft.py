"""Models of peft: each private step is the one of an oracle, moves what the preset names and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from attach import attach
from oracle import clipped_sum
from peft_cases import CASES, SAVED, TEXT, Case, bert, gpt2, ids, llama, loss, oracle_rows, roberta, wrapped
from safetensors.torch import load_file
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._foreign import PUT_ASIDE


def wanted(model: nn.Module, case: Case) -> set[str]:
    """What peft trains; with the base's biases where the preset trains all of them."""
    of_peft = {name for name, p in model.named_parameters() if p.requires_grad}
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias") and "original_module" not in name}
    return of_peft | biases if case.preset["biases"] == "all" else of_peft


def private_step(model: nn.Module, batch: dict[str, Tensor], bound: float) -> None:
    """One noiseless step of SGD at rate 1 on the whole batch."""
    size = len(next(iter(batch.values())))
    engine, private, optimizer, _ = attach(model, torch.zeros(size), bound=bound, poisson_sampling=False)
    loss(private, batch).backward()
    assert optimizer.step()
    engine.detach()


@pytest.mark.parametrize("name", CASES)
def test_a_noiseless_step_is_that_of_the_oracle(name: str) -> None:
    case = CASES[name]
    model, batch = wrapped(case), case.batch()
    names = sorted(wanted(model, case))
    rows = oracle_rows(model, names, batch)
    assert float((rows - rows.mean(0)).norm()) > 0.3 * float(rows.norm())
    bound = float(rows.norm(dim=1).median())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected_output = loss(model, batch)

    dpk.convert_model(model, **case.preset, sample_batch=batch)
    report = dpk.conversion_report(model)
    assert sorted(report.trained) == names
    assert set(report.one_by_one.values()) == case.alone
    with torch.no_grad():
        torch.testing.assert_close(loss(model, batch), expected_output)
    private_step(model, batch, bound)

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in after if key not in names)
    moved = torch.cat([(before[key] - after[key]).double().flatten() for key in names])
    expected = clipped_sum(rows, bound) / len(rows)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    parts = zip(names, rows.split([before[key].numel() for key in names], dim=1), strict=True)
    reached = {key for key, part in parts if float(part.abs().max()) > 1e-9}  # not biases of keys under softmax
    assert all(not torch.equal(after[key], before[key]) for key in reached)
    assert all(key.endswith((".key.bias", ".key.base_layer.bias")) for key in set(names) - reached)


def test_lora_goes_through_the_rule_of_linear_layers() -> None:
    model = dpk.convert_model(wrapped(CASES["LoRA"]), **CASES["LoRA"].preset)
    report = dpk.conversion_report(model)
    assert report.one_by_one == {}
    assert set(report.groups.values()) == {"linear.weight", "linear.bias"}
    assert sum("lora_" in name for name in report.trained) == 8


@pytest.mark.parametrize("name", ["LoRA", "LoRA of images", "DoRA", "IA3", "prompt tuning", "prefix tuning"])
def test_what_peft_saves_is_the_same_before_and_after_conversion(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, batch = wrapped(case), case.batch()
    model.save_pretrained(tmp_path / "before")
    dpk.convert_model(model, **case.preset, sample_batch=batch)
    model.save_pretrained(tmp_path / "converted")
    private_step(model, batch, 1.0)
    model.save_pretrained(tmp_path / "trained")
    first, second, third = (
        load_file(tmp_path / what / "adapter_model.safetensors") for what in ("before", "converted", "trained")
    )
    assert list(first) == list(second) == list(third)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)
    dpk.restore_model(model)
    if case.preset["biases"] == ():  # peft's file holds all that was trained
        again = peft.PeftModel.from_pretrained(case.base(), tmp_path / "trained").eval()
        with torch.no_grad():
            torch.testing.assert_close(loss(again, batch), loss(model, batch))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.merges])
def test_a_restored_model_merges_and_unloads(name: str) -> None:
    case = CASES[name]
    model, batch = wrapped(case), case.batch()
    flags = [p.requires_grad for p in model.parameters()]
    dpk.convert_model(model, **case.preset, sample_batch=batch)
    private_step(model, batch, 1.0)
    dpk.restore_model(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    with torch.no_grad():
        expected = loss(model, batch)
        plain = model.merge_and_unload()
        torch.testing.assert_close(loss(plain, batch), expected, rtol=1e-4, atol=1e-5)
    untouched = wrapped(case).merge_and_unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in untouched.modules()]
    assert list(plain.state_dict()) == list(untouched.state_dict())


def test_dora_without_a_sample_batch_is_refused_and_says_what_to_do() -> None:
    """Its magnitudes mix with the base weight, so that lora_A is called on an identity, which holds no samples."""
    case = CASES["DoRA"]
    model = dpk.convert_model(wrapped(case), **case.preset)
    with pytest.raises(dpk.BatchLayoutError, match=r"lora_A.*sample_batch="):
        dpk.check_model(model, case.batch(), loss)


PROMPTS = ["prompt tuning", "prompt tuning and biases", "P-tuning", "P-tuning by an LSTM"]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_made_for_each_sample_and_the_model_runs_once(name: str) -> None:
    case = CASES[name]
    model, batch = wrapped(case), case.batch()
    dpk.convert_model(model, **case.preset)
    runs = []
    model.base_model.register_forward_hook(lambda *_: runs.append(1))
    twin = copy.deepcopy(model)
    assert dpk.check_model(model, batch, loss).worst < 1e-5
    assert dpk.check_model(twin, batch, loss).worst < 1e-5
    engine, private, optimizer, _ = attach(model, torch.zeros(4), poisson_sampling=False)
    for _ in range(3):  # the layout is proven on the first and the second
        runs.clear()
        loss(private, batch).backward()
        optimizer.step()
    assert len(runs) == 1
    with engine.batch(4), pytest.raises(dpk.BatchLayoutError, match="prompts of 8 samples in a batch of 4"):
        model.get_prompt(8)


def test_prompts_of_an_encoder_whose_every_sample_has_other_ones_are_left_to_it() -> None:
    """Prefix tuning: its table is read with an index for each sample, so that its own rule holds."""
    report = dpk.conversion_report(dpk.convert_model(wrapped(CASES["prefix tuning"]), **dpk.presets.prompts()))
    assert set(report.groups.values()) == {"embedding.weight"}


@pytest.mark.parametrize("head", [(), SAVED, "*.classifier"])
def test_what_modules_to_save_stands_in_for_stays_frozen(head: str | tuple[str, ...]) -> None:
    """The original head is called no more: noise alone would move it, and peft gives it back on unloading."""
    model = dpk.convert_model(wrapped(CASES["LoRA"]), **dpk.presets.lora_and_bitfit(head=head))
    report = dpk.conversion_report(model)
    original = "base_model.model.classifier.original_module"
    assert not any(name.startswith(original) for name in report.trained)
    assert "peft does not run it" in report.frozen[f"{original}.bias"]
    saved = "base_model.model.classifier.modules_to_save.default"
    assert f"{saved}.bias" in report.trained
    assert (f"{saved}.weight" in report.trained) == bool(head)


def test_an_original_head_that_runs_is_trained() -> None:
    model = wrapped(CASES["LoRA"])
    with model.disable_adapter():
        dpk.convert_model(model, **dpk.presets.bitfit())
        assert "base_model.model.classifier.original_module.bias" in dpk.conversion_report(model).trained


def test_of_several_adapters_the_active_one_is_trained() -> None:
    model = wrapped(CASES["LoRA of an embedding"])
    model.add_adapter("other", CASES["LoRA of an embedding"].config())
    model.set_adapter("other")
    dpk.convert_model(model, **dpk.presets.lora())
    report = dpk.conversion_report(model)
    lora = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert set(report.trained) == {name for name in lora if ".other" in name}
    assert {report.frozen[name] for name in lora - set(report.trained)} == {PUT_ASIDE}


def test_norms_that_stand_in_for_others_leave_their_biases_frozen() -> None:
    model = dpk.convert_model(wrapped(CASES["LayerNorm tuning"]), **dpk.presets.bitfit())
    report = dpk.conversion_report(model)
    tuned = {name for name in (*report.trained, *report.frozen) if "LayerNorm" in name and name.endswith(".bias")}
    assert tuned & set(report.trained) == {name for name in tuned if ".ln_tuning_layers." in name}


def test_llama_adapter_is_chosen_by_the_names_of_its_parameters() -> None:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
    torch.manual_seed(0)
    model, batch = peft.get_peft_model(llama(), config).eval(), ids()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(0.5)  # at its start, 0, no gradient reaches the prompts
    of_peft = {name for name, p in model.named_parameters() if p.requires_grad}
    dpk.convert_model(model, biases=("*.adaption_prompt", "*.adaption_gate"), sample_batch=batch)
    assert set(dpk.conversion_report(model).trained) == of_peft
    check = dpk.check_model(model, batch, loss)
    assert check.worst < 1e-5
    assert not check.silent


class Bottleneck(nn.Module):
    """Houlsby's adapter: d -> r -> d beside a skip."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


@pytest.mark.parametrize("and_bitfit", [False, True])
def test_adapters_by_hand(and_bitfit: bool) -> None:
    model, batch = roberta(), ids()
    for layer in model.roberta.encoder.layer:
        layer.output.dense = nn.Sequential()
        layer.output.dense.base = nn.Linear(TEXT["intermediate_size"], TEXT["hidden_size"])
        layer.output.dense.adapter = Bottleneck(TEXT["hidden_size"], 4)
    model.eval()
    chosen = dpk.presets.adapters_and_bitfit if and_bitfit else dpk.presets.adapters
    names = sorted(
        name
        for name, _ in model.named_parameters()
        if ".adapter." in name or name.startswith("classifier.") or (and_bitfit and name.endswith(".bias"))
    )
    rows = oracle_rows(model, names, batch)
    before = copy.deepcopy(model.state_dict())
    dpk.convert_model(model, **chosen(head="classifier"), sample_batch=batch)
    assert sorted(dpk.conversion_report(model).trained) == names
    assert dpk.conversion_report(model).one_by_one == {}
    private_step(model, batch, 0.5)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if key not in names)
    moved = torch.cat([(before[key] - after[key]).double().flatten() for key in names])
    torch.testing.assert_close(moved, clipped_sum(rows, 0.5) / len(rows), rtol=1e-3, atol=1e-6)


def test_a_preset_for_what_the_model_lacks_says_so() -> None:
    for preset in (dpk.presets.lora(), dpk.presets.ia3(), dpk.presets.adapters(), dpk.presets.prompts()):
        with pytest.raises(dpk.ConversionError, match="matches no module"):
            dpk.convert_model(bert(), **preset)
    with pytest.raises(dpk.ConversionError, match="matches no module"):
        dpk.convert_model(gpt2(), **dpk.presets.linear_probe("classifier"))
