"""Trained weights, and what is refused: each by an error that names it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attach import attach, flat
from captured import PADDED
from torch import Tensor, nn
from weight_cases import CASES, NORMS, Sequence, Tied, Twice, trained

import dp_bitfit_kernels as dpk

pytestmark = pytest.mark.usefixtures("no_rows")

TOKENS = torch.tensor([[0, 1, 2], [3, 4, 5]])


def embedding(**options: object) -> nn.Module:
    return Sequence(nn.Linear(4, 4), 4, nn.Embedding(6, 4, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name, value", [("per_sample_norm", "ghosts"), ("clipped_sum", "third_backward")])
def test_unknown_options(name, value):
    with pytest.raises(dpk.EngineError, match=f"{name}='{value}': choose"):
        trained(Twice(), torch.randn(2, 3, 6), **{name: value})


@pytest.mark.parametrize("wrong", [6, -1])
def test_token_numbers_out_of_range(wrong):
    engine, model, optimizer, _ = trained(embedding(), TOKENS)
    before = flat(model)
    with pytest.raises(dpk.BatchLayoutError, match=r"outside of 0 to 5|fails on"), engine.batch(2):
        model(TOKENS.clone().index_fill(1, torch.tensor([0]), wrong))
    assert torch.equal(flat(model), before)
    with engine.batch(2):  # and goes on
        F.cross_entropy(model(TOKENS), torch.tensor([0, 1])).backward()
        assert optimizer.step()


def test_embeddings_that_count_the_batch_are_not_given_to_the_rule_of_embeddings():
    model = embedding(scale_grad_by_freq=True)
    try:
        dpk.convert_model(model, train_modules=("*",))
    except dpk.UnsupportedModuleError as error:
        assert "source.weight" in str(error)
    else:
        assert dpk.conversion_report(model).one_by_one == {"source": "Embedding"}


def test_embeddings_with_max_norm_are_refused():
    with pytest.raises(dpk.UnsupportedModuleError, match="max_norm"):
        dpk.convert_model(embedding(max_norm=1.0), train_modules=("*",))


def test_sparse_embeddings_are_trained_like_others():
    torch.manual_seed(0)
    releases = []
    for sparse in (False, True):
        torch.manual_seed(0)
        engine, model, optimizer, _ = trained(embedding(sparse=sparse), TOKENS)
        before = flat(model)
        with engine.batch(2):
            F.cross_entropy(model(TOKENS), torch.tensor([0, 1])).backward()
            optimizer.step()
        releases.append(before - flat(model))
    assert releases[0].any() and torch.equal(*releases)


def test_a_weight_trained_in_one_module_and_frozen_in_its_twin():
    with pytest.raises(dpk.ConversionError, match=r"'out.weight', which is tied to 'embed.weight'"):
        dpk.convert_model(Tied(), biases=(), train_modules=("out",))
    dpk.convert_model(Tied(), biases=(), train_modules=("out", "embed"))


@pytest.mark.parametrize("norm", NORMS)
def test_samples_of_no_tokens_add_nothing_and_no_samples_are_refused(norm):
    for dtype in (torch.float32, torch.float64):
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        engine, model, optimizer, _ = trained(model, torch.randn(4, 1), per_sample_norm=norm)
        before = [p.clone() for p in model.parameters()]
        with engine.batch(4):
            model(torch.randn(4, 0, 6, dtype=dtype)).sum().backward()
            assert optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        with pytest.raises(dpk.BatchLayoutError, match="no sample"):
            model(torch.randn(0, 4, 6, dtype=dtype))
        assert engine.accountant.history.total_steps == 1


def test_second_backward_wants_an_output_for_each_sample():
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Twice()

        def forward(self, x: Tensor) -> Tensor:
            return F.cross_entropy(self.inner(x), torch.zeros(len(x), dtype=torch.long), reduction="sum")

    with pytest.warns(UserWarning, match="not bounded"):
        engine, model, _, _ = trained(Loss(), torch.randn(2, 3, 6), clipped_sum="second_backward")
    with pytest.raises(dpk.BatchLayoutError, match="take the loss outside"), engine.batch(2):
        model(torch.randn(2, 3, 6))


def test_second_backward_is_refused_where_its_sensitivity_is_relied_on():
    x = torch.randn(4, 3, 6)
    with pytest.raises(dpk.EngineError, match="flat only"):
        trained(Twice(), x, clipped_sum="second_backward", clipping="per_layer")
    with pytest.raises(dpk.EngineError, match="not proven"):
        trained(
            Twice(),
            x,
            engine=dpk.PrivacyEngine(secure_mode=True),
            max_physical_batch_size=2,
            clipped_sum="second_backward",
        )
    with pytest.warns(UserWarning, match="not bounded"):
        engine, *_ = trained(Twice(), x, clipped_sum="second_backward")
    assert "not bounded" in engine.privacy_statement()["sensitivity"]
    engine, *_ = trained(Twice(), x)
    assert engine.privacy_statement()["sensitivity"] == "proven"


def _watch(out: Tensor, kept: list[Tensor]) -> None:
    if out.requires_grad:
        out.register_hook(kept.append)


def test_a_gradient_changed_after_the_backward():
    """Who keeps an output's gradient and writes into it changes what the sum will be made of."""
    engine, model, optimizer, _ = trained(
        CASES["linear of tokens"].model(), torch.randn(2, 40, 6), per_sample_norm="ghost"
    )
    kept = []
    model.body.register_forward_hook(lambda module, args, out: _watch(out, kept))
    before = flat(model)
    with engine.batch(2):
        F.cross_entropy(model(torch.randn(2, 40, 6)), torch.tensor([0, 1])).backward()
        kept[-1].mul_(0.0)
        with pytest.raises(dpk.EngineError, match="changed in place after the backward"):
            optimizer.step()
    assert torch.equal(flat(model), before)


def test_an_input_changed_before_the_backward():
    engine, model, _, _ = trained(CASES["linear of tokens"].model(), torch.randn(2, 40, 6))
    seen = []
    model.body.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with engine.batch(2):
        loss = F.cross_entropy(model(torch.randn(2, 40, 6)), torch.tensor([0, 1]))
        seen[-1].add_(1.0)
        with pytest.raises((dpk.EngineError, RuntimeError), match=r"in ?place"):
            loss.backward()


def test_graphs_of_gradients_are_refused():
    engine, model, _, _ = trained(CASES["conv2d"].model(), CASES["conv2d"].batch(2))
    with engine.batch(2), pytest.raises(dpk.EngineError, match="create_graph"):
        F.cross_entropy(model(CASES["conv2d"].batch(2)), torch.tensor([0, 1])).backward(create_graph=True)


def test_compiled_models_are_told_what_to_do():
    engine, model, _, _ = trained(CASES["linear of tokens"].model(), torch.randn(2, 40, 6))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with engine.batch(2), pytest.raises(Exception, match="per_sample_norm='instantiate'"):
        compiled(torch.randn(2, 40, 6))
    torch._dynamo.reset()


def test_compiled_linear_layers_have_rows_where_these_are_asked_for():
    x, y = torch.randn(2, 40, 6), torch.tensor([0, 1])
    releases = []
    for compiled in (False, True):
        model = CASES["linear of tokens"].model()
        engine, model, optimizer, _ = trained(model, x, per_sample_norm="instantiate")
        before = flat(model)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        with engine.batch(2):
            F.cross_entropy(call(x), y).backward()
            optimizer.step()
        releases.append(before - flat(model))
    torch._dynamo.reset()
    torch.testing.assert_close(*releases, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tied", "conv2d", "positions"])
def test_captured_steps(name, graphs):
    """What a graph repeats of sinks is what eager steps do."""
    case, releases = CASES[name], []
    x, y = case.batch(24), torch.arange(24) % 3
    for captured in (False, True):
        model = dpk.convert_model(case.model(), train_modules=("*",))
        _, _, optimizer, loader = attach(
            model, x, y, engine=dpk.PrivacyEngine(unsafe_deterministic_seed=1), lr=0.1, sigma=0.1, **PADDED
        )
        loss = lambda x, y, model=model: F.cross_entropy(model(x), y)  # noqa: E731
        run = dpk.capture_step(optimizer, loss) if captured else None
        for _ in range(3):
            for own, labels in loader:
                if run is not None:
                    run(own, labels)
                else:
                    loss(own, labels).backward()
                    optimizer.step()
        releases.append(flat(model))
    assert graphs.captures > 0
    torch.testing.assert_close(*releases, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "swap", "repeat"])
def test_what_samples_share_is_proven_to_reach_each_by_itself(kind):
    """A table that is averaged over copies, or handed to the next sample: outputs are right, gradients would not be."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Parameter(torch.randn(1, 3, 6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:  # [B, 3, 6]
            table = self.table
            if kind == "mean":
                table = table.mean(0, keepdim=True)
            elif kind == "swap":
                table = table.expand(len(x), -1, -1).flip(0) if len(table) > 1 else table
            else:
                table = table.repeat(len(x), 1, 1)
            return self.head((x + table).mean(1))

    engine, model, _, _ = trained(Shares(), torch.randn(4, 3, 6))
    with pytest.raises(dpk.BatchLayoutError, match=r"copies|share|fails on"), engine.batch(4):
        model(torch.randn(4, 3, 6))
    # Where it is seen before, the module is run one sample at a time.
    other = dpk.convert_model(Shares(), train_modules=("*",), sample_batch=torch.randn(4, 3, 6))
    assert dpk.conversion_report(other).one_by_one == {"": "Shares"}


def test_noise_reaches_every_element_of_a_weight():
    """Of all trained tensors, each element its own: no two of one size share it."""
    x = torch.zeros(2, 3, 6)
    engine, model, optimizer, _ = trained(Twice(), x, sigma=1.0, engine=dpk.PrivacyEngine(unsafe_deterministic_seed=1))
    releases = []
    for _ in range(2):
        before = flat(model)
        with engine.batch(2):
            (model(x).sum() * 0.0).backward()
            optimizer.step()
        releases.append(before - flat(model))
    sizes = [p.numel() for p in model.parameters()]
    for release in releases:
        assert (release != 0.0).all()
        parts = [part[: min(sizes)] for part in torch.split(release, sizes)]
        assert all(not torch.equal(a, b) for i, a in enumerate(parts) for b in parts[:i])
    # Standard deviation 1 of the sum, divided by 2 samples.
    assert 0.4 < float(torch.cat(releases).std()) < 0.6
    assert not torch.equal(*releases)


def test_a_broken_draw_leaves_nothing_in_the_weights():
    case = CASES["linear of tokens"]
    x = case.batch(8)
    engine, model, optimizer, loader = trained(case.model(), x, batch=8, sample_rate=1.0, max_physical_batch_size=2)
    for own, y in loader:
        F.cross_entropy(model(own), y).backward()
        assert optimizer.step() is False
        break
    assert any(own is not None and own.any() for own in engine._session.ledger._sums)
    engine._session.abandon()
    assert all(not total.any() for _, total in engine._session.ledger._parts())
