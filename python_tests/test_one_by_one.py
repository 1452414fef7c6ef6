"""Parameters that no layer's rule covers: their modules run one sample at a time, and give the samples' own rows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from layouts import WIDTH
from networks import OwnForward, accounted, same, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._validate import BatchLayoutError, UnsupportedModuleError


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


IN_ONE_FORWARD = {
    name for name in CASES if name.startswith(("attention", "transformer", "trans", "bilinear", "instance"))
}
IN_ONE_FORWARD |= {"weight norm"}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    weights = torch.linspace(-1.0, 1.0, y[0].numel()).view(y.shape[1:])
    return (y * weights).flatten(1).mean(1).sin().mean()


def biases(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if "bias" in name.rsplit(".", 1)[-1] and p.requires_grad}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_samples(name: str) -> None:
    make, shape, cls = CASES[name]
    torch.manual_seed(0)
    model = make()
    x = torch.randn(4, *shape)
    names, before = biases(model), snapshot(model)
    expected = model(x).detach()
    dpk.convert_model(model, sample_batch=x)
    accounted(model)
    report = dpk.conversion_report(model)
    assert set(report.trained) == names
    assert (cls in report.one_by_one.values()) == (name not in IN_ONE_FORWARD)
    torch.testing.assert_close(model(x), expected)  # without an engine nothing is run in another way
    check = dpk.check_model(model, x, loss)
    assert check.worst < 1e-5
    assert check.silent == ()
    dpk.restore_model(model)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", ["query bias", "experts", "lstm", "attention, sequence first", "transformer layer"])
def test_a_private_run_trains_them(name: str) -> None:
    make, shape, _ = CASES[name]
    torch.manual_seed(0)
    model = make()
    x = torch.randn(8, *shape)
    dpk.convert_model(model, sample_batch=x[:4])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    twin = dpk.restore_model(copy.deepcopy(model)).eval()
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    engine = dpk.PrivacyEngine()
    model, optimizer, _ = engine.make_private(
        module=model.eval(),
        optimizer=optimizer,
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=10.0,
        poisson_sampling=False,
    )
    loss(model, x).backward()
    assert all(p.grad is None for p in trained.values())
    assert optimizer.step()
    wanted = [dict(twin.named_parameters())[n].requires_grad_() for n in trained]
    for (n, p), grad in zip(trained.items(), torch.autograd.grad(loss(twin, x), wanted), strict=True):
        torch.testing.assert_close(before[n] - p.detach(), grad, rtol=1e-4, atol=1e-5, msg=n)


def test_a_whole_head_of_any_kind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh(), nn.Conv1d(5, 3, 2))
    dpk.convert_model(model, train_modules=("1", "3"))
    assert {"1.weight", "3.weight"} <= set(dpk.conversion_report(model).trained)
    assert dpk.check_model(model, torch.randn(4, *TOKENS), loss).worst < 1e-5


def test_a_cache_is_refused_by_name() -> None:
    class Cache:
        pass

    class Caching(QueryBias):
        def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
            return super().forward(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Caching()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, cache=Cache())

    with pytest.raises(BatchLayoutError, match="'inner' is run one sample at a time, but takes or gives a Cache"):
        dpk.check_model(dpk.convert_model(Outer()), torch.randn(4, *TOKENS), loss)


def test_samples_that_mix_are_refused() -> None:
    class Mixing(QueryBias):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    with pytest.raises(BatchLayoutError, match="one sample at a time"):
        dpk.check_model(dpk.convert_model(Mixing()), torch.randn(4, *TOKENS), loss)
    with pytest.raises(UnsupportedModuleError, match="Mixing"):
        dpk.convert_model(Mixing(), sample_batch=torch.randn(4, *TOKENS))


def test_an_unproven_batch_is_refused() -> None:
    model = dpk.convert_model(QueryBias())
    engine = dpk.PrivacyEngine()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, *TOKENS)), batch_size=4)
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
    )
    with engine.batch(2), pytest.warns(UserWarning), pytest.raises(BatchLayoutError, match="has not seen it"):
        model(torch.randn(4, *TOKENS))


def test_copies_and_pickles() -> None:
    import pickle

    torch.manual_seed(0)
    model = dpk.convert_model(CASES["lstm"][0]())
    x = torch.randn(4, *TOKENS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert dpk.conversion_report(twin).one_by_one == {"inner": "LSTM"}
        torch.testing.assert_close(twin(x), model(x), rtol=0.0, atol=0.0)
        assert dpk.check_model(twin, x, loss).worst < 1e-5
        assert type(dpk.restore_model(twin).inner) is nn.LSTM


def test_packed_sequences_inside_a_module() -> None:
    """The module that packs is run one sample at a time: what it packs holds the samples in no way that is known."""

    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(WIDTH, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.inner(packed)[1][0].transpose(0, 1)

    torch.manual_seed(0)
    batch = {"x": torch.randn(4, *TOKENS), "lengths": torch.tensor([5, 2, 3, 1])}

    def of(model: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return model(**b).square().mean((1, 2)).sin().mean()

    with pytest.raises(BatchLayoutError, match="'inner'"):
        dpk.check_model(dpk.convert_model(Packing()), batch, of)
    model = dpk.convert_model(Packing(), sample_batch=batch)
    assert dpk.conversion_report(model).one_by_one == {"": "Packing"}
    assert dpk.check_model(model, batch, of).worst < 1e-5


def test_a_call_of_another_form_is_refused() -> None:
    """A tensor that one call shares between samples may hold the samples in another: nothing is guessed."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_bias = nn.Parameter(torch.randn(WIDTH))

        def forward(self, x: Tensor, shared: Tensor | None = None, own: Tensor | None = None) -> Tensor:
            y = x + self.q_bias
            return torch.tanh(y * (shared if shared is not None else own))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.later = Mixed(), False

        def forward(self, x: Tensor) -> Tensor:
            if self.later:
                return self.inner(x, own=x)
            return self.inner(x, shared=torch.ones(1, 1, WIDTH))

    from attach import attach

    torch.manual_seed(0)
    model, x = dpk.convert_model(Outer()), torch.randn(4, *TOKENS)
    _, model, optimizer, _ = attach(model, x, poisson_sampling=False)
    for _ in range(2):  # the second batch is asked again, the third is not
        loss(model, x).backward()
        assert optimizer.step()
    model.later = True
    with pytest.raises(BatchLayoutError, match="in this way"):
        loss(model, x)


class Lengths(nn.Module):
    """Pools by lengths that are Python numbers: what a sample alone is given is the list of all."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        return torch.stack([(h[:n] + self.bias).tanh().mean(0) for h, n in zip(x, lengths, strict=False)])


class IntoItsArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, state: dict[str, Tensor]) -> None:
        state["x"] = (state["x"] + self.bias).tanh()


class Stash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.gate = nn.Parameter(torch.randn(WIDTH)), None

    def forward(self, x: Tensor) -> Tensor:
        self.gate = torch.sigmoid(x + self.bias)
        return x


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.mask = inner, None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, Lengths):
            return self.inner(x, (1 + torch.arange(len(x)) % x.shape[1]).tolist())
        if isinstance(self.inner, IntoItsArgument):
            state = {"x": x}
            self.inner(state)
            return state["x"].mean(1)
        return self.inner(x).mean(1) * self.inner.gate.mean(1)


@pytest.mark.parametrize("inner", [Lengths, IntoItsArgument, Stash])
def test_what_passes_by_other_ways_than_tensors_is_refused(inner: type[nn.Module]) -> None:
    from attach import attach

    torch.manual_seed(0)
    x = torch.randn(4, *TOKENS)
    _, model, _, _ = attach(dpk.convert_model(Around(inner())), x, poisson_sampling=False)
    with pytest.raises(BatchLayoutError, match="'inner'"):
        loss(model, x)
