"""When the layout is asked again: each form of call, each size of windows, and batches ever more rarely."""

from __future__ import annotations

import enum

import pytest
import torch
from attach import attach, private
from layouts import WIDTH, Windows
from oracle import rows as oracle_rows
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._validate import BatchLayoutError


def loss_of(y: Tensor) -> Tensor:
    weights = torch.linspace(-1.0, 1.0, y[0].numel(), dtype=y.dtype).view(y.shape[1:])
    return (y * weights).flatten(1).sum(1).sin().mean()


class SortedByLength(nn.Module):
    """Sorts the batch by length, as encoders of packed sequences do; equal lengths stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:  # a token that starts with 0 is padding
        order = (x[..., 0] != 0).sum(1).argsort(descending=True, stable=True)
        h = torch.tanh(self.inner(x[order]))
        return self.out(h[order.argsort()]).mean(1)


def test_a_layout_that_changes_with_what_batches_hold_is_asked_again() -> None:
    torch.manual_seed(0)
    _, model, optimizer, _ = private(SortedByLength(), n=4, dims=(5, WIDTH), poisson_sampling=False)
    full = torch.randn(4, 5, WIDTH)
    loss_of(model(full)).backward()
    optimizer.step()
    mixed = full.clone()
    mixed[0, 2:, 0] = mixed[2, 4:, 0] = 0.0
    with pytest.raises(BatchLayoutError, match="'inner'"):
        loss_of(model(mixed))


class EitherWay(nn.Module):
    """Time-major or batch-major inside, by a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, time_major: bool) -> Tensor:  # [B, T, C]
        if time_major:
            return torch.tanh(self.inner(x.transpose(0, 1))).mean(0)
        return torch.tanh(self.inner(x)).mean(1)


def test_each_form_of_call_goes_by_its_own_proof() -> None:
    torch.manual_seed(0)
    _, model, optimizer, _ = attach(dpk.convert_model(EitherWay()), torch.randn(4, 1), poisson_sampling=False)
    x = torch.randn(4, 4, WIDTH)  # T = B: no size tells
    rows = {}
    for turn, time_major in enumerate((True, True, False, False, True, False)):  # 5 and 6 are not asked again
        optimizer.zero_grad()
        loss_of(model(x, time_major=time_major)).backward()
        rows[turn] = model.inner.attachment._slab.rows.clone()
        with torch.no_grad():
            bias = model.inner.bias.clone()
        optimizer.step()
        with torch.no_grad():
            model.inner.bias.copy_(bias)
    for turn in (1, 2, 3, 4, 5):
        torch.testing.assert_close(rows[turn], rows[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [6, 8])
def test_images_of_another_size_are_asked_by_themselves(size: int) -> None:
    class Any2(Windows):
        def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C], windows of 2 x 2
            b, n = len(x), x.shape[1] // 2
            folded = x.view(b, n, 2, n, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(b * n * n, 4, WIDTH)
            folded = self.act(self.qkv(self.norm(folded)))
            return self.out(folded).view(b, n * n * 4, WIDTH).mean(1)

    torch.manual_seed(0)
    images = {n: torch.randn(4, n, n, WIDTH) for n in (4, size)}
    _, model, optimizer, _ = attach(dpk.convert_model(Any2()), images[4], poisson_sampling=False)
    rows: dict[int, list[Tensor]] = {4: [], size: []}
    for n in (4, 4, size, 4, size, 4, size):  # the third, the sixth and the seventh are not asked again
        loss_of(model(images[n])).backward()
        rows[n].append(model.out.attachment._slab.rows.clone())
        optimizer.zero_grad()
        loss_of(model(images[n])).backward()
        with torch.no_grad():
            before = [p.clone() for p in model.parameters()]
        optimizer.step()
        with torch.no_grad():
            for p, value in zip(model.parameters(), before, strict=True):
                p.copy_(value)
    want = oracle_rows(model, [n for n, p in model.named_parameters() if p.requires_grad], images[size], loss_of)
    for found in rows.values():
        for again in found[1:]:
            torch.testing.assert_close(again, found[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows[size][0].double(), want / 4, rtol=1e-3, atol=1e-5)  # of the mean over the batch


class Mode(enum.Enum):
    SAMPLES, TIMES = 0, 1


@pytest.mark.parametrize("modes", [(Mode.SAMPLES, Mode.TIMES), (0, 1)], ids=["enumeration", "numbers"])
def test_each_mode_of_a_call_is_asked(modes: tuple[object, object]) -> None:
    class Folds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor, mode: object) -> Tensor:  # [B, T, C]
            if mode in (Mode.TIMES, 1):
                return torch.tanh(self.inner(x.transpose(0, 1).reshape(-1, WIDTH))).view(-1, len(x), 3).mean(0)
            return torch.tanh(self.inner(x.reshape(-1, WIDTH))).view(*x.shape[:2], 3).mean(1)

    torch.manual_seed(0)
    x = torch.randn(4, 5, WIDTH)
    _, model, optimizer, _ = attach(dpk.convert_model(Folds()), x, poisson_sampling=False)
    rows = []
    for mode in (modes[0], modes[0], modes[1], modes[0], modes[0], modes[1]):
        loss_of(model(x, mode)).backward()
        rows.append(model.inner.attachment._slab.rows.clone())
        bias = model.inner.bias.detach().clone()
        optimizer.step()
        with torch.no_grad():
            model.inner.bias.copy_(bias)
    for found in rows[1:]:
        torch.testing.assert_close(found, rows[0], rtol=1e-4, atol=1e-6)


def test_a_number_that_changes_with_each_batch_is_warned_of() -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor, step: int) -> Tensor:
            return self.inner(x) * (1 + step)

    torch.manual_seed(0)
    x = torch.randn(4, WIDTH)
    _, model, optimizer, _ = attach(dpk.convert_model(Numbered()), x, poisson_sampling=False)
    with pytest.warns(UserWarning, match="more than 32 ways"):
        for step in range(34):
            loss_of(model(x, step)).backward()
            optimizer.step()
