"""Which parameters are biases and are trained: by name, by pattern, in the models of a hub."""

from __future__ import annotations

import pytest
import torch
from networks import ConvNet, OwnForward, accounted, bias_names, same, snapshot
from torch import nn

from dp_bitfit_kernels._validate import ConversionError
from dp_bitfit_kernels.convert import conversion_report, convert_model, restore_model
from dp_bitfit_kernels.report import NOT_A_BIAS


@pytest.mark.parametrize(
    ("biases", "trained"),
    [
        ("all", {"head.bias", "conv.bias", "norm.bias", "group.bias", "unused.bias"}),
        (("*", "!norm.*", "!unused.bias"), {"head.bias", "conv.bias", "group.bias"}),
        (("!norm.*", "!unused.bias"), {"head.bias", "conv.bias", "group.bias"}),
        (("conv*", "head.*"), {"head.bias", "conv.bias"}),
        ("head.bias", {"head.bias"}),
        (["head.weight", "conv.bias"], {"head.weight", "conv.bias"}),
    ],
)
def test_bias_patterns(biases: object, trained: set[str]) -> None:
    model = ConvNet()
    convert_model(model, biases=biases)  # type: ignore[arg-type]
    assert set(conversion_report(model).trained) == trained
    accounted(model)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (nn.MultiheadAttention(4, 2), ["body.in_proj_bias", "body.out_proj.bias"]),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["body.bias_k", "body.bias_v"]),
        (nn.LSTM(4, 4), ["body.bias_ih_l0", "body.bias_hh_l0"]),
        (nn.Bilinear(4, 4, 4), ["body.bias"]),
        (OwnForward(4, 4), ["body.bias"]),
        (nn.TransformerEncoderLayer(4, 2, 8), ["body.self_attn.in_proj_bias"]),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), ["body.bias"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_biases_of_every_kind_of_module_are_trained(module: nn.Module, names: list[str]) -> None:
    model = nn.Sequential()
    model.add_module("body", module)
    model.add_module("head", nn.Linear(4, 2))
    before = snapshot(model)
    convert_model(model)
    accounted(model)
    report = conversion_report(model)
    assert set(names) <= set(report.trained)
    alone = ["body"] if isinstance(module, (nn.LSTM, OwnForward)) else []
    assert list(report.one_by_one) == alone
    assert ("one sample at a time" in str(report)) == bool(alone)
    restore_model(model)
    convert_model(model, biases=tuple(f"!{name}" for name in names))
    assert conversion_report(model).frozen[names[0]] == "excluded by biases"
    assert not set(names) & set(conversion_report(model).trained)
    restore_model(model)
    assert same(before, snapshot(model))


class Named(nn.Module):
    """Raw parameters under names that real models use."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(2, 3)))
        self.proj = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) + sum(p.mean() for p in self._parameters.values() if p is not None)


@pytest.mark.parametrize(
    "name",
    ["relative_position_bias_table", "attention_biases", "r_w_bias", "r_s_bias", "pos_bias_u", "attn_bias",
     "relative_attention_bias", "position_bias", "logit_bias", "e_score_correction_bias"],
)  # fmt: skip
def test_tables_and_scalars_are_no_biases_unless_named(name: str) -> None:
    model = convert_model(Named(name), biases=("*",))
    assert set(conversion_report(model).trained) == {"proj.bias"}
    assert "not a bias" in conversion_report(model).frozen[name]
    for pattern in (name, f"*{name}"):
        model = convert_model(Named(name), biases=(pattern, "proj.bias"))
        assert set(conversion_report(model).trained) == {name, "proj.bias"}


def test_conformer_pair_is_a_table_and_lone_bias_v_is_not() -> None:
    assert "table" in conversion_report(convert_model(Named("bias_u", "bias_v"))).frozen["bias_v"]
    assert "bias_v" in conversion_report(convert_model(Named("bias_v"))).trained


@pytest.mark.parametrize("name", ["bias", "q_bias", "dt_bias", "bias_hh", "gate_up_proj_bias", "input_gate_bias"])
def test_free_standing_biases_are_trained_not_dropped(name: str) -> None:
    report = conversion_report(convert_model(Named(name)))
    assert set(report.trained) == {name, "proj.bias"}
    assert report.one_by_one == {"": "Named"}


def test_one_owner_that_calls_it_a_bias_is_enough() -> None:
    model = nn.Module()
    model.register_parameter("offset", nn.Parameter(torch.zeros(3)))
    model.decoder = nn.Linear(3, 3)
    model.decoder.bias = model.offset
    convert_model(model)
    assert conversion_report(model).trained == {"offset": 3}
    assert conversion_report(model).groups == {"offset": "linear.bias"}
    accounted(model)


def test_a_frozen_bias_is_trained_unless_excluded_and_flags_come_back() -> None:
    model = ConvNet()
    model.conv.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    convert_model(model)
    assert model.conv.bias.requires_grad
    assert model.head.weight.grad is None, "an optimizer would apply a stale gradient to a frozen weight"
    restore_model(model)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


HUGGING_FACE = {
    "bert": ("BertConfig", "BertForSequenceClassification", "classifier"),
    "bert-mlm": ("BertConfig", "BertForMaskedLM", None),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", "classifier"),
    "roberta-mlm": ("RobertaConfig", "RobertaForMaskedLM", None),
    "gpt2": ("GPT2Config", "GPT2ForSequenceClassification", "score"),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_models_are_fully_covered(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    config_name, class_name, head = HUGGING_FACE[family]
    common = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1, **common)
    else:
        config = getattr(transformers, config_name)(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **common
        )
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    tokens = torch.randint(2, 50, (3, 7))
    expected = model(tokens).logits
    convert_model(model, train_modules=(head,) if head else (), sample_batch={"input_ids": tokens})
    report = conversion_report(model)
    accounted(model)
    weights = {f"{head}.{name}" for name, _ in model.get_submodule(head).named_parameters()} if head else set()
    assert set(report.trained) == bias_names(model) | weights
    assert set(report.frozen.values()) == {NOT_A_BIAS}
    assert report.never_called == ()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)
    if family == "gpt2":  # gelu_new, six operations, is one where a gradient is recorded
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0.0, atol=2.0**-22)
    assert family == "gpt2" or torch.equal(model(tokens).logits, expected)
    model.train()(tokens).logits.square().sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in report.trained)
    if family.endswith("mlm"):
        assert any(name.endswith("decoder.bias") for name in {*report.tied, *report.trained})


def test_t5_has_no_bias_and_its_relative_attention_bias_is_a_weight() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    model = transformers.T5EncoderModel(config)
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert table in dict(model.named_parameters())
    with pytest.raises(ConversionError, match="nothing to train"):
        convert_model(model)
    convert_model(model, biases=("*relative_attention_bias.weight",))
    assert set(conversion_report(model).trained) == {table}
    restore_model(model)
    with_head = nn.ModuleDict({"t5": model, "head": nn.Linear(8, 2)})
    convert_model(with_head)
    assert set(conversion_report(with_head).trained) == {"head.bias"}
    assert conversion_report(with_head).frozen[f"t5.{table}"] == NOT_A_BIAS


def test_a_scripted_module_is_refused_by_name_and_can_be_left_out() -> None:
    for inner in (torch.jit.script(nn.Linear(3, 3)), torch.jit.trace(nn.Linear(3, 3), torch.zeros(1, 3))):
        model = nn.Sequential(nn.Linear(3, 3), inner)
        convert_model(model, biases=("*", "!1.bias"))
        assert set(conversion_report(model).trained) == {"0.bias"}
