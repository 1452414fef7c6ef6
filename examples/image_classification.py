"""Private bias fine-tuning of a CIFAR-100 ResNet on CIFAR-10: BatchNorm frozen but for its shift, new head.

--method full also trains BatchNorm's scale; its running statistics stay in any case.

    python examples/image_classification.py --data cifar10_10k2k.npz --weights cifar100_resnet20.pth \\
        --epsilon 8 --output runs/cifar10
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import accuracy_of, add_training_flags, convert, peak_of_step, train
from resnet20 import ResNet
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of CIFAR-100, as in pre-training


def images(array: np.ndarray) -> Tensor:
    """uint8 [n, 32, 32, 3] -> normalised float32 [n, 3, 32, 32]."""
    pixels = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def load_model(weights: str, classes: int) -> nn.Module:
    """The pre-trained network with a new head, which starts at zero."""
    state = torch.load(weights, weights_only=True)
    blocks = sum(name.startswith("layer1.") and name.endswith("conv1.weight") for name in state)
    model = ResNet(blocks, classes=100)
    model.load_state_dict(state)
    model.fc = nn.Linear(64, classes)
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    return model


def flipped(records: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Collate with random mirror images: [B, 3, 32, 32] and labels [B]. One view a sample: clipping as before."""
    pixels, labels = default_collate(records)
    mirror = torch.rand(len(pixels)) < 0.5
    return [torch.where(mirror.view(-1, 1, 1, 1), pixels.flip(3), pixels), labels]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=".npz with train_x, train_y, test_x, test_y, classes")
    parser.add_argument("--weights", required=True, help="state_dict of a CIFAR-100 ResNet")
    parser.add_argument("--flip", action="store_true", help="random mirror images in training")
    add_training_flags(parser, epochs=10, batch_size=1000, max_physical_batch_size=250, lora_targets="conv1,conv2")
    return parser.parse_args(arguments)


def converted(args: argparse.Namespace, classes: int, sample: Tensor) -> tuple[nn.Module, list[dict[str, Any]]]:
    model = load_model(args.weights, classes)
    return model, convert(model, args, "fc", sample)


def made_up_loss(model: nn.Module, args: argparse.Namespace) -> Tensor:
    pixels = torch.zeros(args.max_physical_batch_size, 3, 32, 32)
    return F.cross_entropy(model(pixels), torch.zeros(len(pixels), dtype=torch.int64))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    arrays = np.load(args.data)
    keep = np.random.default_rng(args.seed).permutation(len(arrays["train_y"]))[: args.limit]
    data = TensorDataset(images(arrays["train_x"][keep]), torch.from_numpy(arrays["train_y"][keep]).long())
    test_x, test_y = images(arrays["test_x"]), torch.from_numpy(arrays["test_y"]).long()
    test_batches = list(zip(test_x.split(250), test_y.split(250), strict=True))
    classes, sample = len(arrays["classes"]), test_x[:2]
    peak = peak_of_step(args, lambda: converted(args, classes, sample), lambda model: made_up_loss(model, args))
    model, groups = converted(args, classes, sample)
    return train(
        args,
        model,
        groups,
        data,
        flipped if args.flip else default_collate,
        loss_of=lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
        evaluate=lambda: accuracy_of(model, test_batches, model),
        peak_bytes=peak,
    )


if __name__ == "__main__":
    main()
