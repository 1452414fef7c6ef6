"""The memory report: what it says is what autograd keeps and the allocator hands out, and nothing is left changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import attach
from lean_cases import plain_twin
from networks import same, snapshot
from test_lean import kept_bytes
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import _allocator


class Net(nn.Module):
    """A functional ReLU beside modules, one with a hook, one of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.conv2, self.hooked, self.drop = nn.Conv2d(16, 16, 3, padding=1), nn.GELU(), nn.Dropout(0.5)
        self.own, self.head = Squared(), nn.Linear(16, 4)
        self.hooked.register_forward_hook(lambda m, i, o: None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        x = self.drop(F.relu(self.hooked(self.conv2(x))))
        return self.head(self.own(x).mean((2, 3)))


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().train()


def batch(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("memory", ["exact", "compact", "off"])
def test_says_what_autograd_keeps(memory: str) -> None:
    report = dpk.memory_report(net(), batch(), memory=memory)
    assert report.batch == 8
    # The convolution keeps its input, which the report leaves out: it is the caller's.
    assert report.before.total == kept_bytes(plain_twin(net()), batch()) - batch().nbytes
    kept = kept_bytes(dpk.convert_model(net(), memory=memory), batch())
    assert report.after.total == kept - (batch().nbytes if memory == "off" and kept > report.after.total else 0)
    # By the allocator, too: the output is 128 bytes, and blocks are handed out in steps of 64.
    assert 0 <= report.before.held - report.before.total <= 1024
    assert 0 <= report.after.held - report.after.total <= 1024
    assert (report.ratio < 0.8) == (memory != "off")


def test_names_what_was_left_and_why() -> None:
    report = dpk.memory_report(net(), batch())
    assert set(report.left) == {"functional calls in Net", "GELU", "Squared"}
    assert "functions" in report.left["functional calls in Net"] and "hooks" in report.left["GELU"]
    assert "no form" in report.left["Squared"]
    text = str(report)
    for line in ("BatchNorm2d", "functional calls in Net", "it has hooks", "in  16 GiB", f"x {report.ratio:.3f}"):
        assert line in text


@pytest.mark.parametrize("converted", [False, True])
def test_leaves_the_model_as_it_was(converted: bool) -> None:
    model = net()
    if converted:
        dpk.convert_model(model)
    model.head.bias.grad = torch.ones(4)
    model.norm.eval()
    before, state = snapshot(model), torch.get_rng_state()
    first = dpk.memory_report(model, batch())
    assert same(before, snapshot(model)) and torch.equal(model.head.bias.grad, torch.ones(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert dpk.memory_report(model, (batch(),)).after.total == first.after.total
    if converted:
        dpk.restore_model(model)


def test_leaves_the_model_as_it_was_where_it_fails() -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        dpk.memory_report(model, torch.randn(4, 5, 12, 12))
    assert same(before, snapshot(model))


def test_the_largest_batch_fits_and_the_next_ones_do_not() -> None:
    model = dpk.convert_model(net())
    report = dpk.memory_report(model, batch(8))
    for footprint, make in ((report.after, dpk.convert_model), (report.before, plain_twin)):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

        def needed(count: int, make=make, trained=trained) -> int:
            def build() -> object:
                twin, x = make(net()), batch(count)

                def step() -> None:
                    twin(x).sum().backward()
                    twin.zero_grad()

                return step

            return _allocator.peak_bytes(build).peak + 28 * trained + 4 * trained * count - x_bytes(count)

        def x_bytes(count: int) -> int:
            return batch(count).nbytes

        memory = int(footprint.fixed + 24.5 * footprint.per_sample)
        largest = footprint.largest_batch(memory)
        assert largest == 24
        assert needed(largest) <= memory < needed(largest + 2)
    assert report.after.largest_batch(0) == 0


def test_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dpk.memory_report(net(), batch()).save_png(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 4000


def test_mappings_and_single_samples() -> None:
    report = dpk.memory_report(net(), {"x": batch(1)})
    assert report.batch == 1 and report.before.fixed is None and report.before.held > 0
    with pytest.raises(dpk.ConversionError, match="two samples"):
        report.after.largest_batch(2**30)


def test_refuses_a_model_with_an_engine() -> None:
    model = dpk.convert_model(net())
    attach(model, batch(), torch.zeros(8))
    with pytest.raises(dpk.ConversionError, match="detach"):
        dpk.memory_report(model, batch())


def test_refuses_an_output_without_gradient() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).detach()

    with pytest.raises(dpk.ConversionError, match="wants a gradient"):
        dpk.memory_report(Detached(), torch.randn(4, 3))


def test_hooks_of_parameters_do_not_run_and_inputs_get_no_gradient() -> None:
    """An optimizer step in such a hook is a usual way to save memory."""
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.1), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def step(parameter: nn.Parameter) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    before = [p.detach().clone() for p in model.parameters()]
    dpk.memory_report(model, torch.randint(0, 9, (4, 5)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    x = torch.randn(4, 4, requires_grad=True)
    dpk.memory_report(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), x)
    assert x.grad is None


def test_names_convolutions_whose_padding_keeps_everything() -> None:
    def left(mode: str) -> dict[str, str]:
        convs = [nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode) for _ in range(2)]
        return dpk.memory_report(nn.Sequential(*convs), torch.randn(4, 8, 6, 6)).left

    assert left("zeros") == {} and "padding" in left("circular")["Conv2d"]


@pytest.mark.parametrize("batch", [2, 3])
def test_few_samples_measure_what_many_do(batch: int) -> None:
    def per_sample(size: int) -> float:
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(6 * 32 * 32, 4),
        )  # fmt: skip
        after = dpk.memory_report(model, torch.randn(size, 3, 32, 32)).after
        assert after.per_sample is not None
        assert after.per_sample >= after.total / size
        return after.per_sample

    assert per_sample(batch) == pytest.approx(per_sample(16), rel=0.05)


@pytest.mark.parametrize("batch", [None, torch.tensor(1.0), (torch.zeros(2, 3), torch.zeros(1, 3)), {}])
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    with pytest.raises(dpk.BatchLayoutError, match="memory_report: sample_batch must be"):
        dpk.memory_report(nn.Linear(3, 3), batch)


def test_what_is_no_model_or_no_memory_is_refused() -> None:
    with pytest.raises(dpk.ConversionError, match=r"must be a torch\.nn\.Module, not NoneType"):
        dpk.memory_report(None, torch.zeros(2, 3))  # type: ignore[arg-type]
    with pytest.raises(dpk.ConversionError, match="'16GB'"):
        dpk.memory_report(nn.Linear(3, 3), torch.zeros(2, 3)).after.largest_batch("16GB")  # type: ignore[arg-type]


def test_says_why_a_swapped_module_keeps_what_it_did() -> None:
    layers = (nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3), nn.MaxPool2d(17), nn.Flatten(), nn.Linear(4, 2))
    model = dpk.convert_model(nn.Sequential(*layers))
    model[1].weight.requires_grad_(True)
    left = dpk.memory_report(model, torch.randn(2, 3, 20, 20)).left
    assert left["Conv2d"] == "its weight is trained"
    assert "settings" in left["MaxPool2d"]
