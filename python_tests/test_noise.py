"""The noise's distribution and independence, the key's guard, and the bound on the numerical slack."""

from __future__ import annotations

import copy
import io
import math
import multiprocessing
import os
import pickle
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import dp_bitfit_kernels
from dp_bitfit_kernels import noise, reference
from dp_bitfit_kernels._validate import AccountingError, EngineError
from dp_bitfit_kernels.noise import STREAM_NOISE, STREAM_SAMPLER, KeySource

# One fixed key: statistical tests with thresholds near 1e-6 must not fail one day in a thousand.
KEY = KeySource(unsafe_deterministic_seed=20221000036).key_tensor("cpu")
STD = 1.3 * 2**20


def draw(count: int, step: int = 0, stream: int = STREAM_NOISE, first: int = 0, key: Tensor = KEY) -> np.ndarray:
    """Released noise on a sum of zeros, in units of its standard deviation."""
    total = torch.zeros(count, dtype=torch.int64)
    released = reference.noisy_sum(total, key, torch.tensor([step]), stream, first, STD, 1.0 / STD)
    return released.numpy().astype(np.float64)


def test_sigma_is_right_from_both_sides():
    z = draw(200_000)
    assert 0.98 < z.std() < 1.02  # what a user may rely on
    assert abs(z.var() - 1.0) < 5 * math.sqrt(2 / z.size)  # what 200,000 draws can tell: 1.6 %
    for layer in np.split(draw(80_000, step=1), 4):
        assert 0.98 < layer.std() < 1.02


def test_noise_is_normal():
    z = draw(200_000, step=2)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    for parity in (0, 1):  # cosine and sine each on their own
        assert stats.kstest(z[parity::2], "norm").pvalue > 1e-4
    n = z.size
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for threshold in (3.0, 4.0):
        expected = n * 2 * stats.norm.sf(threshold)
        assert abs((abs(z) > threshold).sum() - expected) < 5 * math.sqrt(expected)


def test_noise_on_the_integer_grid_has_no_holes():
    """Low bits of the released integers are uniform whatever the sum, so they tell nothing about it."""
    for value in (0, 1):
        total = torch.full((100_000,), value)
        released = reference.noisy_sum(total, KEY, torch.tensor([3 + value]), 0, 0, 2.0**12, 1.0)
        counts = np.bincount(released.numpy().astype(np.int64) % 8, minlength=8)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_every_coordinate_gets_noise():
    steps = np.stack([draw(3001, step=s, first=5) for s in range(64)])  # an odd slice across many blocks
    spread = steps.std(axis=0)
    assert spread.min() > 0.5 and spread.max() < 1.6  # chi with 63 degrees of freedom, 3001 of them
    assert (steps[0] != steps[1]).mean() > 0.999
    assert np.unique(steps).size > 0.95 * steps.size  # 2 % share an integer by chance


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Empirical correlation in units of its standard error."""
    return float(np.corrcoef(a, b)[0, 1] * math.sqrt(a.size))


def test_steps_streams_and_keys_are_uncorrelated():
    n = 20_000
    other_key = KeySource(unsafe_deterministic_seed=1).key_tensor("cpu")
    draws = {
        "step 0": draw(n),
        "step 1": draw(n, step=1),
        "step 2^32": draw(n, step=2**32),
        "stream 1": draw(n, stream=STREAM_SAMPLER),
        "step 1, stream 1": draw(n, step=1, stream=1),
        "next elements": draw(n, first=n),
        "elements 2^32 on": draw(n, first=2**32),
        "key": draw(n, key=other_key),
    }
    for (a, x), (b, y) in combinations(draws.items(), 2):
        for f in (lambda v: v, np.abs):
            assert abs(correlation(f(x), f(y))) < 5, (a, b)


def test_neighbouring_elements_are_uncorrelated():
    z = draw(100_000, step=4)
    for lag in (1, 2, 7, 8, 9, 16):
        for f in (lambda v: v, np.abs, np.square):
            assert abs(correlation(f(z[:-lag]), f(z[lag:]))) < 5, lag
    assert abs(correlation(z[0::2], z[1::2])) < 5  # the two halves of a Box-Muller pair
    assert abs(correlation(z[0::2] ** 2, z[1::2] ** 2)) < 5


def test_a_nonce_names_one_step_and_stream():
    seen = set()
    for step in (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1):
        for stream in (0, 1, 2, 2**31, 2**32 - 1):
            seen.add(tuple(reference.random_words(KEY, torch.tensor([step]), stream, 0, 2).tolist()))
    assert len(seen) == 35


def test_torch_seed_changes_nothing():
    def run() -> tuple[Tensor, np.ndarray]:
        torch.manual_seed(42)
        np.random.seed(42)  # noqa: NPY002 - the legacy generator is what user scripts seed
        key = KeySource().key_tensor("cpu")
        return key, draw(64, key=key)

    state = torch.random.get_rng_state()
    (key, first), (other_key, second) = run(), run()
    assert not torch.equal(key, other_key) and not np.array_equal(first, second)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    draw(64)
    assert torch.equal(torch.random.get_rng_state(), before)  # nor does noise advance it
    torch.random.set_rng_state(state)


def test_key_is_32_bytes_of_the_operating_system(monkeypatch):
    asked = []

    def urandom(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    monkeypatch.setattr(os, "urandom", urandom)
    tensor = KeySource().key_tensor("cpu")
    assert asked == [32]
    assert tensor.dtype == torch.int32 and tensor.numpy().tobytes() == bytes(range(32))


def test_keys_are_fresh_per_object_and_per_copy():
    source = KeySource()
    again = source.key_tensor("cpu")
    assert again is source.key_tensor(torch.device("cpu"))
    keys = [
        source,
        KeySource(),
        copy.copy(source),
        copy.deepcopy(source),
        copy.deepcopy({"engine": [source]})["engine"][0],
    ]
    assert len({tuple(k.key_tensor("cpu").tolist()) for k in keys}) == len(keys)
    assert torch.equal(source.key_tensor("cpu"), again)
    assert not any(k.deterministic for k in keys)


def send_key(source: KeySource, pipe) -> None:
    pipe.send(source.key_tensor("cpu").tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_children_draw_keys_of_their_own():
    source = KeySource()
    context = multiprocessing.get_context("fork")
    keys = [source.key_tensor("cpu").tolist()]
    for _ in range(2):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=send_key, args=(source, sender))
        child.start()
        assert receiver.poll(30)
        keys.append(receiver.recv())
        child.join(30)
    assert len({tuple(k) for k in keys}) == 3
    assert source.key_tensor("cpu").tolist() == keys[0]


def test_a_reused_process_id_does_not_keep_the_key(monkeypatch):
    source = KeySource()
    key = source.key_tensor("cpu").tolist()
    monkeypatch.setattr(noise, "_fork_generation", noise._fork_generation + 1)
    assert source.key_tensor("cpu").tolist() != key


def test_the_key_cannot_be_read_from_outside():
    source = KeySource()
    shown = repr(source) + str(source)
    assert source._key.hex() not in shown and str(source._key) not in shown
    assert not any(str(word) in shown for word in source.key_tensor("cpu").tolist())
    for save in (pickle.dumps, lambda s: torch.save({"engine": s}, io.BytesIO())):
        with pytest.raises(EngineError, match="fresh"):
            save(source)


def test_a_seed_is_repeatable_and_says_so():
    a, b, c = (KeySource(unsafe_deterministic_seed=seed) for seed in (3, 3, 4))
    assert a.deterministic and "deterministic=True" in repr(a)
    assert torch.equal(a.key_tensor("cpu"), b.key_tensor("cpu"))
    assert torch.equal(a.key_tensor("cpu"), copy.deepcopy(a).key_tensor("cpu"))
    assert not torch.equal(a.key_tensor("cpu"), c.key_tensor("cpu"))


FOREIGN = re.compile(
    r"tl\.rand|torch\.(randn|rand|normal|randint|bernoulli|poisson)\b|\.(normal|uniform|random|exponential)_\("
    r"|philox|curand|torch\.Generator|random\.(normal|gauss|standard_normal)",
    re.IGNORECASE,
)


def test_no_foreign_generator_in_the_mechanism():
    package = Path(dp_bitfit_kernels.__path__[0])
    names = ["reference.py", "noise.py", "clipping.py", "sampling.py", "engine.py", "ledger.py", "session.py"]
    files = [package / name for name in names if (package / name).exists()] + sorted(package.glob("kernels/*.py"))
    files += sorted(p for p in package.parent.glob("csrc/**/*") if p.suffix in {".cpp", ".cu", ".h", ".cuh"})
    assert len(files) >= 4
    for file in files:
        code = re.sub(r"``.*?``|#.*|//.*", "", file.read_text())
        assert not FOREIGN.search(code), file.name
    for call in ("tl.randn(", "torch.randn(3)", "torch.normal(0, 1)", "x.normal_()", "curand_normal"):
        assert FOREIGN.search(call)


def short_word_distance(bits: int, std: float, angles: int) -> float:
    """Total variation between a pair drawn from ``bits``-bit radii and the ideal pair, cell by cell."""
    radius = np.sqrt(-2 * np.log(np.arange(1, 2**bits + 1) / 2**bits)) * std
    angle = (np.arange(angles) + 0.5) / angles * (np.pi / 2)  # one quadrant stands for all four
    side = int(radius[0]) + 2
    counts = np.zeros(side * side)
    for part in np.array_split(radius, max(1, radius.size // 64)):
        x, y = (np.floor(part[:, None] * f(angle) + 0.5).astype(np.int64) for f in (np.cos, np.sin))
        counts += np.bincount((x * side + y).ravel(), minlength=side * side)
    edges = stats.norm.cdf((np.arange(side + 1) - 0.5) / std)
    ideal = np.diff(edges)
    ideal = np.concatenate([ideal[:1], 2 * ideal[1:]])  # both signs
    ideal = np.outer(ideal, ideal).ravel()
    return 0.5 * (np.abs(counts / counts.sum() - ideal).sum() + 1 - ideal.sum())


@pytest.mark.parametrize(("bits", "std"), [(10, 4.0), (12, 4.0), (12, 16.0), (13, 8.0)])
def test_resolution_bound_holds_where_it_can_be_counted(bits, std):
    """The distance of pairs from short words follows std * 2^-bits and stays within the derived 2 / r2 of it."""
    unit = std * 2.0**-bits
    r2 = math.sqrt(-2 * math.log(unit))
    distance = short_word_distance(bits, std, 4096)
    assert 0.1 * unit < distance < 2 / r2 * unit


def test_the_parts_of_tau_add_up_to_less_than_the_bound():
    """The sums of the docstring, by numerical integration, in units of 2^-76 s."""
    # The edges' displacements (1), (2) and (4) as one, radial and tangential: each meets two edges of a cell twice.
    assert 2 * math.sqrt(2) * (1 + 1.75 / 8 + math.pi / 8) <= 4.6
    for sigma in (0.01, 0.1, 1.0, 100.0, 1024.0):
        s = sigma * 2**20
        r = np.linspace(7.18, 11, 20001)
        density = r * np.exp(-(r**2) / 2)
        tail = np.trapezoid(s * 4.6 * 2.0**-49 * r * density, r)
        assert tail <= 0.03 * 2.0**-76 * s
        k = r / s * 2.0**76 * np.exp(-(r**2) / 2)
        inside = k >= 1
        share = np.where(inside, np.minimum(0.5, 0.3 * (1.52 + np.log(np.maximum(k, 1))) / np.maximum(k, 1)), 0)
        lattice = 3 * 0.5 * 2.0**-76 * s * (8 / np.pi) * np.trapezoid(share, r)
        beyond = math.exp(-(r[inside][-1] ** 2) / 2)
        assert lattice + beyond <= 0.49 * 2.0**-76 * s
        assert tail + lattice + beyond <= noise.total_variation(sigma, 1, 1), sigma
        r = np.geomspace(0.5 / s, 7.18, 200001)
        x = s * (4.6 * 2.0**-49 * r + 2.83 * 2.0**-76 * np.exp(r**2 / 2) / r)
        assert np.trapezoid(x**2 * r * np.exp(-(r**2) / 2), r) <= 2.0**-92 * s**2
        assert x.max() <= 2.0**-20 * sigma


def test_delta_slack_is_small_monotone_and_bounded():
    base = noise.delta_slack(1.0, 20_000, 200, epsilon=3.0)
    assert 0 < base < 1e-8
    assert noise.delta_slack(1.0, 20_000, 200, epsilon=8.0) < 1e-6  # below the deltas in use
    assert noise.epsilon_slack(1.0, 20_000, 200) < 1e-3
    for more in ((2.0, 20_000, 200, 3.0), (1.0, 40_000, 200, 3.0), (1.0, 20_000, 400, 3.0), (1.0, 20_000, 200, 4.0)):
        assert noise.delta_slack(*more) > base
    # never below the bare cut: P(r > 10.26) = 2^-76 a pair
    assert noise.total_variation(1.0, 20_000, 200) > 2.0**-76 * 200 * 10_000
    assert noise.delta_slack(1.0, 0, 200) == 0.0 == noise.delta_slack(0.0, 10, 10)
    assert noise.delta_slack(1e4, 10, 10) == 1.0 == noise.delta_slack(1.0, 10**9, 10**12)
    assert noise.delta_slack(1.0, 10, 10, epsilon=math.inf) == 1.0
    for bad in ((-1.0, 10, 10), (math.nan, 10, 10), (1.0, -1, 10), (1.0, 10, -1)):
        with pytest.raises(AccountingError):
            noise.delta_slack(*bad)
