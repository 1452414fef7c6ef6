"""Modules swapped for what they keep: outputs and gradients of what they replace, no more kept than promised."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lean_cases import LEAN_CASES, LeanCase, plain_twin
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import layers

EVERY = pytest.mark.parametrize("case", LEAN_CASES, ids=str)


class Behind(nn.Module):
    """The module between two that train a bias: its input wants a gradient, its output has one that is not constant."""

    def __init__(self, module: nn.Module, channels: int):
        super().__init__()
        self.shift = nn.GroupNorm(1, channels)
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def converted(case: LeanCase, memory: str = "exact", backend: str = "auto") -> nn.Module:
    model = dpk.convert_model(Behind(case.module(), case.sample[0]), memory=memory, backend=backend)
    return model.module


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward of module(x), parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.numel():
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(note, lambda t: t):
        kept = module(x)  # noqa: F841  alive, so that no address is given to another
    return sum(found.values())


def run(module: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor, Any]:
    """Output, input gradient and bias gradient, with the same random masks for every module."""
    bias = module._parameters.get("bias")
    if bias is not None:
        bias.grad = None
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    y = module(x * 1)  # not a leaf, so that in-place modules may run
    (y.sin().sum() if loss is None else loss(y)).backward()
    assert x.grad is not None
    return y.detach(), x.grad, None if bias is None else bias.grad


def assert_same(case: LeanCase, got: tuple[Any, ...], want: tuple[Any, ...], tolerance: float = 2e-6) -> None:
    assert torch.equal(got[0], want[0])
    if case.exact_gradient:
        assert torch.equal(got[1], want[1])
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max() if b.numel() else 0))


@EVERY
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_outputs_and_gradients_are_those_of_the_module_it_replaces(case: LeanCase, backend: str) -> None:
    module, x = converted(case, backend=backend), case.input()
    assert layers.is_converted(module) == (case.name != "layernorm_bare")  # which keeps no less
    assert_same(case, run(module, x), run(plain_twin(case.module()), x))


def every_second(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "channels_last_3d": lambda x: x.to(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "every_second": every_second,
    "sequence_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@EVERY
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(case: LeanCase, strides: str) -> None:
    x = case.input()
    if (strides == "channels_last" and x.dim() != 4) or (strides == "channels_last_3d" and x.dim() != 5):
        pytest.skip("a layout of other dimensions")
    if x.dim() < 3:
        pytest.skip("two dimensions")
    x = STRIDES[strides](x)
    module, twin = converted(case), plain_twin(case.module())

    def same_strides(module: nn.Module) -> tuple[Any, ...]:
        module.zero_grad()
        leaf = x.detach().requires_grad_()
        torch.manual_seed(3)
        y = module(leaf)
        y.sin().sum().backward()
        bias = module._parameters.get("bias")
        return y.detach(), leaf.grad, None if bias is None else bias.grad

    try:
        want = same_strides(twin)
    except RuntimeError:
        pytest.skip("PyTorch itself cannot")
    assert_same(case, same_strides(module), want)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(case: LeanCase, dtype: torch.dtype) -> None:
    module, x = converted(case).to(dtype), case.input().to(dtype)
    twin = plain_twin(case.module()).to(dtype)
    try:
        want = run(twin, x)
    except NotImplementedError:
        pytest.skip("PyTorch itself cannot")
    got = run(module, x)
    assert torch.equal(got[0], want[0])
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    for a, b in zip(got[1:], want[1:], strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@EVERY
def test_an_empty_batch(case: LeanCase) -> None:
    x = case.input()[:0]
    try:
        want = run(plain_twin(case.module()), x)
    except RuntimeError:
        pytest.skip("PyTorch itself cannot")
    assert_same(case, run(converted(case), x), want)


@EVERY
def test_keeps_no_more_than_promised(case: LeanCase) -> None:
    x = case.input().requires_grad_()
    module = converted(case)
    promised = x.numel() * case.bits / 8 + 4 * case.extra * len(x) + 1
    assert kept_bytes(module, x) <= promised
    # Nor beside autograd: no tensor as large as what autograd would keep hangs on the graph.
    node = module(x).grad_fn
    for value in vars(node).values() if hasattr(node, "__dict__") else ():
        assert not isinstance(value, Tensor) or value.numel() <= 1


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case: LeanCase, dtype: torch.dtype) -> None:
    def cast(module: nn.Module) -> tuple[Any, ...]:
        bias = module._parameters.get("bias")
        if bias is not None:
            bias.grad = None
        x = case.input().requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=dtype):
            y = module(x)
        y.float().sin().sum().backward()
        return y.detach(), x.grad, None if bias is None else bias.grad

    got, want = cast(converted(case)), cast(plain_twin(case.module()))
    assert got[0].dtype == want[0].dtype and torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


@EVERY
def test_restore_undoes_the_swap(case: LeanCase) -> None:
    model = Behind(case.module(), case.sample[0])
    before = [type(m) for m in model.modules()], [sorted(m.__dict__) for m in model.modules()]
    dpk.restore_model(dpk.convert_model(model))
    assert before == ([type(m) for m in model.modules()], [sorted(m.__dict__) for m in model.modules()])


@EVERY
def test_copies_keep_what_they_are(case: LeanCase) -> None:
    module, x = converted(case), case.input()
    want = run(module, x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module) and twin.__dict__.get("memory") == module.__dict__.get("memory")
        assert_same(case, run(twin, x), want)


@EVERY
def test_a_second_derivative_is_refused_by_name(case: LeanCase) -> None:
    module = converted(case)
    if not layers.is_converted(module) or case.name in ("adaptive2d_one",):
        pytest.skip("nothing of it is swapped")
    x = case.input().requires_grad_()
    y = module(x * 1)
    with pytest.raises(dpk.EngineError, match=r"layer 'module'.*create_graph"):
        torch.autograd.grad(y.sin().sum(), x, create_graph=True)


@EVERY
def test_an_output_may_be_changed_in_place(case: LeanCase) -> None:
    """Where autograd alone would refuse (ReLU, ...), or not."""
    module, x = converted(case), case.input()
    want = run(module, x)[1]
    got = run(module, x, lambda y: y.mul_(2.0).mul(0.5).sin().sum())[1]
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("build", [nn.GELU, nn.SiLU, lambda: nn.LayerNorm(13), lambda: nn.GroupNorm(1, 11)])
def test_an_input_changed_in_place_is_an_error_that_names_the_module(build: Callable[[], nn.Module]) -> None:
    model = dpk.convert_model(nn.Sequential(nn.Linear(13, 13), build()))
    h = model[0](torch.randn(3, 11, 13)).clone()
    y = model[1](h)
    h.add_(1.0)
    with pytest.raises(dpk.EngineError, match=r"layer '1'.*changed in place"):
        y.sum().backward()


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.ReLU(inplace=True),
        lambda: nn.ReLU6(inplace=True),
        lambda: nn.LeakyReLU(0.2, inplace=True),
        lambda: nn.Hardtanh(inplace=True),
        lambda: nn.Dropout(0.5, inplace=True),
        lambda: nn.SiLU(inplace=True),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_inplace_modules_stay_in_place(build: Callable[[], nn.Module], layout: str) -> None:
    results = []
    for swap in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), build())
        x = torch.randn(2, 3, 5, 5)
        model = dpk.convert_model(model) if swap else plain_twin(model)
        h = model[0](x)
        if layout == "channels_last":
            h = h.to(memory_format=torch.channels_last)
        elif layout == "sliced":
            h = h.clone()[:, :, ::2]
        torch.manual_seed(1)
        y = model[1](h)
        assert y.data_ptr() == h.data_ptr() and y.stride() == h.stride()
        y.square().sum().backward()
        results.append((h.detach().clone(), model[0].bias.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1])


def test_a_leaf_in_place_is_refused_as_by_torch() -> None:
    model = dpk.convert_model(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)))
    with pytest.raises(RuntimeError, match="leaf"):
        model[1](torch.randn(2, 3, requires_grad=True))


@pytest.mark.parametrize("memory", ["exact", "compact"])
def test_modules_with_hooks_are_left_alone(memory: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.GELU(), nn.Conv1d(4, 4, 1, bias=False))
    model[1].register_forward_hook(lambda m, i, o: o + 1)
    model[2].register_full_backward_hook(lambda m, i, o: None)
    model[3].register_forward_pre_hook(lambda m, i: None)
    dpk.convert_model(model, memory=memory)
    assert [layers.is_converted(m) for m in model] == [True, False, False, False]


def test_hooks_that_come_later_work() -> None:
    results = []
    for memory in ("off", "exact"):
        torch.manual_seed(0)
        model = dpk.convert_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)), memory=memory)
        seen: list[Tensor] = []
        for module in model:
            module.register_forward_hook(lambda m, i, o: 2 * o)
            module.register_full_backward_hook(lambda m, i, o, seen=seen: seen.append(o[0].clone()))
        model(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))).sin().sum().backward()
        results.append([*seen, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_unknown_subclasses_are_left_alone() -> None:
    class Doubled(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = dpk.convert_model(nn.Sequential(nn.Linear(4, 4), Doubled()))
    assert type(model[1]) is Doubled


def test_off_swaps_only_what_trains() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.GELU(), nn.Conv1d(4, 4, 1, bias=False))
    dpk.convert_model(model, memory="off")
    assert [layers.is_converted(m) for m in model] == [True, False, False, False, False]


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(p: float) -> None:
    module, x = dpk.convert_model(nn.Sequential(nn.Linear(2, 2), nn.Dropout(p)))[1], torch.randn(3, 4)
    assert torch.equal(run(module, x)[0], x if p == 0.0 else torch.zeros_like(x))
    assert torch.equal(run(module, x)[1], x.cos() if p == 0.0 else torch.zeros_like(x))
    assert torch.equal(module.eval()(x), x)


def test_embedding_keeps_nothing() -> None:
    model = dpk.convert_model(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)))
    assert kept_bytes(model, torch.randint(0, 10, (3, 7))) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant: bool) -> None:
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        model = dpk.convert_model(
            nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6))
        )
        x = torch.randn(4, 3, 6).requires_grad_()
        torch.manual_seed(1)
        y = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory", ["exact", "compact"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(compiler: str, memory: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4)),
            *(nn.LeakyReLU(0.1), nn.AvgPool2d(2), nn.Flatten(2), nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6)),
        )

    x = torch.randn(3, 2, 10, 10)
    torch._dynamo.reset()
    results = []
    for model in (plain_twin(build()), dpk.convert_model(build(), memory=memory)):
        step = torch.compile(model, fullgraph=True, backend=compiler) if results else model
        y = step(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
