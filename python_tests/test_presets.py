"""Presets, patterns of classes and of exclusions in train_modules, tied weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import ConvNet, accounted, bias_names, same, snapshot, step_and_oracle, trained_names
from peft_cases import bert, gpt2, ids, llama, loss, vit
from torch import Tensor, nn

import dp_bitfit_kernels as dpk

PRESETS = [name for name, made in inspect.getmembers(dpk.presets, inspect.isfunction) if not name.startswith("_")]
NEEDS_HEAD = {"linear_probe", "bitfit_and_head"}


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
            assert trained_names(model) == expected
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
        assert trained_names(model) == NORMS_OF_MANY
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
        assert trained_names(model) == {"1.weight", "1.bias"}
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
        assert {name.rpartition(".")[0] for name in trained_names(model)} == expected
        accounted(model)

    def test_what_lies_below_is_covered_and_can_be_left_out(self) -> None:
        model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))))
        dpk.convert_model(model, biases=(), train_modules=("0", "!0.1", "0.1.1"))
        assert trained_names(model) == {"0.0.weight", "0.0.bias"}
        dpk.restore_model(model)
        dpk.convert_model(model, biases="all", train_modules=("*", "!0.1"))
        assert trained_names(model) == {"0.0.weight", "0.0.bias", "0.1.0.bias", "0.1.1.bias"}

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
        assert "transformer.wte.weight" in trained_names(model)
        assert dpk.conversion_report(model).tied["lm_head.weight"] == "transformer.wte.weight"
        assert dpk.check_model(model, batch, loss).worst < 1e-5

    def test_a_tied_bias_is_no_obstacle(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].bias = model[0].bias
        dpk.convert_model(model, biases=(), train_modules=("1",))
        assert trained_names(model) == {"0.bias", "1.weight"}
