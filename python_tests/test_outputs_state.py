"""What modules hold beside parameters and buffers: put back after each run of the proof, and asked of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_outputs import C, Gives, T, private
from test_outputs_attacks import N, asked
from torch import Tensor, nn

import dp_bitfit_kernels as dpk


def test_a_counter_of_steps_is_no_mixing_and_stays_what_it_was() -> None:
    class Anneals(Gives):
        steps = 0

        def __init__(self) -> None:
            super().__init__(lambda s: s)
            self.steps = 0

        def forward(self, x: Tensor) -> Any:
            self.steps += 1
            return (super().forward(x) / self.steps).square().mean()

    engine, model, optimizer = private(Anneals(), torch.randn(N, 1))
    for _ in range(3):
        with engine.batch(N):
            model(torch.randn(N, T, 6)).backward()
            assert optimizer.step()
    assert model.steps == 3


def test_tensors_that_modules_keep_from_the_batch_are_named_and_put_back() -> None:
    class Centred(Gives):
        def __init__(self) -> None:
            super().__init__(lambda s: s)
            self.center = torch.zeros(C)

        def forward(self, x: Tensor) -> Any:
            s = super().forward(x)
            self.center.mul_(0.9).add_(0.1 * s.detach().mean((0, 1)))
            self.last = s.detach()
            return s

    engine, model, _ = private(Centred(), torch.randn(N, 1))
    x = torch.randn(N, T, 6)
    with engine.batch(N), pytest.warns(UserWarning, match=r"as attributes \(center, last\)"):
        s = model(x)
    torch.testing.assert_close(model.center, 0.1 * s.detach().mean((0, 1)))  # of this forward alone


class Keeps(nn.Module):
    """Takes a mean that ``keep`` has of the batches before from the scores, and tells it of this one's."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(6, C), how
        self.mean: Any = torch.zeros(()) if how == "tensor" else [0.0] if how == "list" else 0.0
        self.frozen = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        s = self.inner(x)
        kept = self.frozen if self.how == "parameter" else self.mean[0] if self.how == "list" else self.mean
        given = s if self.how in ("logged", "parameter") else s - kept
        if self.how == "parameter":
            self.frozen.data.mul_(0.9).add_(0.1 * s.detach().mean())
        elif self.how == "tensor":
            self.mean.mul_(0.9).add_(0.1 * s.detach().mean())
        elif self.how == "list":
            self.mean[0] = 0.9 * kept + 0.1 * s.detach().mean().item()
        else:
            self.mean = 0.9 * kept + 0.1 * s.detach().mean().item()
        return given


@pytest.mark.parametrize("how", ["number", "tensor", "list", "parameter"])
def test_what_one_batch_held_may_not_show_in_the_next(how: str) -> None:
    with pytest.raises(dpk.BatchLayoutError, match="written by the forward" if how == "parameter" else "for the next"):
        asked(Keeps(how), torch.randn(N, T, 6))


def test_a_number_that_is_only_logged_is_named() -> None:
    with pytest.warns(UserWarning, match=r"as attributes \(mean\)"):
        asked(Keeps("logged"), torch.randn(N, T, 6))


class Lazy(nn.Module):
    """Builds its table at the first forward: an attribute that was None, or a flag and a new one, or an entry."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(6, C), how
        self.table: Any = {} if how == "entry" else None
        self.built = False

    def forward(self, x: Tensor) -> Tensor:
        size = len(x) if self.how == "entry" else C
        made = torch.ones(size, 1, C, dtype=x.dtype) if self.how == "entry" else torch.ones(C, dtype=x.dtype)
        if self.how == "none":
            self.table = made if self.table is None else self.table
            return self.inner(x) * self.table
        if self.how == "flag":
            if not self.built:
                self.built, self.made = True, made
            return self.inner(x) * self.made
        if size not in self.table:
            self.table[size] = made
        return self.inner(x) * self.table[size]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["none", "flag", "entry"])
def test_what_is_built_at_the_first_forward_is_built_and_in_its_own_dtype(how: str, dtype: torch.dtype) -> None:
    engine, model, optimizer = private(Lazy(how).to(dtype), torch.randn(N, 1))
    for batch in (N, 3, N):
        with engine.batch(batch):
            given = model(torch.randn(batch, T, 6, dtype=dtype))
            assert given.dtype == dtype
            given.square().mean().backward()
            assert optimizer.step()
    built = model.table[N] if how == "entry" else model.made if how == "flag" else model.table
    assert built.dtype == dtype
    model.eval()
    assert model(torch.randn(N, T, 6, dtype=dtype)).dtype == dtype


def test_attributes_that_cannot_be_compared_are_left_alone() -> None:
    class Holds(Gives):
        def __init__(self) -> None:
            super().__init__(lambda s: s)
            self.on_meta = torch.zeros(3, device="meta")
            self.nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])
            self.nans = torch.full((1,), torch.nan).expand(6)
            self.sparse = torch.eye(3).to_sparse()
            self.register_buffer("shared", torch.ones(1).expand(6))

    asked(Holds(), torch.randn(N, T, 6))


def test_a_mask_for_all_is_not_taken_for_one_in_a_later_batch() -> None:
    class ByMask(Gives):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.inner(x) / mask.sum() if len(mask) > 1 else self.inner(x)

    engine, model, optimizer = private(ByMask(lambda s: s), torch.randn(N, 1))
    with engine.batch(N):
        model(torch.randn(N, T, 6), torch.ones(1, T)).square().sum().backward()
        assert optimizer.step()
    with pytest.raises(dpk.BatchLayoutError), engine.batch(N):
        model(torch.randn(N, T, 6), torch.rand(N, T))
