"""The per-sample gradient of the scale of a LayerNorm or RMSNorm, in one visit: each sample by itself."""

from __future__ import annotations

from collections.abc import Callable

import native_internals
import pytest
import torch
import torch.nn.functional as F
from attach import attach
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import backends, reference_weights

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# T, p: around 16 lanes, blocks of 128 rows and of 16 KiB, sums of 1,024 elements, samples of more than 2 MiB
SHAPES = [(0, 4), (1, 1), (2, 15), (5, 16), (3, 17), (129, 40), (7, 1024), (3, 1030), (2, 2100), (300, 3), (1100, 600)]

native = pytest.mark.skipif(backends.unavailable("native", "cpu") is not None, reason="no compiled backend")


def tensors(shape: tuple[int, int], dtype: torch.dtype, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    grad, x = (torch.randn((batch, *shape), generator=generator) for _ in range(2))
    return grad.to(dtype), (3.0 * x + 2.0).to(dtype)


def by_autograd(grad: Tensor, x: Tensor, centered: bool) -> Tensor:
    """The gradient of each sample's scale, one at a time, in float64."""
    rows = []
    for g, own in zip(grad.double(), x.double(), strict=True):
        scale = torch.ones(x.shape[2], dtype=torch.float64, requires_grad=True)
        y = F.layer_norm(own, scale.shape, scale, None, EPS) if centered else F.rms_norm(own, scale.shape, scale, EPS)
        (y * g).sum().backward()
        rows.append(scale.grad if scale.grad is not None else torch.zeros_like(scale))
    return torch.stack(rows)


@native
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale_grad(shape: tuple[int, int], dtype: torch.dtype, centered: bool) -> None:
    """At most twice as wrong as torch's norm and sum in float32, in whatever order that takes its addends."""
    grad, x = tensors(shape, dtype)
    exact = by_autograd(grad, x, centered)
    norm = F.layer_norm if centered else F.rms_norm
    product = norm(x.float(), x.shape[2:], eps=EPS) * grad
    orders = [torch.randperm(shape[0], generator=torch.Generator().manual_seed(i)) for i in range(8)]
    errors = [(product[:, order].sum(1) - exact).abs().max() for order in orders]
    partial = 2.0**-24 * (product.cumsum(1).abs().max() if shape[0] else 0.0)
    allowed = 2.0 * max(float(partial), *map(float, errors))
    for make in (backends.serving("native", "cpu"), reference_weights):
        rows = make.scale_grad(grad, x, EPS, centered)  # type: ignore[attr-defined]
        assert rows.dtype == torch.float32 and float((rows - exact).abs().max()) <= allowed
    torch.testing.assert_close(reference_weights.scale_grad(grad.double(), x.double(), EPS, centered), exact)


@native
def test_a_sample_is_itself_alone_and_beside_numbers_that_are_none() -> None:
    own = backends.serving("native", "cpu").scale_grad
    for shape in ((7, 40), (1100, 600)):
        grad, x = tensors(shape, torch.float32)
        want = own(grad, x, EPS, True)
        for i in range(3):
            assert torch.equal(own(grad[i : i + 1], x[i : i + 1], EPS, True)[0], want[i])
        for value in (float("nan"), float("inf")):
            spoilt = x.clone()
            spoilt[1, 0, 0] = value
            found = own(grad, spoilt, EPS, True)
            assert torch.equal(found[[0, 2]], want[[0, 2]]) and not found[1].isfinite().any()


@native
def test_threads_change_nothing() -> None:
    grad, x = tensors((1100, 600), torch.float32)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(backends.serving("native", "cpu").scale_grad(grad, x, EPS, True))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 31, 1024, 1055])
def test_each_width_of_registers_gives_the_same_bits(isa: str, dtype: torch.dtype, width: int) -> None:
    internals = native_internals.load()
    if isa not in internals.isas():
        pytest.skip(f"this processor lacks {isa}")
    grad, x = tensors((1, width), dtype, 1)
    for centered in (True, False):
        want, found = (torch.empty(width) for _ in range(2))
        arguments = (DTYPES.index(dtype), grad.data_ptr(), x.data_ptr(), width, EPS, centered)
        internals.normed_product("baseline", *arguments, want.data_ptr())
        internals.normed_product(isa, *arguments, found.data_ptr())
        assert torch.equal(found, want)
        norm = F.layer_norm if centered else F.rms_norm
        exact = norm(x.double(), (width,), eps=EPS) * grad
        torch.testing.assert_close(found[None, None].double(), exact, rtol=1e-5, atol=1e-5)


@native
def test_what_does_not_fit_is_refused() -> None:
    grad, x = tensors((4, 6), torch.float32)
    wrong = [(grad, x[:2]), (grad, x.half()), (grad[0], x[0]), (grad.mT, x.mT), (grad.int(), x.int()), (grad, x.mT)]
    for bad in wrong:
        with pytest.raises(RuntimeError, match="scale_grad"):
            backends.serving("native", "cpu").scale_grad(*bad, EPS, True)
    with pytest.raises(RuntimeError, match="eps"):
        backends.serving("native", "cpu").scale_grad(grad, x, -1.0, True)
    for bad in wrong[:3]:
        with pytest.raises(dpk.DPBiTFiTError, match="scale_grad"):
            reference_weights.scale_grad(*bad, EPS, True)


class Offset(nn.Module):
    """A norm of features that are not centered, so that LayerNorm and RMSNorm differ."""

    def __init__(self, make: Callable[..., nn.Module], dtype: torch.dtype):
        super().__init__()
        self.norm = make((2, 3), eps=0.1, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + 2.0)
        return y


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
def test_rows_of_layers(make: Callable[..., nn.Module], dtype: torch.dtype, backend: str) -> None:
    """Norms over two dimensions with an eps of their own: the sum that is released is that of one sample at a time."""
    torch.manual_seed(0)
    model = Offset(make, dtype)
    x, seed = torch.randn(4, 5, 2, 3).to(dtype), torch.randn(4, 5, 2, 3).to(dtype)
    scale = model.norm.weight.detach().double().requires_grad_()
    wide = x.double() + 2.0 if dtype != torch.bfloat16 else (x + 2.0).double()
    norm = F.layer_norm if make is nn.LayerNorm else F.rms_norm
    (norm(wide, (2, 3), scale, eps=0.1) * seed.double()).sum().backward()
    dpk.convert_model(model, **dpk.presets.norms(), backend=backend)
    engine, model, optimizer, _ = attach(model, x, bound=1e4, loss_reduction="sum")
    with engine.batch(4):
        (model(x) * seed).sum().backward()
        before = model.norm.weight.detach().double().clone()
        optimizer.step()
    moved = (before - model.norm.weight.detach().double()) * 4.0
    rtol, atol = (1e-2, 2e-2) if dtype == torch.bfloat16 else (1e-5, 2e-2)  # R / 2^20, the grid, is 0.01
    torch.testing.assert_close(moved, scale.grad, rtol=rtol, atol=atol)
