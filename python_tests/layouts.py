"""Small models whose layers hold the samples in other ways than one row each: stand-ins for the families named."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 6


class Windows(nn.Module):
    """Windows of an image folded into the batch (Swin, SAM, MobileViT): [B, H, W, C] -> [B * nW, w * w, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, WIDTH)
        self.act = nn.GELU()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # [B, 4, 4, C]
        batch = len(x)
        folded = x.view(batch, 2, 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(batch * 4, 4, WIDTH)
        folded = self.act(self.qkv(self.norm(folded)))
        return self.out(folded).view(batch, 4, 4, WIDTH).mean((1, 2))


class Patches(nn.Module):
    """Images of patches folded into the batch of a convolution and its norm (MaxViT, TNT): [B * n, C, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, n, 2, h, w]
        y = self.norm(self.conv(x.flatten(0, 1))).relu().mean((2, 3))
        return self.head(y).view(len(x), -1, 3).mean(1)


class FlatTokens(nn.Module):
    """Tokens of all samples in one dimension (OPT's fc2, MoE routers): [B * T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        flat = self.norm(torch.tanh(self.up(x.reshape(-1, WIDTH))))
        return self.head(flat).view(*x.shape[:2], 3).mean(1)


class SequenceFirstNet(nn.Module):
    """[T, B, C] inside (XLNet, FSMT, Longformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        return self.norm(torch.tanh(self.inner(x.transpose(0, 1)))).mean(0)


class WindowMajor(nn.Module):
    """The windows of all samples one after another: [nW * B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, n, C]
        return torch.tanh(self.inner(x.transpose(0, 1).reshape(-1, WIDTH))).view(x.shape[1], len(x), 3).mean(0)


class SharedNorm(nn.Module):
    """One norm on whole samples and on their flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        y = self.norm(x)
        return self.head(self.norm(y.tanh().reshape(-1, WIDTH)).view(x.shape).mean(1))


# model, shape of a sample
LAYOUTS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "windows": (Windows, (4, 4, WIDTH)),
    "patches": (Patches, (3, 2, 5, 4)),
    "flat tokens": (FlatTokens, (5, WIDTH)),
    "sequence first": (SequenceFirstNet, (5, WIDTH)),
    "sequence first, T = B": (SequenceFirstNet, (4, WIDTH)),
    "sequence first, T = B + 1": (SequenceFirstNet, (5, WIDTH)),
    "window major": (WindowMajor, (3, WIDTH)),
    "shared norm": (SharedNorm, (5, WIDTH)),
}
