"""Whole models of transformers: plain autograd's gradients, per-sample rows, and how little is kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from attach import attach, names_of
from lean_cases import plain_twin
from test_layers import ledger_rows
from test_lean import kept_bytes
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels import few_bits, layers
from dp_bitfit_kernels.reference_backward import KINDS

transformers = pytest.importorskip("transformers")


class Logits(nn.Module):
    """One tensor in, one tensor out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state


def roberta(dropout: float = 0.0) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.RobertaConfig(
        vocab_size=50,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        **sizes,
    )
    return transformers.RobertaForSequenceClassification(config)


def gpt2(dropout: float = 0.0) -> nn.Module:
    config = transformers.GPT2Config(
        *(), n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=40, use_cache=False, bos_token_id=0,
        eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2Model(config)


def vit(dropout: float = 0.0) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0, **sizes
    )
    return transformers.ViTForImageClassification(config)


def resnet(dropout: float = 0.0) -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], num_labels=3)
    return transformers.ResNetForImageClassification(config)


def tokens() -> Tensor:
    return torch.randint(5, 50, (4, 24), generator=torch.Generator().manual_seed(1))


def images(side: int) -> Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))


# model, input, most that may be kept (exact, compact) of what plain autograd keeps; dropout 0.1 where there is some
MODELS: dict[str, tuple[Callable[[float], nn.Module], Callable[[], Tensor], float, float]] = {
    "roberta": (roberta, tokens, 0.84, 0.45),
    "gpt2": (gpt2, tokens, 0.40, 0.24),
    "vit": (vit, lambda: images(16), 1.0, 0.55),
    "resnet": (resnet, lambda: images(32), 1 / 12, 1 / 12),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def build(name: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = Logits(MODELS[name][0](dropout)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at 1 and 0, where much cancels
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    y = model(x)
    y.sin().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def relative(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    a, b = (torch.cat([grads[name].flatten() for name in sorted(want)]) for grads in (got, want))
    return float((a - b).norm() / b.norm())


@EVERY
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_gradients_of_plain_autograd(name: str, dropout: float) -> None:
    base, x = build(name, dropout), MODELS[name][1]()
    want_y, want = gradients(plain_twin(copy.deepcopy(base)), x)
    y, got = gradients(dpk.convert_model(copy.deepcopy(base)), x)
    torch.testing.assert_close(y, want_y, rtol=0.0, atol=0.0 if name != "gpt2" else 1e-5)  # gelu_new is folded
    assert got.keys() == want.keys() and relative(got, want) < 1e-5
    _, lossy = gradients(dpk.convert_model(copy.deepcopy(base), memory="compact"), x)
    error = relative(lossy, want)
    assert error < 0.15
    assert (error > 1e-4) == (name != "resnet")  # where nothing is lossy, compact is exact


@EVERY
def test_kept_bytes(name: str) -> None:
    base, x = build(name, 0.1), MODELS[name][1]()
    exact, compact = MODELS[name][2:]
    plain = kept_bytes(plain_twin(copy.deepcopy(base)), x)
    assert kept_bytes(dpk.convert_model(copy.deepcopy(base)), x) <= exact * plain
    assert kept_bytes(dpk.convert_model(copy.deepcopy(base), memory="compact"), x) <= compact * plain


@EVERY
def test_rows_equal_one_sample_autograd(name: str) -> None:
    model, x = dpk.convert_model(build(name)), MODELS[name][1]()
    want = oracle.rows(model, names_of(model), x, lambda y: y.sin().sum())
    attach(model, x, bound=1e9, loss_reduction="sum", sample_rate=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x).sin().sum().backward()
    assert float((ledger_rows(model).double() - want).norm() / want.norm()) < 1e-5


@EVERY
@pytest.mark.parametrize("memory", ["exact", "compact"])
def test_one_sample_moves_a_release_by_no_more_than_the_bound(name: str, memory: str) -> None:
    """Whatever gradient is computed: the sum with a sample and without it differ by at most R."""
    x, bound, releases = MODELS[name][1](), 0.05, []
    for count in (3, 4):
        model = dpk.convert_model(build(name), memory=memory)
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        _, module, optimizer, _ = attach(model, x, bound=bound, sample_rate=0.5, expected_batch_size=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (1e3 * module(x[:count]).sin().sum() / count).backward()
        optimizer.step()
        after = [p.detach() for p in model.parameters() if p.requires_grad]
        releases.append([a - b for a, b in zip(after, before, strict=True)])
    moved = torch.cat([(a - b).flatten() for a, b in zip(*releases, strict=True)]).norm()
    assert 0.5 * bound < moved <= bound * (1 + 1e-4)


@pytest.mark.parametrize(
    ("spelling", "kind"),
    [
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("silu", "silu"),
        ("swish", "silu"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_in_all_spellings(spelling: str, kind: str, dtype: torch.dtype) -> None:
    from transformers.activations import ACT2FN

    module = ACT2FN[spelling]
    x = (3.0 * torch.randn(64, 48, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()
    y = module(x)
    (want,) = torch.autograd.grad(y.sin().sum(), x)
    plain = kept_bytes(module, x)
    model = dpk.convert_model(nn.Sequential(nn.Linear(48, 48), module))
    assert layers.is_converted(module)
    assert module.formula()[0] == KINDS.index(kind)
    got_y = module(x)
    (got,) = torch.autograd.grad(got_y.sin().sum(), x)
    spelled = plain > x.numel() * x.element_size()
    if (spelling, dtype) == ("gelu_fast", torch.float64):  # its constant has ten digits: another function in float64
        assert torch.equal(got_y, y)
        assert torch.equal(got, want)
        return
    # transformers' own constants have ten digits
    ulp = max(torch.finfo(dtype).eps, 1e-10) * torch.maximum(x.detach().abs(), y.detach().abs())
    if spelled:
        assert bool(((got_y - y).abs() <= (2 if dtype != torch.bfloat16 else 4) * ulp).all())
    else:
        assert torch.equal(got_y, y) and torch.equal(got, want)
    exact_y = module.converted_from.forward(module, x.detach().double().requires_grad_())
    assert exact_y.dtype == torch.float64
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-6, torch.bfloat16: 0.06}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    allowed = {torch.float32: 0.75 if spelled else 1.0}.get(dtype, 1.0) * x.numel() * x.element_size()
    assert kept_bytes(module, x) <= allowed
    dpk.restore_model(model)


def test_few_bit_tables_are_the_best_there_are() -> None:
    bench = pytest.importorskip("bench.few_bit_tables")
    assert set(bench.NAMES) == set(few_bits.EDGES) == set(few_bits.LEVELS)
    for name in bench.NAMES:
        edges, levels, error = bench.best_pieces(name)
        assert few_bits.EDGES[name] == pytest.approx(edges, abs=1e-3)
        assert few_bits.LEVELS[name] == pytest.approx(levels, abs=1e-6)
        assert error**0.5 < 0.063


def test_nothing_of_the_image_example_is_lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen BatchNorm, ReLU and convolutions have exact forms alone: compact trains it to the same bits."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    resnet20 = pytest.importorskip("resnet20")
    torch.manual_seed(0)
    base, x = resnet20.ResNet(3, 10).train(), torch.randn(4, 3, 32, 32)
    (exact_y, exact), (y, compact) = (
        gradients(dpk.convert_model(copy.deepcopy(base), memory=memory), x) for memory in ("exact", "compact")
    )
    assert torch.equal(y, exact_y) and all(torch.equal(compact[name], exact[name]) for name in exact)


def test_an_activation_that_all_models_share_is_left_alone() -> None:
    from transformers import activations

    shared = nn.Sequential(nn.Linear(3, 3), activations.gelu)
    for model in (shared, nn.Sequential(nn.Linear(3, 3), activations.gelu)):
        dpk.convert_model(model)
    assert type(activations.gelu).__module__ == "transformers.activations"
