"""What attacks on the swapped modules found, and what else is not a case of every one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attach import attach
from lean_cases import plain_twin
from test_lean import kept_bytes, run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import few_bits


def test_a_compiled_convolution_keeps_no_input() -> None:
    """The one module of which the compiler could not find that out itself."""

    def kept(memory: str) -> int:
        torch._dynamo.reset()
        torch.manual_seed(0)
        layers = (nn.Conv1d(2, 4, 1), nn.Conv1d(4, 64, 3, bias=False), nn.Conv1d(64, 4, 3, bias=False))
        model = dpk.convert_model(nn.Sequential(*layers), memory=memory)
        return kept_bytes(torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(3, 2, 40))

    assert kept("off") - kept("exact") >= 3 * 4 * 64 * 38


@pytest.mark.parametrize("own", ["memory", "backend"])
def test_attributes_of_the_same_name_are_left_alone(own: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].register_buffer(own, torch.zeros(2))
    dpk.convert_model(model)
    assert type(model[1]) is nn.ReLU
    dpk.restore_model(model)
    model[0].register_buffer(own, torch.zeros(2))
    dpk.convert_model(model)  # the module around it gives its bias
    assert dpk.conversion_report(model).one_by_one == {"": "Sequential"}
    with pytest.raises(dpk.UnsupportedModuleError, match=f"attributes of its own.*{own}"):
        dpk.convert_model(model[0])


@pytest.mark.parametrize("build", [nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Tanh])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compact_activations_keep_three_bits(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """The output is exact; the gradient is off by what eight levels leave, and not at all in float64."""
    x = (2.0 * torch.randn(40, 56, generator=torch.Generator().manual_seed(1))).to(dtype)
    want = run(build(), x, lambda y: y.float().sum())
    module = dpk.convert_model(nn.Sequential(nn.Linear(56, 56), build()), memory="compact")[1]
    got = run(module, x, lambda y: y.float().sum())
    assert torch.equal(got[0], want[0])
    error = float((got[1].double() - want[1].double()).square().mean().sqrt())
    assert error <= (0.0 if dtype == torch.float64 else 0.065)
    kept = kept_bytes(module, x.requires_grad_())
    assert kept == (x.numel() * 8 if dtype == torch.float64 else 3 * x.numel() // 8)
    plain = dpk.convert_model(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    assert type(plain[1]) is nn.Tanh  # exact keeps no less than autograd does


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Conv2d(3, 4, 1), (3, 4, 4)),
        (lambda: nn.Conv1d(3, 4, 1), (3, 4)),
        (lambda: nn.Linear(4, 4), (4,)),
        (lambda: nn.LayerNorm((3, 4)), (3, 4)),
    ],
)
@pytest.mark.parametrize("memory", ["exact", "off"])
def test_an_input_without_a_batch(build: Callable[[], nn.Module], shape: tuple[int, ...], memory: str) -> None:
    """By autograd alone; where rows of samples are asked for, an error."""
    torch.manual_seed(0)
    layer, x = build(), torch.randn(shape)
    plain = plain_twin(copy.deepcopy(layer))
    model = dpk.convert_model(nn.Sequential(layer), memory=memory)
    assert_close_gradients(run(layer, x), run(plain, x))
    engine, *_ = attach(model, torch.randn(4, *shape), bound=1.0)
    with pytest.raises(dpk.BatchLayoutError, match="no batch dimension"), engine.batch(4):
        layer(x)


def assert_close_gradients(got: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "build", [nn.ReLU, lambda: nn.Dropout(0.3), lambda: nn.LeakyReLU(0.2), nn.GELU, nn.SiLU, nn.ReLU6]
)
def test_outputs_lie_in_memory_as_those_of_the_module_it_replaces(build: Callable[[], nn.Module]) -> None:
    """So that a view which worked before works after."""
    module = dpk.convert_model(nn.Sequential(nn.Linear(2, 2), build()))[1]
    x = torch.randn(2, 5, 4, 3).requires_grad_()
    inputs = [
        x,
        x.transpose(1, 2),
        x.permute(3, 0, 2, 1),
        x[:, ::2],
        x.transpose(1, 3)[:, :, :, 1:],
        x[:, :1].expand(2, 5, 4, 3),
    ]
    for given in inputs:
        torch.manual_seed(1)
        want = build()(given)
        torch.manual_seed(1)
        got = module(given)
        assert torch.equal(got, want) and got.stride() == want.stride()
        pair = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (got, want)]
        assert torch.equal(*pair)


def test_groupnorm_of_tokens_as_an_image_of_width_one() -> None:
    """Dimensions of one element have strides of their own, by which torch chooses its kernel."""
    x = torch.randn(2, 5, 8).transpose(1, 2).unsqueeze(-1)
    module = dpk.convert_model(nn.Sequential(nn.GroupNorm(2, 8)))[0]
    assert_close_gradients(run(module, x), run(plain_twin(nn.Sequential(nn.GroupNorm(2, 8)))[0], x))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_keeps_nothing(padding: str) -> None:
    model = dpk.convert_model(nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=padding) for _ in range(2))))
    x = torch.randn(2, 3, 8, 8).requires_grad_()
    assert kept_bytes(model, x) == 0


def test_what_is_remembered_is_not_of_the_first_mode() -> None:
    """Tables are made once a process, wherever that happens to be."""
    model = dpk.convert_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(5)))
    x = torch.randn(2, 3, 19, 17)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model(fake.from_tensor(x)).sum().backward()
    model.zero_grad()
    model(x).sum().backward()
    compact = dpk.convert_model(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), memory="compact")
    few_bits._made.clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        compact(torch.randn(2, 4, dtype=torch.float32)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    compact(torch.randn(2, 4)).sum().backward()


def test_autocast_casts_what_it_casts_without_us() -> None:
    x = torch.randn(1, 1, 4, 4, 4)
    plain = nn.Sequential(nn.Conv3d(1, 2, 1), nn.MaxPool3d(2))
    model = dpk.convert_model(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == plain(x).dtype
        assert torch.equal(model(x), plain(x))


def test_complex_inputs_run_as_they_did() -> None:
    z = torch.tensor([0.3 + 0.4j], requires_grad=True)
    for module in (nn.SiLU(), nn.Tanh(), nn.Dropout(0.5)):
        model = dpk.convert_model(nn.ModuleList([nn.Linear(1, 1), module]), memory="compact")
        try:
            torch.manual_seed(1)
            want = type(module)().train()(z)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                model[1](z)
            continue
        torch.manual_seed(1)
        assert torch.equal(model[1](z), want)


def test_a_bias_frozen_after_conversion_is_refused_by_name() -> None:
    model = dpk.convert_model(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))
    model[0].bias.requires_grad_(False)
    with pytest.raises(dpk.UnsupportedModuleError, match="'bias' of layer '0' was frozen after convert_model"):
        attach(model, torch.randn(4, 3))
