"""Norms whose class goes on with modules that it holds (timm's norms with an activation): stand-ins, always run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import accounted, same, snapshot
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import layers
from dp_bitfit_kernels._validate import UnsupportedModuleError
from dp_bitfit_kernels.layers import norm_then
from dp_bitfit_kernels.layers.norm_then import BatchNormThenLayer, GroupNormThenLayer, LayerNormThenLayer, find


class BatchNormAct(nn.BatchNorm2d):
    """Like timm's BatchNormAct2d: the forward of BatchNorm once more, then a dropout and an activation."""

    def __init__(self, width: int, act: Callable[[], nn.Module] = nn.ReLU, drop: float = 0.0) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Dropout(drop), act()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(y))


class GroupNormAct(nn.GroupNorm):
    def __init__(self, width: int) -> None:
        super().__init__(2, width)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class LayerNormAct(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class ActFirst(BatchNormAct):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


class ActTwice(BatchNormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(-super().forward(x))


class Unscaled(BatchNormAct):
    """Right at the start, where the weight is one."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, None, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(y))


class OfPositive(BatchNormAct):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.abs(), self.bias.abs()
        y = F.batch_norm(x, self.running_mean, self.running_var, weight, bias, self.training, 0.1, self.eps)
        return self.act(self.drop(y))


class Clipped(BatchNormAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-10.0, 10.0))


class Reversed(BatchNormAct):
    """The outputs are right, the gradient is not."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return -y + (2.0 * y).detach()


class Gated(GroupNormAct):
    def forward(self, x: Tensor, gate: float = 1.0) -> Tensor:
        return gate * super().forward(x)


@pytest.fixture(autouse=True)
def _taken_for_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only forwards of timm's file are taken; these stand in for it."""
    monkeypatch.setattr(norm_then, "_LOOKED_AT", {__name__})


def test_forwards_of_other_files_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert {"timm.layers.norm_act"} == norm_then._LOOKED_AT
    assert find(BatchNormAct(4)) is None


IMAGE, TOKENS = (4, 5, 6), (5, 6)
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], type]] = {
    "batch norm": (lambda: BatchNormAct(4), IMAGE, BatchNormThenLayer),
    "batch norm, in place": (lambda: BatchNormAct(4, lambda: nn.ReLU(inplace=True)), IMAGE, BatchNormThenLayer),
    "batch norm, no activation": (lambda: BatchNormAct(4, nn.Identity), IMAGE, BatchNormThenLayer),
    "group norm": (lambda: GroupNormAct(4), IMAGE, GroupNormThenLayer),
    "layer norm": (lambda: LayerNormAct(6), TOKENS, LayerNormThenLayer),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Tanh())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y * torch.linspace(-1.0, 1.0, y[0].numel()).view(y.shape[1:])).flatten(1).mean(1).sin().mean()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("memory", ["exact", "off"])
def test_rows_are_those_of_the_samples(name: str, memory: str) -> None:
    make, shape, mixin = KINDS[name]
    model, x = made(make), torch.randn(4, *shape)
    expected, before, generator = model.eval()(x), snapshot(model), torch.get_rng_state()
    dpk.convert_model(model, memory=memory)
    assert torch.equal(torch.get_rng_state(), generator)
    accounted(model)
    report = dpk.conversion_report(model)
    assert set(report.trained) == {"0.bias"} and not report.one_by_one
    assert isinstance(model[0], mixin)
    assert torch.equal(model(x), expected)
    assert dpk.check_model(model, x, loss).worst < 1e-6
    if mixin is BatchNormThenLayer:  # statistics are frozen in training, too
        assert torch.equal(model.train()(x), expected)
        assert dpk.check_model(model, x, loss).worst < 1e-6
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.eval()(x), expected)
    dpk.restore_model(model)
    assert same(before, snapshot(model.eval())) and not isinstance(model[0], layers.BiasLayer)


def test_the_dropout_it_holds_stays_random() -> None:
    model = dpk.convert_model(made(lambda: BatchNormAct(4, nn.Identity, 0.5))).train()
    x = torch.rand(4, *IMAGE)
    first, second = (model(x) == 0 for _ in range(2))
    assert 0.3 < first.float().mean() < 0.7
    assert 0.3 < (first ^ second).float().mean() < 0.7


@pytest.mark.parametrize("make", [ActFirst, ActTwice, Unscaled, OfPositive, Clipped, Reversed])
def test_what_does_otherwise_is_refused(make: Callable[[int], nn.Module]) -> None:
    assert find(make(4)) is None
    with pytest.raises(UnsupportedModuleError, match="own forward"):
        dpk.convert_model(made(lambda: make(4)))


def test_what_the_trial_cannot_run_is_left() -> None:
    class Conditioned(LayerNormAct):
        def __init__(self) -> None:
            super().__init__(6)
            self.proj = nn.Linear(2, 12)
            self.parts = nn.ModuleList([nn.ReLU()])

        def forward(self, x: Tensor) -> Tensor:
            scale, shift = self.proj(self.condition).chunk(2, -1)
            return nn.LayerNorm.forward(self, x) * (1 + scale) + shift

    assert find(Conditioned()) is None
    plain = BatchNormAct(4)
    plain.weight = plain.bias = None  # affine=False
    assert find(plain) is not None


def test_its_input_may_be_named() -> None:
    model, x = made(lambda: BatchNormAct(4)).eval(), torch.randn(4, *IMAGE)
    expected = model[0](x)
    assert torch.equal(dpk.convert_model(model)[0](x=x), expected)


def test_more_arguments_are_not_dropped() -> None:
    assert find(Gated(4)) is None
    model, x = made(lambda: Gated(4)), torch.randn(4, *IMAGE)
    expected = model[0](x, gate=0.5)
    assert torch.equal(dpk.convert_model(model)[0](x, gate=0.5), expected)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(BatchNormAct(4), GroupNormAct(4))
    assert dpk.conversion_report(dpk.convert_model(model)).trained.keys() == {"0.bias", "1.bias"}
