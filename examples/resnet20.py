"""The CIFAR ResNet of He et al. 2016, section 4.2, with the parameter names of chenyaofo/pytorch-cifar-models."""

from __future__ import annotations

from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()  # a module, not a function: convert_model makes it keep a bit an element
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """`blocks` a stage: 3 for ResNet-20, 5 for ResNet-32, 7 for ResNet-44, 9 for ResNet-56."""

    def __init__(self, blocks: int, classes: int):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 16, 3, 1), nn.BatchNorm2d(16), nn.ReLU()
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(before if i == 0 else width, width, stride if i == 0 else 1) for i in range(blocks)))
            for before, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.fc = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, 32, 32] -> logits [B, classes]."""
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(images))))))
        return self.fc(x.mean((2, 3)))
