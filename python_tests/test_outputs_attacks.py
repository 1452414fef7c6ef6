"""Attacks on what is asked of a model's outputs that once came through, or were refused falsely."""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from test_outputs import C, Gives, T, private
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._same_draws import SameDraws
from dp_bitfit_kernels._widened import Widened

N = 8


def asked(model: nn.Module, *given: Any, batch: int = N, **named: Any) -> Any:
    """The first private forward of the model."""
    engine, model, _ = private(model, torch.randn(batch, 1))
    with engine.batch(batch):
        return model(*given, **named)


class HasLoss(nn.Module):
    """[B, T, 6] and labels [B] -> a loss of the scores [B, T, C]."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.loss = nn.Linear(6, C), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.inner(x), y)


def each(s: Tensor) -> Tensor:
    return s.square().mean((1, 2))


def hardest_triplet(s: Tensor, y: Tensor) -> Tensor:
    e = F.normalize(s.flatten(1), dim=1)
    d, same = torch.cdist(e, e), y[:, None] == y
    other = torch.eye(len(y), dtype=torch.bool)
    hardest = (d * (same & ~other)).amax(1) - (d + 1e3 * same).amin(1)
    counted = (same & ~other).any(1) & (~same).any(1)
    return (F.relu(hardest + 1.0) * counted).sum() / counted.sum().clamp(min=1)


def over_tokens(s: Tensor, y: Tensor) -> Tensor:
    """A mean over the tokens of which each sample has another number."""
    counted = torch.arange(s.shape[1]) <= y[:, None] % s.shape[1]
    return (s.square().mean(2) * counted).sum() / counted.sum()


MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the hardest four": lambda s, y: each(s).topk(min(4, len(s))).values.mean(),
    "but for the hardest": lambda s, y: each(s).topk(max(1, 3 * len(s) // 4), largest=False).values.mean(),
    "fails on two": lambda s, y: each(s).topk(3).values.mean(),
    "triplets": hardest_triplet,
    "over tokens": over_tokens,
    "behind a constant": lambda s, y: over_tokens(s, y) + 1e3,
}


@pytest.mark.parametrize("name", MIXED)
def test_losses_that_more_than_two_samples_show(name: str) -> None:
    torch.manual_seed(1)
    with pytest.raises(dpk.BatchLayoutError, match="not a mean or sum"):
        asked(HasLoss(MIXED[name]), torch.randn(N, T, 6), torch.arange(N) % 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_hides_no_mixing_and_no_mean_is_taken_for_it(dtype: torch.dtype) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        x, y = torch.randn(N, T, 6, dtype=dtype), torch.arange(N) % 3
        for mean in (
            lambda s, y: each(s).mean(),
            lambda s, y: F.cross_entropy(s.mean(1), y),
            lambda s, y: each(s).sum(),
        ):
            asked(HasLoss(mean).to(dtype), x, y)
        with pytest.raises(dpk.BatchLayoutError, match="not a mean or sum"):
            asked(HasLoss(over_tokens).to(dtype), x, y)


def test_a_class_that_is_rare_shows_its_weight() -> None:
    weights = torch.tensor([1.0, 1.0, 30.0, 1.0, 1.0])
    for place in range(1, 32, 4):
        y = torch.arange(32) % 2
        y[place] = 2
        with pytest.raises(dpk.BatchLayoutError, match="class weights"):
            asked(
                HasLoss(lambda s, y: F.cross_entropy(s.mean(1), y, weight=weights)), torch.randn(32, T, 6), y, batch=32
            )


class Attributed(dict[str, Any]):
    hidden: Tensor


class Mangled:
    __slots__ = ("__scores",)

    def __init__(self, scores: Tensor) -> None:
        self.__scores = scores


def on_a_mapping(s: Tensor) -> Attributed:
    made = Attributed()
    made.hidden = s
    return made


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "a deque": lambda s: deque([s]),
    "a set": lambda s: {s},
    "values": lambda s: {"a": s}.values(),
    "partial": lambda s: functools.partial(torch.add, s),
    "a function": lambda s: lambda: s,
    "an attribute of a mapping": on_a_mapping,
    "an attribute of a tensor": lambda s: setattr(made := torch.zeros(len(s), 1), "hidden", s) or made,
    "a mangled slot": Mangled,
    "a distribution": lambda s: D.Normal(s, 1.0),
    "a transformed distribution": lambda s: D.TransformedDistribution(D.Normal(0.0, 1.0), D.AffineTransform(s, 1.0)),
    "a number of dimensions, samples in the second": lambda s: s.sum(2).t(),
    "samples in the last": lambda s: s.permute(1, 2, 0),
    "sparse": lambda s: s.to_sparse(),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_tensors_are_found_wherever_they_are(name: str) -> None:
    asked(Gives(HOLDERS[name]), torch.randn(N, T, 6))
    with pytest.raises(dpk.BatchLayoutError, match="do not exist for such a model"):
        asked(Gives(HOLDERS[name], mix=True), torch.randn(N, T, 6))


@pytest.mark.parametrize(
    "give, says",
    [
        (lambda s: iter([s]), "list_iterator"),
        (lambda s: (t for t in s), "generator"),
        (lambda s: torch.nested.nested_tensor(list(s), layout=torch.jagged), "cannot be compared"),
        (lambda s: s.to("meta"), "cannot be compared"),
        (lambda s: torch.masked.masked_tensor(s.detach(), s > 0), "cannot be compared"),
        (lambda s: {"scores": s, "total_loss": s.square().mean().exp()}, "take the loss of each sample"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(give: Callable[[Tensor], Any], says: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(dpk.BatchLayoutError, match=says):
            asked(Gives(give), torch.randn(N, T, 6))


def test_a_metric_beside_a_loss_is_told_of() -> None:
    def give(s: Tensor) -> Any:
        return {"loss": s.square().mean(), "logits": s, "perplexity": s.square().mean().exp()}

    with pytest.warns(UserWarning, match=r"'perplexity'.*keep it out of the loss"):
        asked(Gives(give), torch.randn(N, T, 6))


@pytest.mark.parametrize("make", [lambda x: x.to_sparse(), lambda x: torch.nested.nested_tensor(list(x))])
def test_inputs_without_rows_are_refused_by_name(make: Callable[[Tensor], Tensor]) -> None:
    class Dense(Gives):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.to_dense() if x.is_sparse else x.to_padded_tensor(0.0))

    with pytest.raises(dpk.BatchLayoutError, match="sparse or nested"):
        asked(Dense(lambda s: s), make(torch.randn(N, T, 6)))


def test_lists_of_own_lengths_are_each_samples_own() -> None:
    """As detection gives boxes."""
    asked(Gives(lambda s: [t[t[:, 0] > 0] for t in s]), torch.randn(N, T, 6))


@pytest.mark.parametrize("loss", [lambda s: each(s).sum() + 3.0, lambda s: each(s).mean() + 3.0])
def test_a_constant_beside_a_sum_is_no_mixing(loss: Callable[[Tensor], Tensor]) -> None:
    asked(Gives(loss), torch.randn(N, T, 6))


class BeforeZeros(nn.Module):
    def __init__(self, mix: str) -> None:
        super().__init__()
        self.inner, self.mix = nn.Linear(6, C), mix
        self.head = nn.Embedding(9, C) if mix == "ids" else nn.Linear(C, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        if self.mix == "ids":
            return self.head((h.amax(2) > h.mean()).long())
        return self.head(h * h.mean(0).sign() if self.mix == "signs" else h[..., h.mean((0, 1)).argsort()])


@pytest.mark.parametrize("mix", ["signs", "order", "ids"])
def test_zeros_hide_neither_signs_nor_order_nor_ids(mix: str) -> None:
    for seed in range(4):  # one of the batches shows it
        torch.manual_seed(seed)
        try:
            asked(BeforeZeros(mix), torch.randn(N, T, 6))
        except dpk.BatchLayoutError as error:
            assert "'head'" in str(error)
            return
    pytest.fail("no batch was refused")


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "means and deviations": lambda s: torch.normal(s, s.abs() + 1.0),
    "means": lambda s: torch.normal(s, 1.0),
    "deviations": lambda s: s + torch.normal(0.0, s.abs() + 1.0),
    "probabilities": lambda s: s + torch.bernoulli(s.sigmoid()),
    "probabilities in place": lambda s: s + torch.empty_like(s).bernoulli_(s.sigmoid()),
    "a distribution": lambda s: D.Normal(s, 1.0).rsample(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_by_values_hide_no_other_samples_in_training(name: str) -> None:
    class Scaled(Gives):
        def forward(self, x: Tensor) -> Any:
            return DRAWS[name](self.inner(x) / len(x)) if self.training else self.inner(x)

    asked(Gives(DRAWS[name]).train(), torch.randn(N, T, 6))
    with pytest.raises(dpk.BatchLayoutError, match="number of samples"):
        asked(Scaled(DRAWS[name]).train(), torch.randn(N, T, 6))


@pytest.mark.parametrize("name", DRAWS)
def test_the_same_draws_by_values(name: str) -> None:
    def drawn(n: int) -> Tensor:
        torch.manual_seed(n)
        with SameDraws():
            return DRAWS[name](torch.arange(4.0).expand(n, 3, 4))

    few, many = drawn(2), drawn(9)
    assert torch.equal(many[:2], few)
    assert torch.equal(few[:1].expand_as(few), few)


def test_an_argument_that_all_share_may_be_as_long_as_the_batch_once_it_is_known() -> None:
    class Masked(Gives):
        def forward(self, x: Tensor, mask: Tensor) -> Any:  # mask [T, T]
            s = self.inner(x)
            return F.scaled_dot_product_attention(s, s, s, attn_mask=mask)

    engine, model, optimizer = private(Masked(lambda s: s), torch.randn(N, 1))
    for turn, batch in enumerate((N, T, 2, T)):
        with engine.batch(batch):
            model(torch.randn(batch, T, 6), torch.randn(T, T)).square().sum().backward()
            assert optimizer.step(), turn
    with pytest.raises(dpk.BatchLayoutError):
        asked(Masked(lambda s: s), torch.randn(T, T, 6), torch.randn(T, T), batch=T)


def test_layers_dropped_by_chance_within_one_sample_at_a_time_are_refused_by_name() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Any:
            h = F.dropout(x * self.scale, 0.1, self.training)
            hidden = [h]
            for layer in self.layers:
                if torch.rand([]) < 0.5:
                    continue
                h = layer(h)
                hidden.append(h)
            return h, tuple(hidden)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Drops()

        def forward(self, x: Tensor) -> Any:
            return self.head(x)[0]

    refused = 0
    for seed in range(6):
        torch.manual_seed(seed)
        try:
            asked(Around().train(), torch.randn(N, T, 6))
        except dpk.BatchLayoutError:
            refused += 1
    assert refused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 5, 3), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 3)).to(dtype)
    x = torch.randn(2, 6, 6).to(dtype)
    kept = [p.detach().clone() for p in model.parameters()]
    with Widened(), torch.no_grad():
        found = model(x)
        assert torch.zeros(2, dtype=dtype).dtype == torch.float32
        x.mul_(2.0)
    assert found.dtype == torch.float32
    assert x.dtype == dtype
    exact = model.float()(x.float() / 2)
    torch.testing.assert_close(found, exact.detach(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p.to(dtype), q) for p, q in zip(model.parameters(), kept, strict=True))


def test_a_difference_of_large_means_is_a_mean() -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        asked(
            Gives(lambda s: (s.square() + 100.0).mean() - (s.square() + 100.0 + 1e-3 * s).mean()), torch.randn(N, T, 6)
        )


def test_draws_seed_the_generator_of_their_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds_all(seed: int) -> None:
        raise AssertionError("reseeds every device")

    monkeypatch.setattr(torch, "manual_seed", seeds_all)
    with torch.random.fork_rng(devices=[]), SameDraws():
        assert torch.equal(*torch.rand(2, 3, generator=torch.Generator()))


def test_what_random_numbers_hide_is_told() -> None:
    def noise(s: Tensor) -> Tensor:
        return s + torch.multinomial(s.softmax(2).flatten(0, 1), 1).view(*s.shape[:2], 1)

    with pytest.warns(UserWarning, match="could not be asked"):
        asked(Gives(noise).train(), torch.randn(N, T, 6))


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_tells_samples_by_their_place_is_refused(training: bool) -> None:
    with pytest.raises(dpk.BatchLayoutError, match="number of samples"):
        asked(Gives(lambda s: s + torch.arange(len(s)).view(-1, 1, 1)).train(training), torch.randn(N, T, 6))
