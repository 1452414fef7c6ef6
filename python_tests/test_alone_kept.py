"""What leaves a module run on each sample by itself beside its outputs, and what it keeps: seen, or refused."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from alone import TOKENS, Raw, alone_in, around, loss
from attach import attach
from layouts import WIDTH
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._validate import BatchLayoutError, UnsupportedModuleError


class CountsSamples(nn.Module):
    """Outputs that are no tensors, and come from a run of one sample."""

    def __init__(self, shape: bool) -> None:
        super().__init__()
        self.q_bias, self.shape = nn.Parameter(torch.randn(WIDTH)), shape

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return x + self.q_bias, x.shape if self.shape else len(x)


class UsesTheCount(nn.Module):
    def __init__(self, shape: bool) -> None:
        super().__init__()
        self.inner, self.out = CountsSamples(shape), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, n = self.inner(x)
        return self.out(y.view(n) if isinstance(n, torch.Size) else y * n / len(x))


@pytest.mark.parametrize("shape", [False, True])
def test_outputs_that_are_no_tensors_are_those_of_the_batch(shape: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, *TOKENS)
    with pytest.raises(BatchLayoutError, match="'inner'"):
        dpk.check_model(dpk.convert_model(UsesTheCount(shape)), x, loss)
    model = dpk.convert_model(UsesTheCount(shape), sample_batch=x)
    assert dpk.conversion_report(model).one_by_one == {"": "UsesTheCount"}
    assert dpk.check_model(model, x, loss).worst < 1e-5


class Keeps(nn.Module):
    """What is added outside leaves the module through a list that it holds, or one that a hook fills."""

    def __init__(self, by_hook: bool) -> None:
        super().__init__()
        self.aux: list[Tensor] = []
        self.inner, self.out = Raw(self.run), nn.Linear(WIDTH, 3)
        self.by_hook = by_hook
        if by_hook:
            self.inner.lin.register_forward_hook(lambda module, args, output: self.aux.append(output))
        else:
            self.inner.kept = self.aux

    @staticmethod
    def run(inner: Any, x: Tensor) -> Tensor:
        y = torch.tanh(inner.lin(x) + inner.q_bias)
        if hasattr(inner, "kept"):
            inner.kept.append(y)
        return y

    def forward(self, x: Tensor) -> Tensor:
        self.aux.clear()
        y = self.inner(x)
        return self.out(y + self.aux[-1])


@pytest.mark.parametrize("by_hook", [False, True])
def test_what_leaves_by_lists_and_hooks_is_seen(by_hook: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, *TOKENS)
    with pytest.raises(BatchLayoutError, match="'inner'"):
        dpk.check_model(dpk.convert_model(Keeps(by_hook)), x, loss)
    with pytest.raises(UnsupportedModuleError, match=r"Keeps: .*keeps tensors as attributes"):  # a loss may read them
        dpk.convert_model(Keeps(by_hook), sample_batch=x)


class Store:
    value: Any = None


def into_an_object(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.store.value = x.sum((1, 2)).detach()
    return torch.tanh(self.lin(x) + self.q_bias)


def into_a_deque(self: Any, x: Tensor) -> Tensor:
    self.store.append(self.lin(x))
    return torch.tanh(self.lin(x) + self.q_bias)


@pytest.mark.parametrize(("run", "store"), [(into_an_object, Store()), (into_a_deque, collections.deque(maxlen=2))])
def test_what_is_kept_anywhere_is_refused_by_name(run: Callable[[Any, Tensor], Tensor], store: Any) -> None:
    """A loss that read it would see one sample, and clipping would not bound what another does to it."""
    _, model, _, _ = attach(dpk.convert_model(around(run, store=store)), torch.zeros(4, 1), poisson_sampling=False)
    with pytest.raises(BatchLayoutError, match="'1' is run one sample at a time, but keeps tensors"):
        model.train()(torch.randn(4, *TOKENS))


def test_what_a_hook_of_the_user_records_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model, seen = around(lambda self, x: torch.tanh(self.lin(x) + self.q_bias)), {}
    model[1].lin.register_forward_hook(lambda module, args, output: seen.__setitem__("h", output))
    _, model, _, _ = attach(dpk.convert_model(model), torch.zeros(4, 1), poisson_sampling=False)
    with pytest.raises(BatchLayoutError, match="keeps tensors"):
        model(torch.randn(4, *TOKENS))


def test_caches_by_length_are_kept() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = torch.linspace(0.5, 1.5, x.shape[1])[:, None]
        return torch.tanh(self.lin(x) + self.q_bias) * self.cache[x.shape[1]]

    cache: dict[int, Tensor] = {5: torch.linspace(0.5, 1.5, 5)[:, None]}
    model = dpk.convert_model(around(run, cache=cache))
    _, model, optimizer, _ = attach(model, torch.zeros(4, 1), poisson_sampling=False)
    for length in (5, 5, 7, 7, 3):
        loss(model, torch.randn(4, length, WIDTH)).backward()
        assert optimizer.step()


def test_a_cache_that_grows_under_vmap_is_no_wrapper() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = x.new_full((x.shape[1], 1), 0.5)
        return torch.tanh(self.lin(x) + self.q_bias) * self.cache[x.shape[1]]

    cache: dict[int, Tensor] = {5: torch.full((5, 1), 0.5)}
    model = dpk.convert_model(around(run, cache=cache))
    _, model, optimizer, _ = attach(model, torch.zeros(4, 1), poisson_sampling=False)
    for length, batch in ((5, 4), (5, 4), (7, 4), (7, 3), (7, 4)):
        x = torch.randn(batch, length, WIDTH)
        loss(model, x).backward()
        assert optimizer.step()
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()
    assert all(type(tensor) is Tensor and tensor.sum().isfinite() for tensor in cache.values())


def counts(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.n += 1
    y = torch.tanh(self.lin(x) + self.q_bias)
    return y if self.by_vmap else y * (1 + self.n)  # samples would see counts of their own


@pytest.mark.parametrize("by_vmap", [True, False])
def test_counters_in_buffers_count_batches(by_vmap: bool) -> None:
    torch.manual_seed(0)
    model = around(counts, by_vmap=by_vmap)
    model[1].register_buffer("n", torch.zeros(()))
    twin = copy.deepcopy(model)
    x = torch.randn(4, *TOKENS)
    model = dpk.convert_model(model)
    _, model, optimizer, _ = attach(model.train(), x, poisson_sampling=False, bound=1e3)
    for n in range(1, 4):
        with torch.no_grad():
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        y = model(x)
        torch.testing.assert_close(y, twin.train()(x))
        assert model[1].n == n == twin[1].n
        y.sum().backward()
        assert optimizer.step()
    assert all(call.at_once == by_vmap for alone in alone_in(model) for call in alone.calls)
