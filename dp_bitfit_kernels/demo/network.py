"""The public model: a small network with biases in conv, norm and linear layers, pre-trained on glyphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .glyphs import CHARACTERS


class GlyphNet(nn.Module):
    """Images [B, 1, 16, 16] -> logits [B, 36] of `glyphs.CHARACTERS`, the digits first.

    Biases at several depths: moving one moves where its unit switches on, and together they bend the features, not only
    the last layer, to another kind of digit.
    """

    def __init__(self, channels: int = 64, hidden: int = 512):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 5, stride=2, padding=2)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(8, 2 * channels)
        self.hidden1 = nn.Linear(2 * channels * 16, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, len(CHARACTERS))

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(images)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.hidden1(x.flatten(1)))
        x = F.relu(self.hidden2(x))
        logits: Tensor = self.head(x)
        return logits


def pretrain(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    generator: torch.Generator,
    batch_size: int = 128,
    peak_rate: float = 2e-3,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Ordinary training of all parameters on public images [n, 1, 16, 16]; `on_step` is called after each step."""
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: steps // epochs * batch_size].split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
            on_step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, classes: int = len(CHARACTERS)) -> float:
    """Share of images [n, 1, 16, 16] whose largest logit, of the first `classes`, is that of the label [n]."""
    model.eval()
    return float((model(images)[:, :classes].argmax(1) == labels).double().mean())
