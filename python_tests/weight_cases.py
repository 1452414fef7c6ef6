"""Networks whose weights are trained, one for each way in which a weight is used; shared by the tests of weights.

Each takes what ``batch`` gives, [B, ...], to [B, 3] class scores, in every number of dimensions that its layers allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from attach import attach
from torch import Tensor, nn

import dp_bitfit_kernels as dpk


class Sequence(nn.Module):
    """Token vectors through ``body``, averaged over the tokens, through a head."""

    def __init__(self, body: nn.Module, width: int, source: nn.Module | None = None) -> None:
        super().__init__()
        self.source = source or nn.Identity()
        self.body, self.head = body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.source(x)).tanh().mean(1))


class Twice(nn.Module):
    """A linear layer used twice, on different numbers of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        return self.head(self.inner(self.inner(x).tanh()[:, ::2]).mean(1))


class Tied(nn.Module):
    """An embedding whose weight is also the output matrix, as in language models."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=padding)
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:  # [B, T] -> [B, 3]
        return self.out(self.inner(self.embed(x)).tanh()).mean(1)[:, :3]


class Images(nn.Module):
    """An image through ``body``, averaged over what is left of it."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh().flatten(2).mean(2))


class Attention(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(8, 3)
        self.key_width, self.value_width = options.get("kdim", 8), options.get("vdim", 8)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 8]
        key, value = x[..., : self.key_width], x[..., : self.value_width]  # type: ignore[misc]
        if key.shape == x.shape and value.shape == x.shape:
            key = value = x.flip(1)
        return self.head(self.attention(x, key, value, need_weights=False)[0].mean(1))


class SelfAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


class Positions(nn.Module):
    """A class token, a table of positions and an embedding of position numbers, all shared by the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.table = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 6, 6))
        self.numbered, self.bare = nn.Embedding(9, 6), nn.Embedding(9, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, 5, 6]
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.table
        numbers = torch.arange(x.shape[1])
        x = x + self.norm(self.numbered(numbers.unsqueeze(0))) + self.bare(numbers)
        return self.head(x.tanh().mean(1))


class FoldedImages(nn.Module):
    """Two windows of each image side by side in the leading dimension, through ``body``."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, 6, 8]
        windows = x.unflatten(3, (2, 4)).permute(0, 3, 1, 2, 4).reshape(-1, 2, 6, 4)
        return self.head(self.body(windows).tanh().mean((2, 3)).view(len(x), 2, -1).mean(1))


class SequenceFirst(nn.Module):
    """``inner`` has the samples in dimension 1."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 6]
        return self.head(self.inner(x.transpose(0, 1)).tanh().mean(0))


def conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Sequence(Conv1D(7, 6), 7)


@dataclass(frozen=True)
class WeightCase:
    name: str
    reason: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (5, 6)  # of a sample
    tokens: int = 0  # numbers below this instead of vectors
    memory: str = "exact"

    def batch(self, size: int = 6) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.tokens:
            return torch.randint(0, self.tokens, (size, *self.shape), generator=generator)
        return torch.randn(size, *self.shape, generator=generator)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()


NORMS = ("mixed", "ghost", "instantiate")  # per_sample_norm
METHODS = [(norm, total) for norm in NORMS for total in ("book_keeping", "second_backward")]
IMAGE = (4, 6, 7)
CASES = {
    case.name: case
    for case in (
        WeightCase(
            "linear", "one vector a sample", lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)
        ),
        WeightCase("linear of tokens", "T > 1", lambda: Sequence(nn.Linear(6, 7), 7)),
        WeightCase("no bias", "the weight alone is trained", lambda: Sequence(nn.Linear(6, 7, bias=False), 7)),
        WeightCase("linear of a grid", "more dimensions than [B, T, d]", lambda: Images(nn.Linear(7, 5), 4), IMAGE),
        WeightCase("twice", "a module used twice: cross terms in the norm", Twice),
        WeightCase("tied", "an embedding that is the output matrix, too", Tied, (5,), 11),
        WeightCase("tied, padding", "padding has no gradient, though the output matrix has", lambda: Tied(3), (5,), 11),
        WeightCase(
            "embedding",
            "few vectors, tokens repeated",
            lambda: Sequence(nn.Linear(6, 6), 6, nn.Embedding(4, 6)),
            (9,),
            4,
        ),
        WeightCase(
            "padding", "padding_idx", lambda: Sequence(nn.Linear(6, 6), 6, nn.Embedding(7, 6, padding_idx=2)), (5,), 7
        ),
        WeightCase("conv1d of transformers", "weight [d, p]", conv1d_of_transformers),
        WeightCase("conv1d", "one dimension, dilated", lambda: Images(nn.Conv1d(4, 5, 3, dilation=2), 5), (4, 9)),
        WeightCase("conv2d", "stride and padding", lambda: Images(nn.Conv2d(4, 5, 3, 2, 1), 5), IMAGE),
        WeightCase("conv2d, groups", "groups", lambda: Images(nn.Conv2d(4, 6, 3, groups=2), 6), IMAGE),
        WeightCase(
            "conv2d, depthwise", "a group a channel", lambda: Images(nn.Conv2d(4, 8, (1, 3), groups=4), 8), IMAGE
        ),
        WeightCase(
            "conv2d, same",
            "more padding on one side",
            lambda: Images(nn.Conv2d(4, 5, (2, 4), padding="same"), 5),
            IMAGE,
        ),
        WeightCase(
            "conv2d, circular",
            "padded by what it holds",
            lambda: Images(nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), 5),
            IMAGE,
        ),
        WeightCase(
            "conv2d, stride beyond", "positions left over at the end", lambda: Images(nn.Conv2d(4, 5, 2, 4), 5), IMAGE
        ),
        WeightCase("conv3d", "three dimensions", lambda: Images(nn.Conv3d(2, 3, 2), 3), (2, 3, 4, 3)),
        WeightCase("conv2d of autograd", "memory='off'", lambda: Images(nn.Conv2d(4, 5, 3), 5), IMAGE, memory="off"),
        WeightCase("folded", "windows folded into the batch", lambda: FoldedImages(nn.Conv2d(2, 4, 3), 4), (2, 6, 8)),
        WeightCase(
            "conv transpose 1d", "roles turned", lambda: Images(nn.ConvTranspose1d(4, 6, 3, 2, groups=2), 6), (4, 5)
        ),
        WeightCase(
            "conv transpose 2d", "output_padding", lambda: Images(nn.ConvTranspose2d(4, 5, 3, 2, 1, 1), 5), IMAGE
        ),
        WeightCase(
            "conv transpose 3d", "three dimensions", lambda: Images(nn.ConvTranspose3d(2, 3, 2), 3), (2, 2, 3, 2)
        ),
        WeightCase("attention", "one product for keys and values", Attention, (5, 8)),
        WeightCase("self-attention", "one product for all", SelfAttention, (5, 8)),
        WeightCase("attention, widths", "weights of their own", lambda: Attention(kdim=6, vdim=4), (5, 8)),
        WeightCase(
            "norms", "scales", lambda: Sequence(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6)), 6)
        ),
        WeightCase(
            "norms of images",
            "scales a channel",
            lambda: Images(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)), 4),
            IMAGE,
        ),
        WeightCase(
            "norms of autograd",
            "memory='off'",
            lambda: Images(nn.Sequential(nn.GroupNorm(2, 4), nn.BatchNorm2d(4)), 4),
            IMAGE,
            memory="off",
        ),
        WeightCase("positions", "what all samples share", Positions),
        WeightCase("sequence first", "samples in the second dimension", lambda: SequenceFirst(nn.Linear(6, 5), 5)),
        WeightCase("norms, sequence first", "rows of a scale there", lambda: SequenceFirst(nn.LayerNorm(6), 6)),
        WeightCase(
            "norms of folded images",
            "rows of a scale of windows",
            lambda: FoldedImages(nn.Sequential(nn.GroupNorm(1, 2), nn.BatchNorm2d(2)), 2),
            (2, 6, 8),
        ),
    )
}


def trained(model: nn.Module, x: Tensor, **options: object):  # type: ignore[no-untyped-def]
    """All of the model, attached to samples ``x`` in 3 classes -> (engine, model, optimizer, loader)."""
    dpk.convert_model(model, train_modules=("*",))
    return attach(model, x, torch.arange(len(x)) % 3, **options)
