"""Small models with biases that no layer's rule covers: stand-ins for the families named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layouts import WIDTH
from networks import OwnForward
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dp_bitfit_kernels.layers.one_by_one import OneByOneLayer


class QueryBias(nn.Module):
    """BEiT, EVA, SwinV2: biases of query and value beside one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(WIDTH)) for _ in range(2))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Experts(nn.Module):
    """gpt-oss: biases [E, C], tokens routed by what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.weights = nn.Parameter(torch.randn(3, WIDTH, WIDTH))
        self.up_proj_bias = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        scores, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for expert in range(3):
            tokens = (chosen == expert).nonzero().flatten()
            out[tokens] = torch.tanh(flat[tokens] @ self.weights[expert] + self.up_proj_bias[expert])
        return (out * scores.unsqueeze(-1)).view_as(x)


class RoutedLinears(nn.Module):
    """Experts that are layers: called on a part of the tokens of all samples, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        chosen = flat[:, :3].argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens = (chosen == number).nonzero().flatten()
            if len(tokens):
                out[tokens] = torch.tanh(expert(flat[tokens]))
        return out.view_as(x)


class PositionTable(nn.Module):
    """SwinV2: an MLP of relative positions, without a batch, gives what is added to the attention of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.randn(1, 5, 5, 2))
        self.table = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # [B, 5, C]
        bias = self.table(self.positions).view(-1, 1)[torch.arange(25)].view(5, 5)
        return (x @ x.transpose(1, 2) + bias).softmax(-1) @ self.value(x)


class Scaled(nn.Module):
    """A norm with shift and scale of its own, channels first; a second dimension that is not one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(1, 4, 1)), nn.Parameter(torch.rand(1, 4, 1))

    def forward(self, x: Tensor) -> Tensor:  # [B, 4, T]
        return self.weight * x / (x.norm(dim=1, keepdim=True) + 1e-3) + self.bias


class Attention(nn.Module):
    """nn.MultiheadAttention on [B, T, C], with all that it can be given."""

    def __init__(self, cross: bool = False, **options: bool) -> None:
        super().__init__()
        self.cross = cross
        self.inner = nn.MultiheadAttention(WIDTH, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        first = self.inner.batch_first
        own = x if first else x.transpose(0, 1)
        other = own.flip(1 if first else 0)[..., :].tanh() if self.cross else own
        mask = torch.zeros(x.shape[1], x.shape[1]).triu(1) - 1.0
        y = self.inner(own, other, other, attn_mask=mask, need_weights=False)[0]
        return y if first else y.transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: bool) -> None:
        super().__init__()
        self.inner = kind(WIDTH, 4, num_layers=2, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x if self.inner.batch_first else x.transpose(0, 1))[0]
        return y if self.inner.batch_first else y.transpose(0, 1)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(-1).contiguous())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.before, self.inner, self.reentrant = nn.Linear(WIDTH, WIDTH), QueryBias(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, self.before(x), use_reentrant=self.reentrant)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = QueryBias()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


def tied() -> nn.Module:
    model = nn.Sequential(QueryBias(), nn.Tanh(), QueryBias(), nn.Linear(WIDTH, WIDTH))
    model[2].q_bias = model[0].q_bias
    model[3].bias = model[0].v_bias
    return model


TOKENS = (5, WIDTH)
# model, shape of a sample, class that is run one sample at a time
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "query bias": (QueryBias, TOKENS, "QueryBias"),
    "twice": (Twice, TOKENS, "QueryBias"),
    "checkpointed": (lambda: Checkpointed(False), TOKENS, "QueryBias"),
    "checkpointed, reentrant": (lambda: Checkpointed(True), TOKENS, "QueryBias"),
    "experts": (Experts, TOKENS, "Experts"),
    "routed linears": (RoutedLinears, TOKENS, "RoutedLinears"),
    "position table": (PositionTable, TOKENS, "PositionTable"),
    "scaled": (Scaled, (4, 7), "Scaled"),
    "own forward": (lambda: nn.Sequential(OwnForward(WIDTH, 3), nn.Tanh()), TOKENS, "OwnForward"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 3)), nn.Tanh()),
        TOKENS,
        "ParametrizedLinear",
    ),
    "attention": (lambda: Attention(batch_first=True), TOKENS, "MultiheadAttention"),
    "attention, sequence first": (Attention, TOKENS, "MultiheadAttention"),
    "attention, bias_k and bias_v": (lambda: Attention(add_bias_kv=True), TOKENS, "MultiheadAttention"),
    "attention, cross": (lambda: Attention(cross=True, batch_first=True), TOKENS, "MultiheadAttention"),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), TOKENS, "LSTM"),
    "lstm, sequence first, both ways": (lambda: Recurrent(nn.LSTM, bidirectional=True), TOKENS, "LSTM"),
    "gru": (lambda: Recurrent(nn.GRU, batch_first=True), TOKENS, "GRU"),
    "rnn": (lambda: Recurrent(nn.RNN), TOKENS, "RNN"),
    "bilinear": (Pair, TOKENS, "Bilinear"),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True),
        TOKENS,
        "MultiheadAttention",
    ),
    "transformer, sequence first inside": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True, norm_first=True),
        TOKENS,
        "MultiheadAttention",
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 3, 3, stride=2), nn.Tanh()),
        (4, 7),
        "ConvTranspose1d",
    ),
    "instance norm": (lambda: nn.Sequential(nn.InstanceNorm1d(4, affine=True), nn.Tanh()), (4, 7), "InstanceNorm1d"),
    "tied": (tied, TOKENS, "Sequential"),
}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    weights = torch.linspace(-1.0, 1.0, y[0].numel()).view(y.shape[1:])
    return (y * weights).flatten(1).mean(1).sin().mean()


class Raw(nn.Module):
    """A module with a bias that no layer's rule covers, and this forward."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **own: Any) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH, bias=False)
        self.q_bias = nn.Parameter(torch.randn(WIDTH))
        self.run = run
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def around(run: Callable[[Any, Tensor], Any], **own: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Raw(run, **own), nn.Linear(WIDTH, 3))


def alone_in(model: nn.Module) -> list[OneByOneLayer]:
    return [module for module in model.modules() if isinstance(module, OneByOneLayer)]
