"""Modules run on each sample by itself: what vmap, shared layers, names and side channels could make wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from alone import TOKENS, Raw, alone_in, around, loss
from attach import attach
from layouts import WIDTH
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._validate import ConversionError, UnsupportedModuleError
from dp_bitfit_kernels.scan import scan


def scaled_by_hook(self: Any, x: Tensor) -> Tensor:
    h = self.lin(x) + self.q_bias
    if h.requires_grad:
        h.register_hook(lambda grad: grad * 0.1)
    return h


class Tenth(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.1 * grad


def scaled_by_function(self: Any, x: Tensor) -> Tensor:
    h = self.lin(x) + self.q_bias
    return Tenth.apply(h) if x.requires_grad else h


def checkpointed(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda x: torch.tanh(self.lin(x) + self.q_bias), x, use_reentrant=False)


def scaled_in_training(self: Any, x: Tensor) -> Tensor:
    return scaled_by_hook(self, x) if self.training else self.lin(x) + self.q_bias


@pytest.mark.parametrize("run", [scaled_by_hook, scaled_by_function, checkpointed, scaled_in_training])
def test_what_vmap_takes_another_way_through_goes_one_by_one(run: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = dpk.convert_model(around(run)), torch.randn(4, *TOKENS)
    assert dpk.check_model(model, x, loss).worst < 1e-5
    _, model, optimizer, _ = attach(model.train(), x, poisson_sampling=False)
    loss(model, x).backward()
    assert optimizer.step()
    assert not any(call.at_once for alone in alone_in(model) for call in alone.calls)


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"scale_grad_by_freq": True}], ids=str)
def test_options_of_embeddings_are_kept(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, WIDTH, **options), nn.Linear(WIDTH, 3))
    ids = torch.tensor([[0, 3, 3, 0, 1], [2, 0, 0, 0, 4], [5, 5, 5, 6, 0]])
    dpk.convert_model(model, train_modules=("0",))
    assert dpk.check_model(model, ids, loss).worst < 1e-5


def test_an_embedding_that_scales_itself_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, WIDTH, max_norm=1.0), nn.Linear(WIDTH, 3))
    with pytest.raises(UnsupportedModuleError, match="max_norm"):
        dpk.convert_model(model, train_modules=("0",))


class Sub(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.l, self.q_bias = shared, nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x.reshape(-1, WIDTH)).view_as(x) + self.q_bias


class SharedLayer(nn.Module):
    """A layer called in a module that is run one sample at a time, and outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
        self.s, self.o = Sub(self.l), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.s(self.l(x)).tanh())


@pytest.mark.parametrize("batch", [4, 8])
def test_a_layer_shared_between_a_host_and_what_is_outside(batch: int) -> None:
    torch.manual_seed(0)
    model, x = SharedLayer(), torch.randn(batch, 8, WIDTH)  # T = B: the rows of one sample look like a batch
    dpk.convert_model(model, biases=("l.bias", "s.q_bias"))
    assert dpk.conversion_report(model).one_by_one == {"": "SharedLayer"}
    assert dpk.check_model(model, x, loss).worst < 1e-5
    _, model, optimizer, _ = attach(model, x, poisson_sampling=False, lr=1.0)
    moved = []
    for first in (0.0, 100.0):
        before = torch.cat([p.detach().clone().flatten() for p in (model.l.bias, model.s.q_bias)])
        weights = torch.full((batch,), 1e-3)
        weights[0] = first
        (model(x).sum((1, 2)) * weights).mean().backward()
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in (model.l.bias, model.s.q_bias)])
        moved.append(before - after)
        with torch.no_grad():
            for p, value in zip((model.l.bias, model.s.q_bias), before.split(WIDTH), strict=True):
                p.copy_(value)
    assert (moved[0] - moved[1]).norm() * batch <= 1.0 + 1e-4  # the bound, over the expected batch size


TAKEN = ["kind", "lean", "memory", "backend", "whole", "tap", "target", "mapped", "calls", "cuts"]


@pytest.mark.parametrize("name", TAKEN)
def test_attributes_of_the_users_keep_their_meaning(name: str) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        own = getattr(self, name)
        return torch.tanh(self.lin(x) + self.q_bias) if own == "tanh" else self.lin(x) + self.q_bias

    by_class = type("Named", (Raw,), {name: "tanh"})
    x = torch.randn(4, *TOKENS)
    for make in (lambda: Raw(run, **{name: "tanh"}), lambda: by_class(run)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), nn.Linear(WIDTH, 3))
        expected = model(x).detach()
        dpk.convert_model(model)
        assert torch.equal(model(x), expected)
        assert dpk.check_model(model, x, loss).worst < 1e-5
        with torch.no_grad():
            assert torch.equal(model(x), expected)


def test_a_layer_with_names_of_ours_is_left_as_it_is() -> None:
    class Kind(nn.Linear):
        kind = "tanh"

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x)) if self.kind == "tanh" else super().forward(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Kind(WIDTH, WIDTH), nn.Linear(WIDTH, 3)), torch.randn(4, *TOKENS)
    expected = model(x).detach()
    dpk.convert_model(model)
    assert torch.equal(model(x), expected)
    assert dpk.check_model(model, x, loss).worst < 1e-5


def test_a_plain_layer_with_a_name_of_ours_is_warned_of() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)), torch.randn(4, *TOKENS)
    model[0].kind = "head"
    with pytest.warns(UserWarning, match=r"0: it has attributes of its own .*: kind\. So the whole model is run one"):
        dpk.convert_model(model)
    assert model[0].kind == "head"
    assert dpk.check_model(model, x, loss).worst < 1e-5


class Merges(Raw):
    """Like LoRA layers that add their product to the frozen weight when evaluation begins."""

    def train(self, mode: bool = True) -> Merges:
        if mode != self.training:
            with torch.no_grad():
                self.lin.weight.add_(-1.0 if mode else 1.0)
        return super().train(mode)


def test_proofs_merge_no_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Merges(lambda self, x: torch.tanh(self.lin(x) + self.q_bias)), nn.Linear(WIDTH, 3))
    x, before = torch.randn(4, *TOKENS), model[0].lin.weight.clone()
    dpk.convert_model(model, sample_batch=x)
    assert torch.equal(model[0].lin.weight, before)
    _, model, optimizer, _ = attach(model, x, poisson_sampling=False)
    loss(model, x).backward()
    assert optimizer.step()
    assert torch.equal(model[0].lin.weight, before)


def test_inputs_changed_in_place_are_served() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Raw(self.run), nn.Linear(WIDTH, 3)

        @staticmethod
        def run(inner: Any, x: Tensor) -> Tensor:
            x += inner.q_bias
            return x

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            return self.out(y + self.inner(y))

    torch.manual_seed(0)
    model, x = dpk.convert_model(Residual()), torch.randn(4, *TOKENS)
    assert dpk.check_model(model, x, loss).worst < 1e-5


def test_models_whose_evaluation_is_another_are_served() -> None:
    class Trains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Raw(self.run)

        @staticmethod
        def run(inner: Any, x: Tensor) -> Tensor:
            inner.last_shape = x.shape
            return torch.tanh(inner.lin(x) + inner.q_bias)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise ValueError("for training only")
            return self.inner(x)

    torch.manual_seed(0)
    x = torch.randn(4, *TOKENS)
    _, model, optimizer, _ = attach(dpk.convert_model(Trains()).train(), x, poisson_sampling=False)
    loss(model, x).backward()
    assert optimizer.step()


class Grows(Raw):
    """Makes its buffer anew for a longer input."""

    def __init__(self) -> None:
        super().__init__(lambda self, x: x)
        self.register_buffer("mask", torch.ones(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        if self.mask.shape[1] < x.shape[1]:
            self.mask = x.new_ones(1, x.shape[1])
        return torch.tanh(self.lin(x) + self.q_bias) * self.mask[0, : x.shape[1], None]


def turns_away(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] > 5 and bool((x.abs() >= 0).all()):
        return torch.relu(self.lin(x) + self.q_bias)
    return torch.tanh(self.lin(x) + self.q_bias)


@pytest.mark.parametrize("make", [Grows, lambda: Raw(turns_away)], ids=["buffer", "branch"])
def test_a_later_batch_where_vmap_cannot_go(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), nn.Linear(WIDTH, 3))
    twin = copy.deepcopy(model)
    x = torch.randn(4, *TOKENS)
    _, model, optimizer, _ = attach(dpk.convert_model(model), x, poisson_sampling=False, bound=10.0)
    for _ in range(2):
        loss(model, x).backward()
        optimizer.step()
    assert alone_in(model)[0].calls[0].at_once
    twin.load_state_dict(model.state_dict())
    longer = torch.randn(4, 7, WIDTH)
    loss(model, longer).backward()
    assert not alone_in(model)[0].calls[0].at_once
    before = model[1].q_bias.detach().clone()
    optimizer.step()
    (grad,) = torch.autograd.grad(loss(twin, longer), twin[1].q_bias)
    torch.testing.assert_close(before - model[1].q_bias.detach(), grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        model(longer)
    assert all(type(value.clone()) is Tensor for value in model.state_dict().values())
    assert list(model.state_dict()) == list(twin.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_in_half_precision(kind: type[nn.Module], dtype: torch.dtype) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kind(64, 64, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    torch.manual_seed(0)
    model, x = dpk.convert_model(Last().to(dtype)), torch.randn(4, 20, 64, dtype=dtype)
    _, model, optimizer, _ = attach(model, x, poisson_sampling=False)
    loss(model, x).backward()
    assert optimizer.step()


def test_a_model_of_transformers_keeps_what_it_gives() -> None:
    """What classes record is kept under their names."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    config.output_hidden_states = True
    torch.manual_seed(0)
    model = transformers.T5ForTokenClassification(config).eval()
    batch = {"input_ids": torch.randint(3, 60, (4, 7))}
    given = list(model(**batch))
    chosen = ("*relative_attention_bias.weight", "classifier.bias")
    dpk.convert_model(model, sample_batch=batch, biases=chosen)
    assert dpk.conversion_report(model).one_by_one == {"transformer.encoder": "T5Stack"}
    assert list(model(**batch)) == given
    assert type(model.transformer.encoder).__name__ == "T5Stack"


def test_key_biases_of_an_attention_of_ones_own_are_not_left_out() -> None:
    class Linear(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return self.out_proj(q @ (k.transpose(1, 2) @ v))

    torch.manual_seed(0)
    model, x = nn.Sequential(Linear(WIDTH, 2, batch_first=True)), torch.randn(4, *TOKENS)
    dpk.convert_model(model, biases="informative")
    assert not dpk.conversion_report(model).partly
    assert dpk.check_model(model, x, loss).worst < 1e-5


def test_scan_says_why_a_model_cannot_be_built() -> None:
    with pytest.raises(ConversionError, match=r"cannot be built.*wrong"):
        scan("test_alone_attacks:Broken")


class Broken(nn.Module):
    def __init__(self) -> None:
        raise RuntimeError("wrong")
