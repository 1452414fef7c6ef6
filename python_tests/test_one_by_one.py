"""Parameters that no rule of a layer covers: their modules run on each sample by itself, and give its own rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from alone import CASES, TOKENS, alone_in, loss
from attach import attach
from layouts import WIDTH
from networks import accounted, same, snapshot
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from dp_bitfit_kernels._validate import BatchLayoutError
from dp_bitfit_kernels.layers.one_by_one import OneByOneLayer

IN_ONE_FORWARD = {
    name for name in CASES if name.startswith(("attention", "transformer", "trans", "bilinear", "instance"))
}
IN_ONE_FORWARD |= {"weight norm"}


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


@pytest.mark.parametrize("name", ["query bias", "position table", "scaled", "own forward", "tied"])
def test_modules_that_vmap_can_run_go_through_one_forward(name: str) -> None:
    make, shape, _ = CASES[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, *shape)
    dpk.convert_model(model, sample_batch=x)
    ran: list[nn.Module] = []
    for module in model.modules():
        if not isinstance(module, OneByOneLayer):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    _, model, optimizer, _ = attach(model, x, poisson_sampling=False)
    for _ in range(2):
        loss(model, x).backward()
        assert optimizer.step()
    ran.clear()
    loss(model, x).backward()  # the third batch is not asked for its layout
    assert all(ran.count(module) <= 2 for module in ran)
    assert all(call.at_once for alone in alone_in(model) for call in alone.calls)


@pytest.mark.parametrize("name", ["experts", "routed linears", "lstm", "gru"])
def test_modules_that_vmap_cannot_run_go_one_by_one(name: str) -> None:
    make, shape, _ = CASES[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, *shape)
    dpk.convert_model(model, sample_batch=x)
    _, model, _, _ = attach(model, x, poisson_sampling=False)
    loss(model, x).backward()
    assert not any(call.at_once for alone in alone_in(model) for call in alone.calls)


@pytest.mark.parametrize("by_module", [True, False])
def test_samples_have_masks_of_their_own(by_module: bool) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift_bias, self.drop = nn.Parameter(torch.ones(256)), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.shift_bias
            return self.drop(y) if by_module else F.dropout(y, 0.5, self.training)

    torch.manual_seed(0)
    model, x = dpk.convert_model(Dropping()), torch.zeros(4, 3, 256)
    _, model, _, _ = attach(model, x, poisson_sampling=False)
    kept = model.train()(x) != 0
    assert all(call.at_once == by_module for call in alone_in(model)[0].calls)
    for i in range(4):
        for j in range(i):
            assert 0.4 < (kept[i] == kept[j]).float().mean() < 0.6
