"""Converted layers: outputs of the original, ordinary gradients without an engine, exact rows with one."""

from __future__ import annotations

import copy
import pickle
import warnings

import oracle
import pytest
import torch
from attach import attach, names_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import dp_bitfit_kernels as dpk

# layer, shape of one sample, why it is here
CASES = {
    "linear_2d": (lambda: nn.Linear(5, 4), (5,), "T = 1"),
    "linear_3d": (lambda: nn.Linear(5, 4), (12, 5), "tokens"),
    "linear_4d": (lambda: nn.Linear(5, 4), (2, 3, 5), "windows kept apart"),
    "linear_5d": (lambda: nn.Linear(5, 4), (2, 3, 2, 5), "more than four dimensions"),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (3, 9), "channels first, one position axis"),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 5), "channels first"),
    "conv2d_square": (lambda: nn.Conv2d(5, 5, 1), (5, 5, 5), "channels equal height and width"),
    "conv2d_circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 5), "padded outside"),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3), "three position axes"),
    "layernorm": (lambda: nn.LayerNorm(6), (7, 6), "features last"),
    "layernorm_nd": (lambda: nn.LayerNorm((3, 6)), (2, 3, 6), "a bias of two dimensions"),
    "groupnorm": (lambda: nn.GroupNorm(2, 6), (6, 3, 3), "channels first"),
    "batchnorm1d": (lambda: nn.BatchNorm1d(6), (6,), "statistics frozen, T = 1"),
    "batchnorm1d_3d": (lambda: nn.BatchNorm1d(6), (6, 4), "statistics frozen, tokens last"),
    "batchnorm2d": (lambda: nn.BatchNorm2d(6), (6, 3, 3), "statistics frozen"),
    "batchnorm3d": (lambda: nn.BatchNorm3d(4), (4, 2, 3, 2), "statistics frozen"),
}


def make(case: str, dtype=torch.float32) -> tuple[nn.Module, torch.Tensor]:
    build, shape, _ = CASES[case]
    torch.manual_seed(0)
    layer = build()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        for b in layer.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 2.0)
    return nn.Sequential(layer, nn.Tanh()).to(dtype), torch.randn(4, *shape, dtype=dtype)


def summed(model, x):
    """An engine whose one draw holds all of x, with a summed loss and a bound that clips nothing."""
    return attach(model, x, bound=1e9, loss_reduction="sum", sample_rate=1.0)


def ledger_rows(model):
    return next(m for m in model.modules() if isinstance(m, dpk.layers.BiasLayer)).attachment._slab.rows


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_originals(case):
    model, x = make(case)
    want = copy.deepcopy(model).eval()(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    got = dpk.convert_model(model).train()(x)
    assert torch.equal(got, want)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())  # running statistics untouched


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_without_engine(case):
    model, x = make(case, torch.float64)
    dpk.convert_model(model)
    bias = next(p for p in model.parameters() if p.requires_grad)

    def run(x, b):
        return torch.func.functional_call(model, {names_of(model)[0]: b}, (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), bias.detach().requires_grad_()))
    model(x.detach()).square().sum().backward()
    got = bias.grad
    twin = oracle.plain_copy(model)
    twin(x.detach()).square().sum().backward()
    torch.testing.assert_close(got, dict(twin.named_parameters())[names_of(model)[0]].grad)


@pytest.mark.parametrize("case", CASES)
def test_rows_equal_one_sample_autograd(case):
    model, x = make(case)
    dpk.convert_model(model)
    summed(model, x)
    want = oracle.rows(model, names_of(model), x, lambda o: o.square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x).square().sum().backward()
    torch.testing.assert_close(ledger_rows(model).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_gradient_strides(case, layout):
    model, x = make(case)
    dpk.convert_model(model)
    if layout == "channels_last":
        if x.dim() != 4:
            pytest.skip("channels_last is a layout of four dimensions")
        x = x.to(memory_format=torch.channels_last)
    summed(model, x)

    def loss(o):
        if layout == "expanded":
            return o.sum()
        if layout == "transposed":
            return (o.transpose(1, -1).contiguous() ** 2).sum()
        return (o**2).sum()

    want = oracle.rows(model, names_of(model), x, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss(model(x)).backward()
    torch.testing.assert_close(ledger_rows(model).double(), want, rtol=1e-5, atol=1e-5)


class Reuse(nn.Module):
    """One layer called three times, a tied bias, a layer never called, a head defined before the body."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 3)
        self.b.bias = self.a.bias
        self.again = self.a

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.a(x))
        return self.head(torch.tanh(self.b(self.again(x))))


@pytest.mark.parametrize("shape", [(4,), (5, 4)])
def test_reuse_and_ties(shape):
    torch.manual_seed(0)
    model, x = Reuse(), torch.randn(6, *shape)
    dpk.convert_model(model)
    summed(model, x)
    want = oracle.rows(model, names_of(model), x, lambda o: o.square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x).square().sum().backward()
    torch.testing.assert_close(ledger_rows(model).double(), want, rtol=1e-5, atol=1e-5)
    assert (want[:, -3:] == 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), nn.Linear(4, 2)
    )
    x = torch.randn(5, 3, 4)
    dpk.convert_model(model)
    summed(model, x)
    want = oracle.rows(model, names_of(model), x, lambda o: o.square().sum())

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, h):
            return checkpoint(self.inner, h, use_reentrant=reentrant)

    model[1] = Checkpointed(model[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x).square().sum().backward()
    torch.testing.assert_close(ledger_rows(model).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["linear_3d", "conv2d", "layernorm", "groupnorm", "batchnorm2d"])
def test_autocast_with_backward_outside(case, dtype):
    model, x = make(case)
    dpk.convert_model(model)
    summed(model, x)
    want = oracle.rows(model, names_of(model), x, lambda o: o.square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast("cpu", dtype=dtype):
            loss = model(x).float().square().sum()
        loss.backward()
    rows = ledger_rows(model)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), want, rtol=0.05, atol=0.05 * want.abs().max().item())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.GroupNorm(2, 4),
        nn.Flatten(2),
        nn.Linear(9, 5),
        nn.LayerNorm(5),
    )
    x = torch.randn(4, 2, 5, 5)
    dpk.convert_model(model)
    engine, *_ = summed(model, x)
    want = oracle.rows(model, names_of(model), x, lambda o: o.square().sum())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with engine.batch(4):
            compiled(x).square().sum().backward()
    torch.testing.assert_close(ledger_rows(model).double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7])
def test_head_trained_whole(tokens):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, tokens, 4)
    x = x[:, 0] if tokens == 1 else x
    dpk.convert_model(model, train_modules=("2",))
    assert names_of(model) == ["0.bias", "2.weight", "2.bias"]
    summed(model, x)
    want = oracle.rows(model, names_of(model), x, lambda o: o.square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x).square().sum().backward()
    torch.testing.assert_close(ledger_rows(model).double(), want, rtol=1e-5, atol=1e-5)


def test_copies_are_plain_and_pickle():
    model, x = make("conv2d")
    dpk.convert_model(model)
    summed(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model.eval()(x.clone()).detach()) if not torch.is_grad_enabled() else True
        twin(x).sum().backward()  # an ordinary gradient: no engine came along
        assert twin[0].bias.grad is not None
        assert type(dpk.restore_model(twin)[0]) is nn.Conv2d
