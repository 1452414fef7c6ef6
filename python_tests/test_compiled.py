"""torch.compile: one graph without a break, compiled once, the sum fused with what precedes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat, small_model
from torch import nn

import dp_bitfit_kernels as dpk

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def roberta() -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config), torch.randint(4, 40, (6, 9))


def trained(compiled: dict[str, Any] | None, steps: int = 3) -> torch.Tensor:
    """The parameters after steps with seeded noise; every recompilation after the first step is an error."""
    model, tokens = roberta()
    labels = torch.arange(6) % 3
    dpk.convert_model(model, train_modules=("classifier*",))
    engine = dpk.PrivacyEngine(unsafe_deterministic_seed=2)
    engine, model, optimizer, _ = attach(model, tokens, labels, engine=engine, lr=0.1, sigma=0.1, bound=0.1)
    call = model if compiled is None else torch.compile(model, **compiled)
    for step in range(steps):
        with torch._dynamo.config.patch(error_on_recompile=step > 0), engine.batch(6):
            F.cross_entropy(call(input_ids=tokens).logits, labels).backward()
            assert optimizer.step()
    return flat(model)


@pytest.mark.parametrize(
    "options",
    [{"backend": "inductor"}, {"mode": "reduce-overhead"}],
    ids=lambda options: "-".join(options.values()),
)
def test_a_compiled_transformer_trains_as_the_eager_one(options: dict[str, Any]) -> None:
    torch.testing.assert_close(trained({"fullgraph": True, **options}), trained(None), rtol=1e-3, atol=1e-5)


def test_inductor_fuses_the_per_sample_sum_into_the_operation_before_it() -> None:
    from torch._inductor.utils import run_and_get_code

    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Tanh())
    dpk.convert_model(model)
    x = torch.randn(4, 32, 64)
    engine, model, optimizer, _ = attach(model, x, torch.zeros(4, dtype=torch.long), sigma=1.0)
    compiled = torch.compile(model, fullgraph=True)

    def step() -> None:
        with engine.batch(4):
            compiled(x).square().mean().backward()
            optimizer.step()

    _, sources = run_and_get_code(step)
    kernels = set(re.findall(r"cpp_fused_(\w+)", sources[-1]))
    assert any("gelu_backward" in name and "sum" in name for name in kernels), kernels
    assert any("layer_norm_backward" in name and "sum" in name for name in kernels), kernels
    assert "dp_bitfit_kernels" not in sources[-1]  # an op of ours would be a wall to the compiler


def test_a_compiled_model_in_a_captured_step() -> None:
    """Repeated, not recorded: the compiler does not work inside a recorder. On graphs: test_gpu_step.py."""
    outcomes = []
    x, y = torch.randn((40, 6), generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    for captured in (False, True):
        model = dpk.convert_model(small_model())
        engine, model, optimizer, loader = attach(
            model,
            x,
            y,
            batch=8,
            engine=dpk.PrivacyEngine(unsafe_deterministic_seed=3),
            lr=0.1,
            sigma=1.0,
            max_physical_batch_size=4,
            pad_physical_batches=True,
        )
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        step = dpk.capture_step(optimizer, lambda x, y, model=compiled: F.cross_entropy(model(x), y))
        for _ in range(4):
            for xs, ys in loader:
                if captured:
                    step(xs, ys)
                else:
                    F.cross_entropy(model(xs), ys).backward()
                    optimizer.step()
        assert step.captured == captured
        outcomes.append(flat(model))
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-6)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, 6]
        y: torch.Tensor = self.head(self.norm(torch.tanh(self.inner(x.transpose(0, 1))))).mean(0)
        return y


@pytest.mark.parametrize("make", [SequenceFirst, small_model])
def test_a_model_that_was_compiled_before_it_was_made_private(make: Any) -> None:
    """The proof of its layout runs it as it was written, so that no hook of the proof is compiled along."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = dpk.convert_model(make(), train_modules=("*",) if make is SequenceFirst else ())
        x, labels = torch.randn(6, 5, 6) if make is SequenceFirst else torch.randn(6, 6), torch.arange(6) % 3
        whole = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        _, private, optimizer, loader = attach(whole, x, labels, lr=0.1)
        for _ in range(3):
            for batch, own in loader:
                F.cross_entropy(private(batch), own).backward()
                assert optimizer.step()
        found.append(flat(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
