"""What a model gives for a sample is its own: outputs in every layout, totals, objects, and random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attach import attach
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._nested import held_in
from dp_bitfit_kernels._same_draws import SameDraws

B, T, C = 4, 3, 5


class Gives(nn.Module):
    """[B, T, 6] -> what ``give`` makes of the scores [B, T, C]."""

    def __init__(self, give: Callable[[Tensor], Any], mix: bool = False) -> None:
        super().__init__()
        self.inner, self.give, self.mix = nn.Linear(6, C), give, mix

    def forward(self, x: Tensor) -> Any:
        scores = self.inner(x)
        return self.give(scores - scores.mean(0) if self.mix else scores)


class Slotted:
    __slots__ = ("scores",)

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


@dataclasses.dataclass
class Sealed:
    """A dataclass that refers to itself through an object."""

    scores: Tensor
    about: Any = None


def within(scores: Tensor) -> SimpleNamespace:
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=scores.transpose(1, 2))])
    cache.own = cache
    return cache


GIVES: dict[str, Callable[[Tensor], Any]] = {
    "batch first": lambda s: s,
    "flat": lambda s: s.flatten(0, 1),
    "flat, one number each": lambda s: s.sum(2).flatten(),
    "flat, tokens outside": lambda s: s.transpose(0, 1).flatten(0, 1),
    "sequence first": lambda s: s.transpose(0, 1),
    "a list of steps": lambda s: list(s.unbind(1)),
    "a list of samples": lambda s: list(s.unbind(0)),
    "pairs of samples": lambda s: [{"scores": t, "best": t.amax(0)} for t in s.unbind(0)],
    "an object": lambda s: SimpleNamespace(scores=s),
    "an object with slots": Slotted,
    "an object within others, in a circle": within,
    "a dataclass": lambda s: Sealed(s, within(s)),
}


def private(model: nn.Module, x: Tensor) -> tuple[dpk.PrivacyEngine, nn.Module, Any]:
    torch.manual_seed(0)
    head = ("head",) if hasattr(model, "head") else ()
    engine, model, optimizer, _ = attach(dpk.convert_model(model, train_modules=head), x, poisson_sampling=False)
    return engine, model, optimizer


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("name", GIVES)
def test_every_layout_of_the_outputs_is_taken(name: str, batch: int) -> None:
    engine, model, optimizer = private(Gives(GIVES[name]), torch.randn(batch, 1))
    with engine.batch(batch):
        found = [tensor for _, tensor in held_in(model(torch.randn(batch, T, 6)))]
        sum(tensor.square().sum() for tensor in found).backward()
        assert optimizer.step()


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("name", GIVES)
def test_mixing_shows_in_every_layout_of_the_outputs(name: str, batch: int) -> None:
    engine, model, _ = private(Gives(GIVES[name], mix=True), torch.randn(batch, 1))
    with pytest.raises(dpk.BatchLayoutError, match="do not exist for such a model"), engine.batch(batch):
        model(torch.randn(batch, T, 6))


def over_what_is_left(scores: Tensor) -> Tensor:
    """A mean over the tokens that count."""
    counts = scores[..., 0] > 0
    return (scores.square().sum(2) * counts).sum() / counts.sum()


LOSSES: dict[str, Callable[[Tensor], Any]] = {
    "under another name": lambda loss: {"total_loss": loss},
    "in a list": lambda loss: [loss],
    "behind others": lambda loss: (None, "two", loss),
    "of one dimension": lambda loss: loss.reshape(1),
    "in an object": lambda loss: SimpleNamespace(loss=loss),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_mean_over_samples_wherever_it_is(name: str) -> None:
    torch.manual_seed(0)
    place, x = LOSSES[name], torch.randn(B, T, 6)
    engine, model, optimizer = private(Gives(lambda s: place(s.square().mean())), torch.randn(B, 1))
    with engine.batch(B):
        sum(tensor.sum() for _, tensor in held_in(model(x))).backward()
        assert optimizer.step()
    engine, model, _ = private(Gives(lambda s: place(over_what_is_left(s))), torch.randn(B, 1))
    with pytest.raises(dpk.BatchLayoutError, match="mean or sum over samples"), engine.batch(B):
        model(x)


def test_a_loss_that_is_no_mean_is_seen_where_all_samples_are_alike() -> None:
    for batch in (1, B):
        engine, model, _ = private(Gives(lambda s: s.mean(0).square().sum()), torch.randn(batch, 1))
        with pytest.raises(dpk.BatchLayoutError, match="mean or sum over samples"), engine.batch(batch):
            model(torch.randn(1, T, 6).expand(batch, T, 6))


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("power, right", [(0, True), (1, True), (2, False), (0.5, False)])
def test_a_total_goes_with_the_samples_or_not_at_all(power: float, right: bool, batch: int) -> None:
    engine, model, _ = private(Gives(lambda s: s.square().sum() / len(s) ** power), torch.randn(batch, 1))
    with engine.batch(batch):
        if right:
            model(torch.randn(batch, T, 6)).backward()
        else:
            with pytest.raises(dpk.BatchLayoutError, match="number of samples"):
                model(torch.randn(batch, T, 6))


def test_tables_and_numbers_beside_the_scores_are_taken() -> None:
    def give(s: Tensor) -> Any:
        each = [t.square().sum() for t in s]  # a loss of each sample
        return {"scores": s, "each": each, "table": torch.eye(B + 1), "scale": torch.tensor(2.0), "n": len(s)}

    for batch in (1, B):
        engine, model, optimizer = private(Gives(give), torch.randn(batch, 1))
        with engine.batch(batch):
            found = model(torch.randn(batch, T, 6))
            (found["scores"].square().sum() + sum(found["each"])).backward()
            assert optimizer.step()


@pytest.mark.parametrize(
    "give, says",
    [
        (lambda s: s[s[..., 0] > 0], "changes with another of the batch"),
        (lambda s: list(s[s[..., 0] > 0]), "how many tensors"),
        (lambda s: nn.utils.rnn.pack_sequence(list(s)[::-1]).data[1:], "changes with another of the batch"),
        (lambda s: s.flatten(0, 1).cov(), "changes with another of the batch"),
        (lambda s: s.mean(0), "changes with another of the batch"),
        (lambda s: [t.square().sum() - s.square().mean() for t in s], "changes with another of the batch"),
    ],
)
def test_outputs_that_are_packed_or_summed_are_refused(give: Callable[[Tensor], Any], says: str) -> None:
    torch.manual_seed(1)
    engine, model, _ = private(Gives(give), torch.randn(B, 1))
    x = torch.randn(B, T, 6)
    with pytest.raises(dpk.BatchLayoutError, match=says), engine.batch(B):
        model(x)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "norm"])
def test_a_head_that_starts_at_zero_hides_nothing(kind: str, mixes: bool) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, C)
            self.head = {"linear": nn.Linear(C, 2), "conv": nn.Conv1d(T, 2, 3), "norm": nn.LayerNorm(C)}[kind]
            nn.init.zeros_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.inner(x))
            return self.head(h - h.mean(0) if mixes else h)

    engine, model, optimizer = private(Headed(), torch.randn(B, 1))
    with engine.batch(B):
        if mixes:
            with pytest.raises(dpk.BatchLayoutError, match="'head'"):
                model(torch.randn(B, T, 6))
        else:
            model(torch.randn(B, T, 6)).sum().backward()
            assert optimizer.step()


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda s: F.dropout(s, 0.3),
    "feature dropout": lambda s: F.dropout1d(s, 0.3),
    "normals": lambda s: s + torch.randn_like(s),
    "normals in a new tensor": lambda s: s + torch.randn(s.shape),
    "in place": lambda s: s + s.new_empty(s.shape).normal_(0, 2).clamp(-1, 1),
    "uniforms": lambda s: s * torch.rand(len(s), 1, 1),
    "stochastic depth": lambda s: s + 0.8 * s * s.new_empty(len(s), 1, 1).bernoulli_(0.9),
    "Gumbel": lambda s: F.gumbel_softmax(s, 2.0),
    "in attention": lambda s: F.scaled_dot_product_attention(s, s, s, dropout_p=0.3),
    "of a generator of its own": lambda s: s + torch.randn(s.shape, generator=torch.Generator().manual_seed(len(s))),
    "sampled": lambda s: s + torch.multinomial(s.softmax(2).flatten(0, 1), 1).view(*s.shape[:2], 1),
    "in another order": lambda s: s[:, :, torch.randperm(C)],
}


class InTraining(Gives):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if self.training else self.inner(x)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("name", NOISES)
def test_random_numbers_are_not_taken_for_other_samples(name: str, always: bool, batch: int) -> None:
    model = (Gives if always else InTraining)(NOISES[name]).train()
    engine, model, optimizer = private(model, torch.randn(batch, 1))
    with engine.batch(batch):
        model(torch.randn(batch, T, 6)).square().sum().backward()
        assert optimizer.step()


@pytest.mark.parametrize("name", [name for name in NOISES if name not in ("sampled", "in another order")])
@pytest.mark.parametrize("by", ["number", "largest"])
def test_random_numbers_hide_no_other_samples_in_training(name: str, by: str) -> None:
    noise = NOISES[name]

    class Scaled(Gives):
        def forward(self, x: Tensor) -> Any:
            scores = self.inner(x)
            if self.training:
                scores = scores / (len(x) if by == "number" else scores.detach().abs().amax())
            return noise(scores) if self.training else scores

    engine, model, _ = private(Scaled(noise).train(), torch.randn(B, 1))
    with pytest.raises(dpk.BatchLayoutError, match="do not exist for such a model"), engine.batch(B):
        model(torch.randn(B, T, 6))


DRAWS: dict[str, Callable[[int], Tensor]] = {
    "rand": lambda n: torch.rand(n, 3, 20),
    "randn, half": lambda n: torch.randn(n, 3, 20, dtype=torch.float16),
    "randint": lambda n: torch.randint(0, 1000, (n, 20)),
    "rand_like": lambda n: torch.rand_like(torch.empty(n, 3, 20)),
    "randint_like": lambda n: torch.randint_like(torch.empty(n, 20), 5, 1000),
    "normal": lambda n: torch.normal(2.0, 3.0, (n, 20)),
    "normal_": lambda n: torch.empty(n, 20).normal_(),
    "uniform_": lambda n: torch.empty(20, n, 3).transpose(0, 1).uniform_(2, 3),
    "bernoulli_": lambda n: torch.empty(n, 40).bernoulli_(0.5),
    "bernoulli": lambda n: torch.bernoulli(torch.empty(n, 40), 0.5),
    "exponential_": lambda n: torch.empty(n, 20).exponential_(),
    "one each": lambda n: torch.rand(n),
}


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("name", DRAWS)
def test_the_same_draws(name: str, last_only: bool) -> None:
    def drawn(n: int) -> Tensor:
        with SameDraws(last_only):
            torch.rand(n)  # another before it
            return DRAWS[name](n)

    few, many = drawn(2), drawn(9)
    assert torch.equal(few[:1].expand_as(few), few)
    assert torch.equal(many[:2], few)
    assert few[0].numel() == 1 or len(few[0].unique()) > 1
    if few.dim() == 3:
        assert torch.equal(few[:, :1].expand_as(few), few) == last_only
    few[0] = 0  # memory of its own
    assert bool(few[1].any()) and few.dtype == DRAWS[name](2).dtype
