"""Conversion: what trains, what stays frozen and why, what is refused, and that nothing is dropped or left behind."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import time
import weakref

import pytest
import torch
from networks import ConvNet, accounted, bias_names, same, snapshot
from torch import Tensor, nn

from dp_bitfit_kernels import layers
from dp_bitfit_kernels._decision import NEVER_CALLED
from dp_bitfit_kernels._validate import ConversionError, UnsupportedModuleError
from dp_bitfit_kernels.convert import conversion_report, convert_model, restore_model
from dp_bitfit_kernels.report import NOT_A_BIAS


class ParentForward(nn.Linear):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.note = "unchanged"


def test_conv_net_trains_every_bias_and_freezes_statistics() -> None:
    model = ConvNet()
    keys, pointers = list(model.state_dict()), [(id(p), p.data_ptr()) for p in model.parameters()]
    assert convert_model(model) is model
    accounted(model)
    assert set(conversion_report(model).trained) == bias_names(model)
    assert keys == list(model.state_dict())
    assert pointers == [(id(p), p.data_ptr()) for p in model.parameters()]
    assert set(conversion_report(model).frozen.values()) == {NOT_A_BIAS}
    mean = model.norm.running_mean.clone()
    model.train()(torch.randn(4, 2, 8, 8)).sum().backward()
    assert torch.equal(model.norm.running_mean, mean)
    assert model.norm.num_batches_tracked == 0
    assert all((p.grad is None) == (not p.requires_grad or "unused" in n) for n, p in model.named_parameters())


def test_outputs_are_those_of_the_original() -> None:
    torch.manual_seed(0)
    model = ConvNet().eval()
    x = torch.randn(3, 2, 8, 8)
    expected = model(x)
    assert torch.equal(convert_model(model)(x), expected)
    assert torch.equal(restore_model(model)(x), expected)


def test_batchnorm_is_converted_even_where_its_bias_stays_frozen() -> None:
    model = convert_model(ConvNet(), biases=("head.bias",), memory="off")
    assert layers.is_converted(model.norm)
    assert model.norm.trained == frozenset()
    assert not layers.is_converted(model.conv)
    assert set(conversion_report(model).trained) == {"head.bias"}
    assert conversion_report(model).frozen["conv.bias"] == "not matched by biases"
    affineless = convert_model(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)))
    affineless.train()(torch.randn(5, 3))
    assert affineless[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4, track_running_stats=False),
        type("OwnInstanceNorm", (nn.InstanceNorm1d,), {"forward": lambda self, x: x})(4, track_running_stats=True),
        nn.SyncBatchNorm(4),
        type("OwnBatchNorm", (nn.BatchNorm1d,), {"forward": lambda self, x: nn.BatchNorm1d.forward(self, x)})(4),
    ],
    ids=["no statistics", "instance statistics", "sync", "own forward"],
)
def test_statistics_that_cannot_be_frozen_are_refused(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), module)
    with pytest.raises(UnsupportedModuleError, match=r"statistics(.|\n)*  1: "):
        convert_model(model, biases=("0.bias",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"biases": ("hed.bias",)}, r"'hed\.bias' matches no parameter; near it: head\.bias"),
        ({"biases": ("*", "!haed.bias")}, r"'!haed\.bias' matches no parameter; near it: head\.bias"),
        ({"biases": ("conv2.*",)}, r"'conv2\.\*' matches 1 parameters, none of them a bias"),
        ({"biases": ("!conv.bias", "conv.*")}, "nothing to train"),
        ({"biases": ()}, r"nothing to train .*biases"),
        ({"biases": 3}, "biases must be"),
        ({"biases": (1,)}, "biases must be"),
        ({"biases": ("",)}, "empty pattern"),
        ({"train_modules": "haed"}, r"train_modules: 'haed' matches no module; near it: head"),
        ({"memory": "some"}, "memory must be"),
        ({"backend": "cuda"}, "backend must be one of auto, reference, native, triton"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(arguments: dict[str, object], message: str) -> None:
    model = ConvNet()
    model.conv.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = snapshot(model)
    with pytest.raises(ConversionError, match=message):
        convert_model(model, **arguments)  # type: ignore[arg-type]
    assert same(before, snapshot(model))


def test_a_failure_half_way_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = ConvNet(), layers.convert_layer

    def fails_at_group(module: nn.Module, kind: layers.LayerKind) -> None:
        if isinstance(module, nn.GroupNorm):
            raise RuntimeError("broken")
        original(module, kind)

    before = snapshot(model)
    monkeypatch.setattr(layers, "convert_layer", fails_at_group)
    with pytest.raises(RuntimeError, match="broken"):
        convert_model(model)
    assert same(before, snapshot(model))


def test_subclass_with_the_parents_forward_is_converted() -> None:
    model = nn.Sequential(ParentForward(3, 3), nn.Linear(3, 2))
    convert_model(model)
    assert set(conversion_report(model).trained) == {"0.bias", "1.bias"}
    assert isinstance(model[0], ParentForward)
    assert model[0].note == "unchanged"
    restore_model(model)
    assert type(model[0]) is ParentForward


def test_train_modules_whole() -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "heads": nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])})
    convert_model(model, biases=("*", "!heads.0.bias"), train_modules=("heads",))
    assert list(conversion_report(model).trained) == [
        "body.bias", "heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias",
    ]  # fmt: skip
    assert model["heads"][0].trained == frozenset({"weight", "bias"})
    assert model["body"].trained == frozenset({"bias"})
    restore_model(model)
    convert_model(model, biases=(), train_modules="heads.?")
    assert set(conversion_report(model).trained) == {f"heads.{i}.{own}" for i in (0, 1) for own in ("weight", "bias")}
    assert conversion_report(model).frozen["body.bias"].startswith("not matched")
    accounted(model)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.bias = nn.Parameter(torch.zeros(6))
        self.decoder = nn.Linear(3, 6)
        self.decoder.bias = self.bias
        self.decoder.weight = self.embed.weight
        self.again = self.decoder  # a shared module object

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.embed(tokens)).mean(1)


def test_tied_and_shared() -> None:
    model = convert_model(TiedHead())
    accounted(model)
    report = conversion_report(model)
    assert list(report.trained) == ["bias"]
    assert report.tied == {
        "decoder.weight": "embed.weight", "decoder.bias": "bias", "again.weight": "embed.weight", "again.bias": "bias",
    }  # fmt: skip
    assert report.layers == {"linear": 1}
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.bias.grad is not None
    restore_model(model)
    with pytest.raises(ConversionError, match=r"decoder\.weight.*embed\.weight.*one tensor"):
        convert_model(model, train_modules=("decoder",))
    convert_model(model, train_modules=("decoder", "embed"))
    assert model.embed.trained == frozenset({"weight"})
    assert model.decoder.trained == frozenset({"weight", "bias"})
    twins = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    twins[1].bias = twins[0].bias
    convert_model(twins)
    assert twins[0].trained == twins[1].trained == frozenset({"bias"})


def test_sample_batch_finds_what_is_never_called_and_leaves_no_trace() -> None:
    model = ConvNet().train()
    model.drop.eval()
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_hook(lambda module, args, output: module.calls.add_(1))
    torch.manual_seed(7)
    model.conv.register_forward_hook(lambda *args: torch.rand(1) * 0 + args[2])
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(TypeError):
        convert_model(model, sample_batch=(torch.zeros(2, 2, 8, 8), 5))
    assert same(before, snapshot(model))
    convert_model(model, sample_batch=torch.randn(2, 2, 8, 8, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert model.training
    assert not model.drop.training
    report = conversion_report(model)
    assert report.frozen["unused.bias"] == NEVER_CALLED
    assert report.never_called == ("unused",)
    assert set(report.trained) == bias_names(model) - {"unused.bias"}
    accounted(model)
    by_keyword = convert_model(ConvNet(), sample_batch={"x": torch.zeros(2, 2, 8, 8)})
    assert conversion_report(by_keyword).never_called == ("unused",)


def test_sample_batch_sees_through_the_fast_path() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    convert_model(model, biases=("*", "!self_attn.*"), sample_batch=torch.zeros(2, 3, 4))
    assert conversion_report(model).never_called == ()
    assert set(conversion_report(model).trained) == {"linear1.bias", "linear2.bias", "norm1.bias", "norm2.bias"}


def test_converting_twice_and_restoring_nothing_are_refused() -> None:
    model = convert_model(ConvNet())
    with pytest.raises(ConversionError, match=r"already converted.*restore_model"):
        convert_model(model)
    with pytest.raises(ConversionError, match="already converted"):
        convert_model(nn.Sequential(model))
    restore_model(model)
    for call in (restore_model, conversion_report):
        with pytest.raises(ConversionError, match="is not converted"):
            call(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "before it is wrapped"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "has no shape yet"),
        (lambda: nn.ReLU(), "nothing to train"),
        (lambda: nn.Linear(2, 2, bias=False), "nothing to train"),
        (lambda: "model", "must be a torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_converted(make: object, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert_model(make())  # type: ignore[operator]


def test_restored_model_is_plain_and_needs_nothing_of_the_package() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    own = [sorted(m.__dict__) for m in model.modules()]
    convert_model(model, train_modules=("2",), backend="reference")
    assert model[0].backend == "reference"
    assert model[0].layer_name == "0"
    restore_model(model)
    assert own == [sorted(m.__dict__) for m in model.modules()]

    class WithoutThePackage(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            assert not module.startswith("dp_bitfit_kernels"), f"{module}.{name}"
            return super().find_class(module, name)

    plain = WithoutThePackage(io.BytesIO(pickle.dumps(model))).load()
    assert [type(module) for module in plain] == [nn.Linear, nn.LayerNorm, nn.Linear]
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_restore_is_refused_while_an_engine_is_attached() -> None:
    model = convert_model(ConvNet())
    model.conv.attachment = object()
    with pytest.raises(ConversionError, match="PrivacyEngine is attached to 'conv'"):
        restore_model(model)
    model.conv.attachment = None
    restore_model(model)


def test_a_copy_can_be_reported_and_restored() -> None:
    model = copy.deepcopy(convert_model(ConvNet(), biases=("*", "!conv.bias")))
    report = conversion_report(model)
    assert set(report.trained) == bias_names(model) - {"conv.bias"}
    assert report.frozen["conv.bias"] == "requires_grad is False"
    accounted(model)
    restore_model(model)
    assert not any(layers.is_converted(module) for module in model.modules())


def test_the_record_does_not_keep_a_model_alive() -> None:
    model: nn.Module | None = convert_model(nn.Linear(2, 2))
    reference = weakref.ref(model)
    model = None
    gc.collect()
    assert reference() is None


def test_report_is_readable_and_serialises() -> None:
    report = conversion_report(convert_model(ConvNet(), sample_batch=torch.zeros(2, 2, 8, 8)))
    total = sum(p.numel() for p in ConvNet().parameters())
    assert report.percent == pytest.approx(100 * (3 + 4 + 4 + 8) / total)
    text = str(report)
    assert f"19 of {total:,} parameters are trained" in text
    for part in ("linear.bias", "groupnorm.bias", NOT_A_BIAS, NEVER_CALLED, "unused.bias", "1 batchnorm2d"):
        assert part in text
    assert json.loads(json.dumps(report.to_dict()))["frozen"]["unused.bias"] == NEVER_CALLED


def test_a_model_of_24_layers_converts_in_under_half_a_second_without_copies() -> None:
    with torch.device("meta"):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(1024, 16, 4096), 24, enable_nested_tensor=False)
        for layer in model.layers:
            layer.self_attn = nn.ModuleList([nn.Linear(1024, 1024) for _ in range(4)])
    parameters = [(id(p), p.data_ptr()) for p in model.parameters()]
    started = time.process_time()
    convert_model(model)
    assert time.process_time() - started < 0.5
    assert parameters == [(id(p), p.data_ptr()) for p in model.parameters()]
    assert len(conversion_report(model).trained) == 24 * 8
    accounted(model)
