"""Subclasses with a forward of their own: those that add their bias last keep it, and are proven to; the others not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import OwnForward, accounted, same, snapshot
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import layers
from dp_bitfit_kernels.layers import own_forward


class StdConv2d(nn.Conv2d):
    """Weight standardisation (timm, BiT)."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


class Conv2dSame(nn.Conv2d):
    """Padding as in TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 2, 1, 2)), self.weight, self.bias, self.stride)


class CausalConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of an image [B, C, H, W] (ConvNeXt, SAM, timm)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNormFp32(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class GroupNorm1(nn.GroupNorm):
    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class LayerNormOnePlus(nn.LayerNorm):
    """The weight as its distance from one (Nemotron)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class LayerNormAct(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class Clamped(nn.Linear):
    """Adds its bias last, but for what lies far out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-3.0, 3.0)


class TrainedOtherwise(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if self.training else 1.0)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + 0.5 * self.bias


class PartlyDetached(nn.Linear):
    """The output is right, the gradient a tenth."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 0.1 * y + (0.9 * y).detach()


class WithHook(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda grad: -grad)
        return y


class WithoutGradient(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = super().forward(x)
        return y + 0.0 * x.sum()


class Quiet(nn.Linear):
    """Drops random features of its output in training."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


IMAGE, TOKENS = (4, 7, 6), (5, 6)
ADDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "standardised convolution": (lambda: StdConv2d(4, 3, 3), IMAGE),
    "convolution of another padding": (lambda: Conv2dSame(4, 3, 3, 2), IMAGE),
    "causal convolution": (lambda: CausalConv1d(4, 3, 3), (4, 7)),
    "norm of an image": (lambda: LayerNorm2d(4), IMAGE),
    "cast norm": (lambda: LayerNormFp32(6), TOKENS),
    "one group": (lambda: GroupNorm1(4), IMAGE),
    "weight plus one": (lambda: LayerNormOnePlus(6), TOKENS),
}
OTHERWISE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "norm and activation": (lambda: LayerNormAct(6), TOKENS),
    "clamped": (lambda: Clamped(6, 3), TOKENS),
    "twice as much in training": (lambda: TrainedOtherwise(6, 3), TOKENS),
    "half of it": (lambda: Scaled(6, 3), TOKENS),
    "dropped in training": (lambda: Quiet(6, 3), TOKENS),
    "partly detached": (lambda: PartlyDetached(6, 3), TOKENS),
    "turned by a hook": (lambda: WithHook(6, 3), TOKENS),
    "doubled": (lambda: OwnForward(6, 3), TOKENS),
}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x).float()
    return (y * torch.linspace(-1.0, 1.0, y[0].numel()).view(y.shape[1:])).flatten(1).mean(1).sin().mean()


@pytest.mark.parametrize("name", [*ADDED, *OTHERWISE])
def test_rows_are_those_of_the_samples(name: str) -> None:
    make, shape = {**ADDED, **OTHERWISE}[name]
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Tanh())
    with torch.no_grad():
        model[0].bias.normal_()
    x = torch.randn(4, *shape)
    before, expected, state = snapshot(model), model.eval()(x), torch.get_rng_state()
    dpk.convert_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    accounted(model)
    assert isinstance(model[0], own_forward.OwnForwardLayer) == (name in ADDED)
    assert list(dpk.conversion_report(model).one_by_one) == ([] if name in ADDED else ["0"])
    assert torch.equal(model(x), expected)
    assert dpk.check_model(model, x, loss).worst < 1e-6
    plain = copy.deepcopy(model)
    dpk.restore_model(plain)
    loss(model, x).backward()
    loss(plain, x).backward()
    torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad)
    dpk.restore_model(model)
    model.zero_grad()
    assert same(before, snapshot(model.train()))


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    make, shape = ADDED[name]
    torch.manual_seed(0)
    model = dpk.convert_model(nn.Sequential(make(), nn.Tanh()).to(dtype))
    assert isinstance(model[0], own_forward.OwnForwardLayer)
    assert dpk.check_model(model, torch.randn(4, *shape).to(dtype), loss).worst < 3e-2


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(LayerNorm2d(4), LayerNormAct(4))
    dpk.convert_model(model)
    assert list(dpk.conversion_report(model).one_by_one) == ["1"]
    assert all(p.is_meta for p in model.parameters())


def test_compiled() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = dpk.convert_model(nn.Sequential(LayerNorm2d(4), nn.Tanh()))
    x = torch.randn(2, *IMAGE)
    loss(model, x).backward()
    want, model[0].bias.grad = model[0].bias.grad, None
    loss(torch.compile(model, backend="aot_eager"), x).backward()
    torch.testing.assert_close(model[0].bias.grad, want)
    assert isinstance(model[0]._parameters["bias"], nn.Parameter)


def test_copies_and_pickles() -> None:
    import pickle

    model = dpk.convert_model(nn.Sequential(LayerNorm2d(4)))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert layers.is_converted(twin[0])
        assert twin[0].trained == frozenset({"bias"})
        assert type(dpk.restore_model(twin)[0]) is LayerNorm2d


class Masked(nn.Conv1d):
    """Adds its bias last, but where it is given a mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if mask is None else y * mask


class Gained(nn.Linear):
    """A gain of one, until weights are loaded."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class WithMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Masked(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, 4, T]
        return self.inner(x, (x[:, :1] > 0).float())


@pytest.mark.parametrize("kind", [WithMask, lambda: nn.Sequential(Gained(6, 3))])
def test_what_was_tried_alone_is_tried_in_the_model(kind: Callable[[], nn.Module]) -> None:
    from attach import attach

    torch.manual_seed(0)
    model = dpk.convert_model(kind())
    x = torch.randn(4, 4, 6)
    if isinstance(model, nn.Sequential):
        with torch.no_grad():
            model[0].gain.fill_(2.0)
    plain = dpk.restore_model(copy.deepcopy(model))
    loss(model, x).backward()
    loss(plain, x).backward()
    grads = [p.grad for n, p in plain.named_parameters() if n.endswith("bias")]
    assert torch.equal(next(p.grad for n, p in model.named_parameters() if n.endswith("bias")), grads[0])
    model.zero_grad()
    _, model, _, _ = attach(model, x, poisson_sampling=False)
    with pytest.raises(dpk.BatchLayoutError, match="not what it adds last"):
        loss(model, x)


def test_a_bias_that_gets_no_gradient_gets_no_rows() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(WithoutGradient(6, 3), nn.Linear(3, 3)), torch.randn(4, *TOKENS)
    check = dpk.check_model(dpk.convert_model(model), x, loss)
    assert check.worst < 1e-6
    assert check.silent == ("0.bias",)
