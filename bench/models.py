"""The models that a step is measured on: random weights, fixed shapes, one batch each.

Times and bytes of a step do not depend on what a network has learnt, so nothing is downloaded. Dropout is off: it costs
every contender the same and would only hide a difference. Vocabularies are 8,192 instead of some 50,000 entries: the
rivals that train everything keep per-sample gradients of the embedding, and a large table would make them look worse
than they are, while a large resident table would flatter every memory ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

VOCABULARY = 8192


@dataclass
class Batch:
    """Inputs by argument name, each with leading dimension `size`; labels as class numbers."""

    inputs: dict[str, Tensor]  # name -> [B, ...]
    labels: Tensor  # [B], or [B, T] for a language model

    @property
    def size(self) -> int:
        return len(self.labels)

    def sample(self, i: int) -> Batch:
        """Sample i alone, as a batch of one."""
        return Batch({name: value[i : i + 1] for name, value in self.inputs.items()}, self.labels[i : i + 1])

    def to(self, dtype: torch.dtype) -> Batch:
        """Floating inputs in another precision; token numbers stay."""
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in self.inputs.items()}
        return replace(self, inputs=cast)


@dataclass(frozen=True)
class Case:
    name: str
    reason: str
    build: Callable[[], nn.Module]  # a fresh model, always the same weights
    batch: Callable[[], Batch]  # the batch, always the same

    def given_bytes(self) -> int:
        """Bytes of parameters, buffers and the batch: alive in every contender's step, whatever it does."""
        model, batch = self.build(), self.batch()
        tensors = [*model.parameters(), *model.buffers(), *batch.inputs.values(), batch.labels]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Class scores: [B, classes], or [B, T, vocabulary] for a language model."""
        output = model(**batch.inputs)
        return output if isinstance(output, Tensor) else output.logits


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make().train()

    return build


def _tokens(batch: int, length: int, classes: int) -> Callable[[], Batch]:
    def draw() -> Batch:
        words = torch.Generator().manual_seed(1)
        tokens = torch.randint(4, VOCABULARY, (batch, length), generator=words)
        if classes:
            return Batch({"input_ids": tokens}, torch.randint(0, classes, (batch,), generator=words))
        # Explicit positions: the default is one row for all samples, in which Opacus finds no batch dimension.
        positions = torch.arange(length).expand(batch, length).contiguous()
        return Batch({"input_ids": tokens, "position_ids": positions}, torch.roll(tokens, -1, dims=1))

    return draw


def _images(batch: int, side: int, classes: int) -> Callable[[], Batch]:
    def draw() -> Batch:
        light = torch.Generator().manual_seed(1)
        pixels = torch.randn(batch, 3, side, side, generator=light)
        return Batch({"x": pixels}, torch.randint(0, classes, (batch,), generator=light))

    return draw


def roberta_of(width: int, layers: int, positions: int) -> nn.Module:
    """RoBERTa with 4 heads and sentence classification (2 classes)."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return RobertaForSequenceClassification(config)


@_seeded
def roberta() -> nn.Module:
    """RoBERTa, 4 layers, hidden 256, 4 heads, sentence classification (2 classes)."""
    return roberta_of(256, 4, 514)


@_seeded
def gpt2() -> nn.Module:
    """GPT-2, 4 layers, width 256, 4 heads, next-token loss (its layers are transformers' Conv1D).

    The output matrix is not tied to the embedding: Opacus refuses tied weights, and a bias-only step is the same.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=256,
        n_embd=256,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config)


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(32, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(32, width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.GroupNorm(32, width))

    def forward(self, x: Tensor) -> Tensor:  # [B, width_in, H, W] -> [B, width, H/stride, W/stride]
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with GroupNorm(32) in place of BatchNorm: Opacus refuses BatchNorm, and all contenders must run the
    same network. The convolutions have no bias; a bias-only step trains every GroupNorm's bias and the classifier's."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(32, 64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths, blocks, width_in = (64, 128, 256, 512), [], 64
        for width, stride in zip(widths, (1, 2, 2, 2), strict=True):
            blocks += [BasicBlock(width_in, width, stride), BasicBlock(width, width, 1)]
            width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, classes]
        return self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))


@_seeded
def resnet18() -> nn.Module:
    return ResNet18(classes=100)


CASES = {
    case.name: case
    for case in (
        Case("roberta_b16_t128", "short text, the usual shape of GLUE tasks", roberta, _tokens(16, 128, 2)),
        Case("roberta_b8_t512", "long text: activations and attention weigh most", roberta, _tokens(8, 512, 2)),
        Case("resnet18_b4_224", "channels-first gradients with a large T (12,544)", resnet18, _images(4, 224, 100)),
        Case("gpt2_b8_t128", "Conv1D layers and a loss per token", gpt2, _tokens(8, 128, 0)),
    )
}
