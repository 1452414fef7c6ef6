"""Modules that cannot be run on each sample by itself, or not as they are called: refused by name."""

from __future__ import annotations

import pytest
import torch
from alone import TOKENS, QueryBias, loss
from attach import attach
from layouts import WIDTH
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._validate import BatchLayoutError, UnsupportedModuleError


def test_a_cache_is_refused_by_name() -> None:
    class Cache:
        pass

    class Caching(QueryBias):
        def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
            return super().forward(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Caching()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, cache=Cache())

    with pytest.raises(BatchLayoutError, match="'inner' is run one sample at a time, but takes or gives a Cache"):
        dpk.check_model(dpk.convert_model(Outer()), torch.randn(4, *TOKENS), loss)


def test_samples_that_mix_are_refused() -> None:
    class Mixing(QueryBias):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    with pytest.raises(BatchLayoutError, match="one sample at a time"):
        dpk.check_model(dpk.convert_model(Mixing()), torch.randn(4, *TOKENS), loss)
    with pytest.raises(UnsupportedModuleError, match="Mixing"):
        dpk.convert_model(Mixing(), sample_batch=torch.randn(4, *TOKENS))


def test_an_unproven_batch_is_refused() -> None:
    model = dpk.convert_model(QueryBias())
    engine = dpk.PrivacyEngine()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, *TOKENS)), batch_size=4)
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
    )
    with engine.batch(2), pytest.warns(UserWarning), pytest.raises(BatchLayoutError, match="has not seen it"):
        model(torch.randn(4, *TOKENS))


def test_a_call_of_another_form_is_refused() -> None:
    """A tensor that one call shares between samples may hold the samples in another: nothing is guessed."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_bias = nn.Parameter(torch.randn(WIDTH))

        def forward(self, x: Tensor, shared: Tensor | None = None, own: Tensor | None = None) -> Tensor:
            y = x + self.q_bias
            return torch.tanh(y * (shared if shared is not None else own))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.later = Mixed(), False

        def forward(self, x: Tensor) -> Tensor:
            if self.later:
                return self.inner(x, own=x)
            return self.inner(x, shared=torch.ones(1, 1, WIDTH))

    torch.manual_seed(0)
    model, x = dpk.convert_model(Outer()), torch.randn(4, *TOKENS)
    _, model, optimizer, _ = attach(model, x, poisson_sampling=False)
    for _ in range(2):  # the second batch is asked again, the third is not
        loss(model, x).backward()
        assert optimizer.step()
    model.later = True
    with pytest.raises(BatchLayoutError, match="in this way"):
        loss(model, x)


class Lengths(nn.Module):
    """Pools by lengths that are Python numbers: what a sample alone is given is the list of all."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        return torch.stack([(h[:n] + self.bias).tanh().mean(0) for h, n in zip(x, lengths, strict=False)])


class IntoItsArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, state: dict[str, Tensor]) -> None:
        state["x"] = (state["x"] + self.bias).tanh()


class Stash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.gate = nn.Parameter(torch.randn(WIDTH)), None

    def forward(self, x: Tensor) -> Tensor:
        self.gate = torch.sigmoid(x + self.bias)
        return x


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.mask = inner, None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, Lengths):
            return self.inner(x, (1 + torch.arange(len(x)) % x.shape[1]).tolist())
        if isinstance(self.inner, IntoItsArgument):
            state = {"x": x}
            self.inner(state)
            return state["x"].mean(1)
        return self.inner(x).mean(1) * self.inner.gate.mean(1)


@pytest.mark.parametrize("inner", [Lengths, IntoItsArgument, Stash])
def test_what_passes_by_other_ways_than_tensors_is_refused(inner: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, *TOKENS)
    _, model, _, _ = attach(dpk.convert_model(Around(inner())), x, poisson_sampling=False)
    with pytest.raises(BatchLayoutError, match="'inner'"):
        loss(model, x)
