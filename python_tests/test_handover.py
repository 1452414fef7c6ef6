"""The sum of a layer's output gradient, taken by what produced it, is used only where it is proven to be that."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import oracle
import pytest
import torch
from attach import attach, names_of
from test_layers import ledger_rows
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import _backward, functional, functional_window


class Counter:
    """How often a layer took a sum over, and how often it summed itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.over = self.own = 0
        handed_over, bias_grad = _backward.handed_over, functional.bias_grad

        def counted(ctx: object, grad: Tensor) -> Tensor | None:
            rows = handed_over(ctx, grad)
            self.over += rows is not None
            return rows

        def counted_sum(*arguments: object) -> Tensor:
            self.own += 1
            return bias_grad(*arguments)  # type: ignore[arg-type]

        for module in (functional, functional_window):
            monkeypatch.setattr(module, "handed_over", counted)
            monkeypatch.setattr(module, "bias_grad", counted_sum)


PRODUCERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "relu_inplace": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "dropout": lambda: nn.Dropout(0.3),
}


def layer_and_input(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind.startswith("conv"):
        x = torch.randn(4, 3, 6, 5)
        last = kind == "conv_channels_last"
        return nn.Conv2d(3, 7, 3), x.to(memory_format=torch.channels_last) if last else x
    shape = (4, 3) if kind == "linear_2d" else (4, 2, 5, 3) if kind == "linear_4d" else (4, 6, 3)
    return nn.Linear(3, 7), torch.randn(shape)


@pytest.mark.parametrize("kind", ["linear", "linear_2d", "linear_4d", "conv", "conv_channels_last"])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_rows_are_taken_over_and_right(kind: str, producer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input(kind)
    model = dpk.convert_model(nn.Sequential(layer, PRODUCERS[producer]()))
    # The oracle draws no masks: the gradient of the layer's output in a plain twin, under the same seed.
    seen: list[Tensor] = []
    twin = nn.Sequential(copy.deepcopy(layer), PRODUCERS[producer]())
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    twin[0].register_forward_hook(lambda m, i, o: o.register_hook(seen.append) and None)
    torch.manual_seed(3)
    twin(x).sin().sum().backward()
    attach(model, x, bound=1e9, loss_reduction="sum", sample_rate=1.0)
    count = Counter(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model(x).sin().sum().backward()
    assert (count.over, count.own) == (1, 0)
    want = functional.samples_by_position(seen[0], 7, kind.startswith("conv")).double().sum(1)
    torch.testing.assert_close(ledger_rows(model).double(), want, rtol=1e-5, atol=1e-5)


def changed_in_place(grad: Tensor) -> None:
    grad.mul_(3.0)


def changed_unseen(grad: Tensor) -> None:
    grad.data.mul_(3.0)  # leaves no version, as collective operations do


def looked_at(grad: Tensor) -> None:
    pass


def replaced(grad: Tensor) -> Tensor:
    return 3.0 * grad


def same_memory(grad: Tensor) -> Tensor:
    return grad.view_as(grad)


class Meddled(nn.Module):
    """What stands between the layer and the module that produces its gradient."""

    def __init__(self, meddle: str):
        super().__init__()
        self.layer, self.act, self.meddle = nn.Linear(3, 7), nn.GELU(), meddle

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.meddle.startswith("hook") and h.requires_grad:
            hooks = {"inplace": changed_in_place, "new": replaced, "view": same_memory, "unseen": changed_unseen}
            h.register_hook({**hooks, "look": looked_at, "late": looked_at}[self.meddle.removeprefix("hook_")])
        y: Tensor = self.act(h)
        if self.meddle == "hook_late" and h.requires_grad:
            h.register_hook(changed_unseen)
        if self.meddle == "used_twice":
            y = y + h
        elif self.meddle == "used_before":
            y = h.sin() + y
        elif self.meddle == "two_producers":
            y = y * self.act(h)
        elif self.meddle == "sliced":
            y = y + self.act(h[:, :2]).sum(1, keepdim=True)
        return y


@pytest.mark.parametrize(
    "meddle",
    [
        "hook_inplace",
        "hook_new",
        "hook_view",
        "hook_unseen",
        "hook_look",
        "hook_late",
        "used_twice",
        "used_before",
        "two_producers",
        "sliced",
    ],
)
@pytest.mark.parametrize("memory", ["exact", "compact"])
def test_a_gradient_that_is_not_the_summed_one_is_summed_again(
    meddle: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = dpk.convert_model(Meddled(meddle), memory=memory), torch.randn(4, 6, 3)
    attach(model, x, bound=1e9, loss_reduction="sum", sample_rate=1.0)
    count = Counter(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x).sin().sum().backward()
    assert (count.over, count.own) == (0, 1)
    if memory == "exact":
        want = oracle.rows(model, names_of(model), x, lambda o: o.sin().sum())
        torch.testing.assert_close(ledger_rows(model).double(), want, rtol=1e-5, atol=1e-5)


def test_a_second_backward_through_the_graph_is_summed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = dpk.convert_model(nn.Sequential(nn.Linear(3, 7), nn.GELU())), torch.randn(4, 6, 3)
    want = oracle.rows(model, names_of(model), x, lambda o: 3.0 * o.sin().sum())
    attach(model, x, bound=1e9, loss_reduction="sum", sample_rate=1.0)
    count = Counter(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = model(x).sin().sum()
        loss.backward(retain_graph=True)
        (2.0 * loss).backward()
    assert (count.over, count.own) == (2, 0)
    torch.testing.assert_close(ledger_rows(model).double(), want, rtol=1e-5, atol=1e-5)


def test_a_sum_whose_layer_was_not_reached_is_not_used_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the layer's output alone is asked for first; then another, by the same graph."""
    torch.manual_seed(0)
    model = dpk.convert_model(nn.Sequential(nn.Linear(3, 7), nn.GELU()))
    x = torch.randn(4, 6, 3)
    h = model[0](x)
    y = model[1](h).sin().sum()
    torch.autograd.grad(y, h, retain_graph=True)
    count = Counter(monkeypatch)
    (torch.ones_like(h) * h).sum().backward()
    assert (count.over, count.own) == (0, 1)
    torch.testing.assert_close(model[0].bias.grad, torch.full((7,), 24.0))


def test_a_sum_of_another_backward_is_not_used() -> None:
    """The gradient of the layer's output, asked for by itself, changed unseen, and then passed on by hand."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 8)
    model = dpk.convert_model(nn.Sequential(layer, nn.ReLU()))
    h = layer(torch.randn(5, 4))
    (grad,) = torch.autograd.grad(model[1](h).sum(), h, retain_graph=True)
    grad.data.mul_(3.0)
    h.backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_nothing_is_handed_over_where_no_bias_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dpk.convert_model(nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.Linear(7, 2)), biases=("2.bias",))
    count = Counter(monkeypatch)
    model(torch.randn(4, 3)).sum().backward()
    assert (count.over, count.own) == (0, 1)


def test_the_gradient_is_let_go_with_its_layer() -> None:
    """Held by the layer's node only until the layer has looked."""
    model = dpk.convert_model(nn.Sequential(nn.Linear(3, 7), nn.GELU()))
    h = model[0](torch.randn(4, 6, 3))
    model[1](h).sum().backward(retain_graph=True)
    assert h.grad_fn.awaits == (7, False) and h.grad_fn.sums is None


def test_a_module_with_an_old_backward_hook_hands_nothing_over() -> None:
    # register_backward_hook acts on the node of the last operation, where no version tells what it wrote.
    gradients = {}
    for memory in ("off", "exact"):
        torch.manual_seed(0)
        model = dpk.convert_model(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), memory=memory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model[1].register_backward_hook(lambda module, into, out: (into[0].data.mul_(0.5), None)[1])
        model(torch.randn(2, 2, 6, 6)).sum().backward()
        gradients[memory] = model[0].bias.grad
    assert torch.equal(gradients["off"], gradients["exact"])
