"""Networks to convert, and what must hold of a converted one; shared by the tests of conversion and of files."""

from __future__ import annotations

from typing import Any

import torch
from attach import attach
from oracle import clipped_sum, rows
from torch import Tensor, nn

from dp_bitfit_kernels import layers
from dp_bitfit_kernels.convert import conversion_report, convert_model


class ConvNet(nn.Module):
    """Head defined before the body, BatchNorm, GroupNorm, a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, bias=False)
        self.group = nn.GroupNorm(2, 8)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = self.drop(torch.relu(self.group(self.conv2(x))))
        return self.head(x.mean((2, 3)))


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything a failed conversion could have touched."""
    return {
        "classes": [type(m) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "own": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "pointers": [(id(p), p.data_ptr()) for p in model.parameters()],
        "values": [t.clone() for t in model.state_dict().values()],
        "grads": [p.grad for p in model.parameters()],
    }


def same(before: dict[str, object], after: dict[str, object]) -> bool:
    tensors = zip(before.pop("values"), after.pop("values"), strict=True)  # type: ignore[call-overload]
    return before == after and all(torch.equal(a, b) for a, b in tensors)


def accounted(model: nn.Module) -> None:
    """Each parameter is in exactly one place of the report, which agrees with requires_grad and with the layers."""
    report = conversion_report(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    listed = [*report.trained, *report.frozen, *report.tied]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(named)
    for name, parameter in named.items():
        assert parameter.requires_grad == (report.tied.get(name, name) in report.trained), name
    by_layers = {
        id(module.trained_parameter(own))
        for module in model.modules()
        if isinstance(module, layers.BiasLayer)
        for own in module.trained
    }
    assert by_layers == {id(named[name]) for name in report.trained}
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.trained == {name: named[name].numel() for name in report.trained}


def trained_names(model: nn.Module) -> set[str]:
    return set(conversion_report(model).trained)


def bias_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"}


def network(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def trained(seed: int = 0) -> nn.Module:
    """A converted network whose trained parameters have moved away from where it started."""
    model = convert_model(network(seed), train_modules=("3",))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def values(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def squares(output: Tensor) -> Tensor:
    return output.square().sum(1).mean()


def step_and_oracle(model: nn.Module, x: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """(what a noiseless private step moved [P], what the oracle moves [P]) of the trained parameters, in training mode;
    everything else is bit for bit what it was."""
    torch.manual_seed(0)
    model.train()
    convert_model(model, sample_batch=x, **arguments)
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
