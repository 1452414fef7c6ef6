"""Presets, patterns of classes and of exclusions in train_modules, tied weights, integer weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from attach import attach
from networks import ConvNet, accounted, bias_names, same, snapshot
from oracle import clipped_sum, rows
from peft_cases import bert, gpt2, ids, llama, loss, vit
from torch import Tensor, nn

import dp_bitfit_kernels as dpk

PRESETS = [name for name, made in inspect.getmembers(dpk.presets, inspect.isfunction) if not name.startswith("_")]
NEEDS_HEAD = {"linear_probe", "bitfit_and_head"}


def trained(model: nn.Module) -> set[str]:
    return set(dpk.conversion_report(model).trained)


def names(model: nn.Module, *parts: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


def of_class(model: nn.Module, *classes: type[nn.Module]) -> set[str]:
    return {
        f"{name}.{own}"
        for name, m in model.named_modules()
        if isinstance(m, classes)
        for own, _ in m.named_parameters()
    }


class RMSNorm(nn.Module):
    """A norm that is none of torch's, like those of language models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class EncoderLayerStableLayerNorm(nn.Module):
    """Not a norm, though its name ends as one's: a whole layer (Wav2Vec2 has such)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class LayerNorm2d(nn.LayerNorm):
    """timm's norm of images, channels first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class OwnBatchNorm(nn.BatchNorm2d):
    """A name of its own and the forward of its base."""


class ManyNorms(nn.Module):
    """[B, 3, 6, 6] -> [B, 2]: one norm of each sort between layers that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), LayerNorm2d(4), nn.InstanceNorm2d(4, affine=True)
        )
        self.tail = nn.Sequential(nn.LayerNorm(6), RMSNorm(6), nn.RMSNorm(6), EncoderLayerStableLayerNorm())
        self.project, self.head = nn.Linear(64, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(torch.tanh(self.project(self.stem(x).flatten(1)))))


NORMS_OF_MANY = {
    *(f"stem.{i}.{own}" for i in (1, 2, 3, 4) for own in ("weight", "bias")),
    *("tail.0.weight", "tail.0.bias", "tail.1.weight", "tail.2.weight", "tail.3.norm.weight"),
}


def squares(output: Tensor) -> Tensor:
    return output.square().sum(1).mean()


def step_and_oracle(model: nn.Module, x: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """(what a noiseless private step moved [P], what the oracle moves [P]) of the trained parameters, in training mode;
    everything else is bit for bit what it was."""
    torch.manual_seed(0)
    model.train()
    dpk.convert_model(model, sample_batch=x, **arguments)
    accounted(model)
    order = [name for name, p in model.named_parameters() if p.requires_grad]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = clipped_sum(rows(model, order, x, squares), 1.0) / len(x)
    engine, private, optimizer, _ = attach(model, torch.zeros(len(x)), poisson_sampling=False)
    squares(private(x)).backward()
    assert optimizer.step()
    engine.detach()
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if key not in order)
    return torch.cat([(before[key] - after[key]).double().flatten() for key in order]), expected


class TestPresets:
    @pytest.mark.parametrize("name", PRESETS)
    def test_each_is_a_new_dict_that_convert_model_takes(self, name: str) -> None:
        make = getattr(dpk.presets, name)
        given = {"head": "classifier"} if "head" in inspect.signature(make).parameters else {}
        first, second = make(**given), make(**given)
        assert first == second
        assert first is not second
        assert set(first) <= set(inspect.signature(dpk.convert_model).parameters)
        assert f"presets.{name}(" in make.__doc__
        if given:
            assert "classifier" in first["train_modules"]
            assert make(head=["a", "b"])["train_modules"][-2:] == ("a", "b")
        if name in NEEDS_HEAD:
            with pytest.raises(TypeError, match="head"):
                make()

    def test_plain_ones(self) -> None:
        model = bert()
        everything, biases, head = names(model, ""), bias_names(model), names(model, "classifier")
        norms, tables = of_class(model, nn.LayerNorm), of_class(model, nn.Embedding)
        for preset, expected in (
            (dpk.presets.full(), everything),
            (dpk.presets.bitfit(), biases),
            (dpk.presets.bitfit_and_head("classifier"), biases | head),
            (dpk.presets.linear_probe("classifier"), head),
            (dpk.presets.linear_probe(("classifier", "bert.pooler")), head | names(model, "pooler")),
            (dpk.presets.norms(), norms),
            (dpk.presets.norms(head="classifier"), norms | head),
            (dpk.presets.embeddings_and_biases(), tables | biases),
        ):
            dpk.convert_model(model, **preset)
            assert trained(model) == expected
            dpk.restore_model(model)

    def test_they_are_those_of_the_samples(self) -> None:
        for make, batch in ((bert, ids()), (llama, ids()), (vit, {"pixel_values": torch.randn(3, 3, 32, 32)})):
            for preset in (dpk.presets.full(), dpk.presets.norms(), dpk.presets.embeddings_and_biases()):
                model = make()
                if make is vit and "class:Embedding" in preset["train_modules"]:
                    continue  # it has none
                dpk.convert_model(model, **preset, sample_batch=batch)
                assert dpk.check_model(model, batch, loss).worst < 1e-5

    def test_norms_of_every_sort_and_nothing_that_holds_one(self) -> None:
        torch.manual_seed(0)
        model, x = ManyNorms(), torch.randn(4, 3, 6, 6)
        statistics = model.stem[1].running_mean.clone()
        moved, expected = step_and_oracle(model, x, **dpk.presets.norms())
        assert trained(model) == NORMS_OF_MANY
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(model.stem[1].running_mean, statistics)

    @pytest.mark.parametrize(
        "norm", [nn.BatchNorm2d, OwnBatchNorm, partial(nn.InstanceNorm2d, affine=True, track_running_stats=True)]
    )
    def test_the_scale_of_a_norm_is_trained_under_running_statistics(self, norm: Callable[[int], nn.Module]) -> None:
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Flatten(), nn.Linear(64, 2))
        with torch.no_grad():
            model[1].running_var.uniform_(0.5, 2.0)
        moved, expected = step_and_oracle(model, torch.randn(4, 3, 6, 6), biases=(), train_modules="class:_NormBase")
        assert trained(model) == {"1.weight", "1.bias"}
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)

    def test_batchnorm_of_a_module_trained_whole_keeps_its_statistics_without_an_engine(self) -> None:
        model = dpk.convert_model(ConvNet().train(), **dpk.presets.full())
        before = model.norm.running_mean.clone()
        model(torch.randn(4, 2, 8, 8)).sum().backward()
        assert torch.equal(model.norm.running_mean, before)
        assert model.norm.training
        assert model.norm.num_batches_tracked == 0


class TestPatterns:
    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
            ("class:Linear", {"unused", "head"}),
            ("class:Lin*|GroupNorm", {"unused", "head", "group"}),
            ("class:_ConvNd", {"conv", "conv2"}),
            ("head|nothing", {"head"}),
            (("*", "!conv*"), {"head", "norm", "group", "unused"}),
            (("!class:_ConvNd|Linear",), {"norm", "group"}),
            (("class:ConvNet", "!head", "!class:_NormBase"), {"conv", "conv2", "group", "unused"}),
        ],
    )
    def test_classes_alternatives_exclusions(self, patterns: Any, expected: set[str]) -> None:
        model = dpk.convert_model(ConvNet(), biases=(), train_modules=patterns)
        assert {name.rpartition(".")[0] for name in trained(model)} == expected
        accounted(model)

    def test_what_lies_below_is_covered_and_can_be_left_out(self) -> None:
        model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))))
        dpk.convert_model(model, biases=(), train_modules=("0", "!0.1", "0.1.1"))
        assert trained(model) == {"0.0.weight", "0.0.bias"}
        dpk.restore_model(model)
        dpk.convert_model(model, biases="all", train_modules=("*", "!0.1"))
        assert trained(model) == {"0.0.weight", "0.0.bias", "0.1.0.bias", "0.1.1.bias"}

    def test_what_all_modules_are_is_no_class_of_theirs(self) -> None:
        for pattern in ("class:Module", "class:object"):
            with pytest.raises(dpk.ConversionError, match="matches no module"):
                dpk.convert_model(ConvNet(), train_modules=pattern)

    @pytest.mark.parametrize(
        ("patterns", "message"),
        [
            ("class:Embedding", "'class:Embedding' matches no module"),
            ("class:GroupNrm", "near it: GroupNorm"),
            (("*", "!haed"), "'!haed' matches no module; near it: head"),
            ("class:", "empty pattern"),
            ("head|", "empty pattern"),
            ("!class:", "empty pattern"),
        ],
    )
    def test_a_pattern_that_does_nothing_is_refused(self, patterns: Any, message: str) -> None:
        model = ConvNet()
        before = snapshot(model)
        with pytest.raises(dpk.ConversionError, match=message):
            dpk.convert_model(model, train_modules=patterns)
        assert same(before, snapshot(model))


class TestTies:
    @pytest.mark.parametrize("patterns", [("lm_head",), ("transformer.wte",), ("transformer",), ("*", "!lm_head")])
    def test_half_of_a_tie_is_refused_by_both_names(self, patterns: tuple[str, ...]) -> None:
        model = gpt2()
        before = snapshot(model)
        with pytest.raises(dpk.ConversionError) as error:
            dpk.convert_model(model, train_modules=patterns, sample_batch=ids())
        assert "'lm_head.weight'" in str(error.value)
        assert "'transformer.wte.weight'" in str(error.value)
        assert same(before, snapshot(model))

    @pytest.mark.parametrize(
        "preset",
        [
            {"biases": (), "train_modules": ("lm_head", "transformer.wte")},
            {"biases": ("*.wte.weight",)},
            dpk.presets.embeddings_and_biases(head="lm_head"),
            dpk.presets.full(),
        ],
    )
    def test_both_halves_are_trained_with_the_gradients_of_both(self, preset: dict[str, Any]) -> None:
        model, batch = gpt2(), ids()
        dpk.convert_model(model, **preset, sample_batch=batch)
        assert "transformer.wte.weight" in trained(model)
        assert dpk.conversion_report(model).tied["lm_head.weight"] == "transformer.wte.weight"
        assert dpk.check_model(model, batch, loss).worst < 1e-5

    def test_a_tied_bias_is_no_obstacle(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].bias = model[0].bias
        dpk.convert_model(model, biases=(), train_modules=("1",))
        assert trained(model) == {"0.bias", "1.weight"}


class Int8Linear(nn.Linear):
    """Its weight a parameter of integers, as bitsandbytes has it."""

    def __init__(self, d: int, p: int) -> None:
        super().__init__(d, p)
        self.step = float(self.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((self.weight.detach() / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


class PackedLinear(nn.Module):
    """Two weights of 4 bits to a byte of a buffer, as GPTQ and AWQ have it."""

    qweight: Tensor

    def __init__(self, d: int, p: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d, p
        self.register_buffer("qweight", torch.randint(0, 256, (p, d // 2), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.randn(p))

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.stack([self.qweight % 16, self.qweight // 16], -1).flatten(1)
        return nn.functional.linear(x, (halves.to(x.dtype) - 8) / 16, self.bias)


class IntegersInside(Tensor):
    """A tensor that is float32 from outside, as torchao has it."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        if func is torch.ops.aten.t.default:
            return args[0].inner.float().t()
        raise NotImplementedError(func)


QUANTISED = {"int8 parameter": (Int8Linear, "weight"), "packed buffer": (PackedLinear, "qweight")}


class TestIntegerWeights:
    @staticmethod
    def model(name: str) -> nn.Module:
        torch.manual_seed(0)
        make = QUANTISED[name][0]
        return nn.Sequential(make(6, 8), nn.Tanh(), make(8, 6), nn.Linear(6, 3))

    @pytest.mark.parametrize("name", QUANTISED)
    @pytest.mark.parametrize("preset", [dpk.presets.full(), {"train_modules": "2"}])
    def test_they_are_refused_by_name(self, name: str, preset: dict[str, Any]) -> None:
        model = self.model(name)
        before = snapshot(model)
        wanted = rf"(?s)integer weights have no gradient.*\b2\.{QUANTISED[name][1]}: torch\..*lora_and_bitfit.*\"!2\""
        with pytest.raises(dpk.UnsupportedModuleError, match=wanted):
            dpk.convert_model(model, **preset)
        assert same(before, snapshot(model))

    def test_of_many_some_are_named(self) -> None:
        model = nn.Sequential(*(Int8Linear(2, 2) for _ in range(30)))
        with pytest.raises(dpk.UnsupportedModuleError, match=r"7\.weight.*\n  \.\.\. and 22 more"):
            dpk.convert_model(model, **dpk.presets.full())

    @pytest.mark.parametrize("name", QUANTISED)
    def test_biases_over_them_are_trained_and_so_is_the_rest(self, name: str) -> None:
        x = torch.randn(4, 6)
        for preset, expected in (
            (dpk.presets.bitfit(), {"0.bias", "2.bias", "3.bias"}),
            ({"train_modules": ("*", "!0", "!2")}, {"0.bias", "2.bias", "3.weight", "3.bias"}),
        ):
            model = self.model(name)
            moved, oracle = step_and_oracle(model, x, **preset)
            assert trained(model) == expected
            assert dpk.conversion_report(model).one_by_one == {}
            torch.testing.assert_close(moved, oracle, rtol=1e-4, atol=1e-6)

    def test_lora_over_them_is_trained(self) -> None:
        base = nn.Sequential()
        base.first, base.last = Int8Linear(6, 8), nn.Linear(8, 3)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["last"]))
        with torch.no_grad():
            model.base_model.model.first.lora_B["default"].weight.normal_()
        preset = dpk.presets.lora_and_bitfit(head="*.modules_to_save")
        moved, oracle = step_and_oracle(model, torch.randn(4, 6), **preset)
        assert trained(model) == {
            *(f"base_model.model.first.{own}" for own in ("base_layer.bias", "lora_A.default.weight")),
            *("base_model.model.first.lora_B.default.weight", "base_model.model.last.modules_to_save.default.weight"),
            "base_model.model.last.modules_to_save.default.bias",
        }
        torch.testing.assert_close(moved, oracle, rtol=1e-4, atol=1e-6)

    def test_integers_inside_a_tensor_subclass(self) -> None:
        model = nn.Sequential(nn.Linear(6, 3))
        inner = torch.randint(-9, 9, (3, 6), dtype=torch.int8)
        model[0].weight = nn.Parameter(IntegersInside(inner), requires_grad=False)
        with pytest.raises(dpk.UnsupportedModuleError, match=r"0\.weight: IntegersInside of torch\.int8"):
            dpk.convert_model(model, **dpk.presets.full())

    def test_weights_packed_by_torch_are_refused_too(self) -> None:
        class Packed(nn.Module):
            """What torch.ao's quantised layers keep their weight and bias in."""

            def __init__(self) -> None:
                super().__init__()
                self._packed_params = object()

        model = nn.Sequential(Packed(), nn.Linear(3, 3))
        with pytest.raises(dpk.UnsupportedModuleError, match=r"0\._packed_params: .*torch\.ao"):
            dpk.convert_model(model, train_modules="*")
        dpk.convert_model(model, train_modules="1")

    def test_counters_and_indices_are_no_weights(self) -> None:
        model = ConvNet()
        model.register_buffer("relative_position_index", torch.arange(9))
        dpk.convert_model(model, **dpk.presets.full())
        assert trained(model) == names(model, "")
