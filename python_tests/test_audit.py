"""A white-box audit of the whole path: does a release show a record as much as accounting says, and no more?

Two bias layers of D outputs each. Canary (j, s) has the gradient K (e_j^a + s e_j^b) / sqrt(2), spread over T
positions: 2 D records whose gradients have orthonormal directions u. The private loader's own Poisson draws at q = 1/2
decide which are in; the score of a canary is <release, u> in units of R. Accounting promises N(0, sigma^2) for those
left out and N(min(K/R, 1), sigma^2) for those drawn: mu = difference of means / deviation = min(K/R, 1) / sigma.

Keys follow from fixed seeds, so that no run fails by chance; one run takes the operating system's key.
"""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from probe import GRID, Keep, Probe
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dp_bitfit_kernels as dpk

D, STEPS, BATCH = 250, 80, 200
SIGMA = 0.5  # 2 D STEPS = 40,000 observations tell mu from 1.02 mu at this sigma
Z = scipy.stats.norm.isf(1e-4 / 2)  # two-sided test at 1e-4


class TwoBiases(nn.Module):
    """[B, T, 1] -> [B, T, 2 D]"""

    def __init__(self, width=D):
        super().__init__()
        self.a, self.b = nn.Linear(1, width), nn.Linear(1, width)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], -1)


def canary_loss(out, index, size, mean):
    """K / (T sqrt 2) sum over T of (out_a[j] + s out_b[j]) for the canaries ``index`` [B], summed or averaged."""
    j, sign = index % D, 1.0 - 2.0 * (index >= D)
    positions = out.sum(1) / out.shape[1]
    picked = positions.gather(1, j[:, None]).squeeze(1) + sign * positions.gather(1, D + j[:, None]).squeeze(1)
    each = size / math.sqrt(2) * picked
    return each.mean() if mean else each.sum()


def scores(release):
    """[steps, 2 D] releases -> [steps, 2 D] projections on the canaries, first those with s = 1."""
    a, b = release[:, :D], release[:, D:]
    return torch.cat([a + b, a - b], 1) / math.sqrt(2)


def audit(ratio, t, *, bound=0.7, sigma=SIGMA, seed=None, mean=False, clipping="flat", physical=BATCH):
    """(scores [steps, 2 D] in units of R, inclusion [steps, 2 D], residuals [steps, 2 D] in units of sigma R)."""
    torch.manual_seed(0)
    model = dpk.convert_model(TwoBiases())
    engine = dpk.PrivacyEngine(unsafe_deterministic_seed=seed)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=Keep([p for p in model.parameters() if p.requires_grad]),
        data_loader=DataLoader(TensorDataset(torch.arange(2 * D)), batch_size=D),
        noise_multiplier=sigma,
        max_grad_norm=bound,
        loss_reduction="mean" if mean else "sum",
        sample_rate=0.5,
        expected_batch_size=float(D),
        max_physical_batch_size=physical,
        clipping=clipping,
    )
    loader.steps_per_epoch = STEPS
    included, current = [], torch.zeros(2 * D, dtype=torch.bool)
    for (index,) in loader:
        canary_loss(model(torch.ones(len(index), t, 1)), index, ratio * bound, mean).backward()
        current[index] = True
        if optimizer.step():
            included.append(current)
            current = torch.zeros(2 * D, dtype=torch.bool)
    assert engine.accountant.history.total_steps == STEPS == engine._session.releases
    released = torch.stack(optimizer.original_optimizer.releases).double() * D / bound
    inside = torch.stack(included)
    return scores(released), inside, released


def residuals(score, inside, shift, sigma=SIGMA):
    """What is left of the scores without the signal, and back in the coordinates of the biases: [steps, 2 D]."""
    noise = (score - inside * shift) / sigma
    a, b = noise[:, :D], noise[:, D:]
    return torch.cat([a + b, a - b], 1) / math.sqrt(2)


def assert_signal(score, inside, shift, sigma=SIGMA):
    """Two-sided: the difference of means is ``shift`` and mu is shift / sigma within 4 %."""
    drawn, left = score[inside], score[~inside]
    assert 0.48 < inside.double().mean() < 0.52
    difference = float(drawn.mean() - left.mean())
    error = sigma * math.sqrt(1 / len(drawn) + 1 / len(left))
    assert abs(difference - shift) < Z * error
    deviation = math.sqrt((float(drawn.var()) + float(left.var())) / 2)
    mu = difference / deviation
    assert abs(mu * sigma - shift) < 0.04 * shift, f"mu = {mu:.4f}, accounted {shift / sigma:.4f}"
    assert abs(float(left.mean())) < Z * sigma / math.sqrt(len(left))  # nothing of a record that was not drawn


def assert_noise(noise):
    """Right in size in each tensor, alive in each coordinate, Gaussian, and never used twice."""
    steps, width = noise.shape
    for tensor in noise.split(D, 1):
        assert abs(float(tensor.square().mean().sqrt()) - 1) < 0.02 * math.sqrt(40_000 / tensor.numel())
    spread = noise.square().sum(0)  # chi-squared with as many degrees of freedom as steps
    assert scipy.stats.chi2.ppf(1e-8, steps) < spread.min() and spread.max() < scipy.stats.chi2.isf(1e-8, steps)
    assert (noise != 0).all() and len(noise.unique()) > 0.99 * noise.numel()
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4
    assert abs(float(noise.pow(4).mean()) - 3) < Z * math.sqrt(96 / noise.numel())
    between = torch.corrcoef(noise)  # steps
    assert (between - torch.eye(steps)).abs().max() * math.sqrt(width) < 5.5
    across = torch.corrcoef(torch.stack([noise[:, :D].flatten(), noise[:, D:].flatten()]))[0, 1]  # tensors
    neighbours = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))[0, 1]
    following = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]
    for correlation in (across, neighbours, following):
        assert abs(float(correlation)) * math.sqrt(noise.numel() / 2) < Z + 1


@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("ratio", [0.5, 1, 2, 4, 50])
def test_a_canary_shows_as_much_as_accounted(ratio, t):
    score, inside, _ = audit(ratio, t, seed=17 * t + int(10 * ratio))
    shift = min(ratio, 1.0)
    assert_signal(score, inside, shift)
    assert_noise(residuals(score, inside, shift))


@pytest.mark.parametrize(
    "options, shift",
    [
        ({"mean": True, "physical": 64}, 1.0),  # physical batches of unequal sizes under a mean
        ({"clipping": "automatic"}, 50 / (50 + 0.01 / 0.7)),  # the stabiliser beside a norm of 50 R
        ({"clipping": "per_layer"}, 1.0),  # a canary fills both layers' bounds
        ({"bound": 10.0, "sigma": 0.25}, 1.0),
        ({"bound": 1e-3, "physical": None}, 1.0),
    ],
)
def test_every_way_to_clip_and_reduce_shows_the_same(options, shift):
    score, inside, _ = audit(50, 1, seed=5, **options)
    sigma = options.get("sigma", SIGMA)
    assert_signal(score, inside, shift, sigma)
    assert_noise(residuals(score, inside, shift, sigma))


def test_with_a_key_of_the_operating_system():
    first, second = (audit(2, 1) for _ in range(2))
    noises = [residuals(score, inside, 1.0) for score, inside, _ in (first, second)]
    for noise in noises:
        assert abs(float(noise.square().mean().sqrt()) - 1) < 0.02
    together = torch.corrcoef(torch.cat(noises))[:STEPS, STEPS:]
    assert together.abs().max() * math.sqrt(2 * D) < 6.5  # 6,400 pairs of steps of two runs
    assert not torch.equal(first[1], second[1])


def masked_noise(probe, steps, width):
    x, mask = torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.bool)
    for _ in range(steps):
        probe.step(x, lambda out: out.sum(), mask)
    return probe.noise(steps)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_variance_of_an_update_is_what_the_formula_says(reduction):
    """(sigma R / E[B])^2 from both sides, on a parameter that SGD moved."""
    width, sigma, bound, expected = 20_000, 1.7, 0.3, 8.0
    probe = Probe(
        TwoBiases(width),
        sigma=sigma,
        bound=bound,
        expected=expected,
        seed=23,
        loss_reduction=reduction,
        optimizer=lambda params: torch.optim.SGD(params, lr=2.0),
    )
    for bias in (probe.model.a.bias, probe.model.b.bias):
        with torch.no_grad():
            bias.zero_()
    probe.step(torch.zeros(3, 1, 1), lambda out: out.sum(), torch.zeros(3, dtype=torch.bool))
    for bias in (probe.model.a.bias, probe.model.b.bias):
        moved = bias.detach().double() / 2.0
        assert abs(float(moved.std()) * expected / (sigma * bound) - 1) < 0.02
        assert (bias != 0).all() and abs(float(moved.mean())) < 5 * sigma * bound / expected / math.sqrt(width)


def test_noise_is_fresh_after_resume_and_whatever_torch_is_seeded_with(tmp_path):
    path, noises = str(tmp_path / "run.pt"), []
    for run in range(3):
        torch.manual_seed(42)
        probe = Probe(TwoBiases(), sigma=1.0)
        if run:
            probe.engine.load_checkpoint(path)
        noises.append(masked_noise(probe, 6, 2 * D))
        if run == 0:
            probe.engine.save_checkpoint(path)
    assert [c.step for c in probe.calls] == [7, 8, 9, 10, 11, 12]  # the counter goes on
    noise = torch.cat(noises)
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() * math.sqrt(2 * D) < 6  # 153 pairs of releases
    assert abs(float(noise.square().mean().sqrt()) - 1) < 0.06


def test_low_bits_of_a_release_do_not_tell_its_sum():
    """The release is a lattice point whatever the sum: its low bits are equally likely under both neighbours."""
    counts = []
    for size in (0.0, 1.0):
        probe = Probe(TwoBiases(8192), sigma=SIGMA, seed=31, bound=1.0)
        probe.step(torch.ones(1, 1, 1), lambda out, size=size: size * out.sum())
        grid = probe.inner.releases[-1].double() / probe.calls[-1].scale
        whole = grid.round()
        assert (grid - whole).abs().max() < 0.3  # float32 holds the integer to a part of its last bits
        small = whole.abs() < 2**23  # where float32 holds it exactly
        counts.append(torch.bincount((whole[small].long() % 8), minlength=8))
        assert probe.calls[-1].noise_std == SIGMA * GRID
    for count in counts:
        assert scipy.stats.chisquare(count.numpy()).pvalue > 1e-4


def test_a_whole_run_is_distinguished_as_well_as_accounted():
    """Likelihood ratios of whole runs, of members and of others, are distributed as under what was charged."""
    steps, canaries = 60, 1000
    torch.manual_seed(0)
    model = dpk.convert_model(nn.Sequential(nn.Linear(1, canaries)))
    engine = dpk.PrivacyEngine(unsafe_deterministic_seed=11)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=Keep([p for p in model.parameters() if p.requires_grad]),
        data_loader=DataLoader(TensorDataset(torch.arange(canaries // 2)), batch_size=50),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        loss_reduction="sum",
        sample_rate=0.1,
        expected_batch_size=1.0,
    )
    loader.steps_per_epoch = steps
    for (index,) in loader:  # the second half of the coordinates belongs to records that are not in the data
        own = torch.zeros(len(index), canaries).scatter_(1, index[:, None], 5.0)
        (own * model(torch.ones(len(index), 1))).sum().backward()
        optimizer.step()
    (charged,) = engine.accountant.history.segments
    sigma, q = optimizer.noise_multiplier, charged.sample_rate
    assert charged.noise_multiplier == 0.0  # what a seed replays is charged as no noise
    assert charged.count == steps

    def log_ratio(released):  # [steps, n] -> [n]
        return torch.log1p(q * torch.expm1((2 * released - 1) / (2 * sigma**2))).sum(0).numpy()

    released = torch.stack(optimizer.original_optimizer.releases).double()
    ideal = torch.randn(steps, 20_000, dtype=torch.float64) * sigma
    drawn = (torch.rand(steps, 20_000) < q).double()
    for got, want in ((released[:, : canaries // 2], ideal + drawn), (released[:, canaries // 2 :], ideal)):
        assert scipy.stats.ks_2samp(log_ratio(got), log_ratio(want)).pvalue > 1e-4
