"""Integer weights: what they hold back is refused by name, what lies over them is trained."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from attach import attach
from networks import ConvNet, same, snapshot, step_and_oracle, trained_names
from torch import Tensor, nn

import dp_bitfit_kernels as dpk


class Int8Linear(nn.Linear):
    """Its weight a parameter of integers, as bitsandbytes has it."""

    def __init__(self, d: int, p: int) -> None:
        super().__init__(d, p)
        self.step = float(self.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((self.weight.detach() / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


class OverSamples(torch.autograd.Function):
    """x @ w^T + b with the gradient of bitsandbytes' 4-bit product: the bias's is summed over the first dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad @ ctx.saved_tensors[0], None, grad.sum(0)


class FlatLinear(Int8Linear):
    """Autograd has no gradient for its bias where inputs have more than two dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return OverSamples.apply(x, self.weight.to(x.dtype) * self.step, self.bias)


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
        return func(*(arg.inner.float() if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


QUANTISED = {
    "int8 parameter": (Int8Linear, "weight"),
    "flat inputs": (FlatLinear, "weight"),
    "packed buffer": (PackedLinear, "qweight"),
}


def quantised(name: str) -> nn.Module:
    torch.manual_seed(0)
    make = QUANTISED[name][0]
    return nn.Sequential(make(6, 8), nn.Tanh(), make(8, 6), nn.Linear(6, 3))


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("preset", [dpk.presets.full(), {"train_modules": "2"}])
def test_they_are_refused_by_name(name: str, preset: dict[str, Any]) -> None:
    model = quantised(name)
    before = snapshot(model)
    wanted = rf"(?s)integer weights have no gradient.*\b2\.{QUANTISED[name][1]}: torch\..*lora_and_bitfit.*\"!2\""
    with pytest.raises(dpk.UnsupportedModuleError, match=wanted):
        dpk.convert_model(model, **preset)
    assert same(before, snapshot(model))


def test_of_many_some_are_named() -> None:
    model = nn.Sequential(*(Int8Linear(2, 2) for _ in range(30)))
    with pytest.raises(dpk.UnsupportedModuleError, match=r"7\.weight.*\n  \.\.\. and 22 more"):
        dpk.convert_model(model, **dpk.presets.full())


@pytest.mark.parametrize("name", QUANTISED)
def test_biases_over_them_are_trained_and_so_is_the_rest(name: str) -> None:
    x = torch.randn(4, 6)
    for preset, expected in (
        (dpk.presets.bitfit(), {"0.bias", "2.bias", "3.bias"}),
        ({"train_modules": ("*", "!0", "!2")}, {"0.bias", "2.bias", "3.weight", "3.bias"}),
    ):
        model = quantised(name)
        moved, oracle = step_and_oracle(model, x, **preset)
        assert trained_names(model) == expected
        assert dpk.conversion_report(model).one_by_one == {}
        torch.testing.assert_close(moved, oracle, rtol=1e-4, atol=1e-6)


def test_a_bias_that_autograd_has_no_gradient_for_is_trained() -> None:
    moved = []
    for make in (FlatLinear, Int8Linear):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), make(6, 8), nn.Flatten(), nn.Linear(24, 3))
        dpk.convert_model(model)
        assert dpk.conversion_report(model).one_by_one == {}
        engine, model, optimizer, _ = attach(model, torch.zeros(4), poisson_sampling=False)
        before = model[1].bias.clone()
        model(torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))).square().sum(1).mean().backward()
        assert optimizer.step()
        moved.append(before - model[1].bias)
    assert bool(moved[0].any())
    assert torch.equal(*moved)


def test_lora_over_them_is_trained() -> None:
    base = nn.Sequential()
    base.first, base.last = Int8Linear(6, 8), nn.Linear(8, 3)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["last"]))
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight.normal_()
    preset = dpk.presets.lora_and_bitfit(head="*.modules_to_save")
    moved, oracle = step_and_oracle(model, torch.randn(4, 6), **preset)
    assert trained_names(model) == {
        *(f"base_model.model.first.{own}" for own in ("base_layer.bias", "lora_A.default.weight")),
        *("base_model.model.first.lora_B.default.weight", "base_model.model.last.modules_to_save.default.weight"),
        "base_model.model.last.modules_to_save.default.bias",
    }
    torch.testing.assert_close(moved, oracle, rtol=1e-4, atol=1e-6)


def test_integers_inside_a_tensor_subclass() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    inner = torch.randint(-9, 9, (3, 6), dtype=torch.int8)
    model[0].weight = nn.Parameter(IntegersInside(inner), requires_grad=False)
    with pytest.raises(dpk.UnsupportedModuleError, match=r"0\.weight: IntegersInside of torch\.int8"):
        dpk.convert_model(model, **dpk.presets.full())
    before = model[0].bias.clone()
    assert dpk.memory_report(dpk.convert_model(model), torch.randn(4, 6))
    engine, model, optimizer, _ = attach(model, torch.zeros(4), poisson_sampling=False, bound=1e3)
    x = torch.randn(4, 6)
    model(x).square().sum(1).mean().backward()
    assert optimizer.step()
    expected = 2 * (x @ inner.float().t() + before).mean(0)
    torch.testing.assert_close(before - model[0].bias, expected, rtol=1e-3, atol=1e-2)


def test_weights_packed_by_torch_are_refused_too() -> None:
    class Packed(nn.Module):
        """What torch.ao's quantised layers keep their weight and bias in."""

        def __init__(self) -> None:
            super().__init__()
            self._packed_params = object()

    model = nn.Sequential(Packed(), nn.Linear(3, 3))
    with pytest.raises(dpk.UnsupportedModuleError, match=r"0\._packed_params: .*torch\.ao"):
        dpk.convert_model(model, train_modules="*")
    dpk.convert_model(model, train_modules="1")


def test_counters_and_indices_are_no_weights() -> None:
    model = ConvNet()
    model.register_buffer("relative_position_index", torch.arange(9))
    dpk.convert_model(model, **dpk.presets.full())
    assert trained_names(model) == {name for name, _ in model.named_parameters()}
