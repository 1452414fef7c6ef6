"""The private data: scikit-learn's handwritten digits (NIST), with a test split that training never sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from .glyphs import IMAGE_SIZE

TEST_IMAGES = 297


class Digits(NamedTuple):
    """Images [n, 1, 16, 16] in [0, 1], labels [n]: 1500 private ones to train on, 297 to test with."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def handwritten_digits(seed: int) -> Digits:
    """The 8 x 8 images, enlarged to the network's size; nothing about them is learned from the data."""
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=bunch.target, random_state=seed)
    return Digits(images[train], labels[train], images[test], labels[test])
