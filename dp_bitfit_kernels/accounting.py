"""What has been released, and the epsilon that it costs.

`History` records every release; `Accountant` evaluates it with dp-accounting (PLD or RDP, add-or-remove-one adjacency);
`calibrate_noise_multiplier` inverts that. The CLT/GDP approximation is not an upper bound and is not offered.

Guarantees (one test per sentence in python_tests/test_accounting.py and test_history.py):

* Every figure is an upper bound on epsilon for the recorded releases; where two bounds are known the smaller is given.
* A history never shrinks: merging an older or a newer copy of itself neither drops nor doubles a release.
* With a file, a release is on disk before `charge` returns. A last line torn by a crash is counted as a release.
* A calibrated noise multiplier, charged for the steps it was calibrated for, gives epsilon <= the target.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._history import History, Segment, check_charge
from ._validate import AccountingError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Accountant", "History", "Segment", "calibrate_noise_multiplier"]

KINDS = ("pld", "rdp")

# (noise multiplier, sample rate, releases), sorted, one entry per pair: all that epsilon depends on.
Groups = tuple[tuple[float, float, int], ...]

_DISCRETISATION = 1e-3  # of the privacy loss, unless the losses of one step are too small or too many for it
_FINEST = 1e-6
_POINTS_BUILT = 60_000  # grid points of all one-step distributions together; each costs about 10 microseconds
_POINTS_EACH = 1500  # with many of them, at least so many each
_POINTS_COMPOSED = 1 << 20
_EXACT_GROUPS = 32  # up to so many different (noise, rate) pairs are composed as they are
_FFT_ERROR = 1e-15  # bound on the probability that one convolution misplaces through rounding
_RDP_ERROR = 1e-12  # bound on what a Renyi divergence of one step loses by rounding and cut series
_MERGE_RATIO = 1.03  # beyond that, noise is rounded down to powers of this
_FEW_ORDERS = (1.5, 2, 2.5, *range(3, 13), 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 256)


class Accountant:
    """Epsilon of a history, evaluated on demand.

    kind "pld" composes privacy loss distributions (tight, numerically); "rdp" composes Renyi divergences (the
    paper's; looser).
    """

    def __init__(self, kind: str = "pld", history: History | None = None, path: str | Path | None = None) -> None:
        self.kind = _check_kind(kind)
        if history is not None and path is not None:
            raise AccountingError("history and path exclude each other: a History already knows its file")
        self.history = History(path) if history is None else history

    def charge(self, noise_multiplier: float, sample_rate: float) -> None:
        """Record one release. Returns once it cannot be lost; only then may noise be drawn."""
        self.history.charge(noise_multiplier, sample_rate)

    def get_epsilon(self, delta: float, extra_steps: Iterable[tuple[float, float, int]] = ()) -> float:
        """Upper bound on epsilon at `delta` for all releases so far.

        extra_steps: (noise_multiplier, sample_rate, count) of releases that are only planned. With no release at all
        the answer is 0, with one that had no noise it is inf.
        """
        _check_delta(delta, "delta")
        try:
            return _epsilon(self.kind, group(self.history.segments, extra_steps), float(delta))
        except OverflowError:  # noise so small that its privacy loss leaves float64
            return math.inf


def calibrate_noise_multiplier(
    *, target_epsilon: float, target_delta: float, sample_rate: float, steps: int, kind: str = "pld"
) -> float:
    """Smallest noise multiplier found (within 0.05 %) for which `steps` releases cost at most target_epsilon."""
    _check_kind(kind)
    _check_delta(target_delta, "target_delta")
    if not (_is_number(target_epsilon) and math.isfinite(target_epsilon) and target_epsilon > 0):
        raise AccountingError(f"target_epsilon must be positive and finite, got {target_epsilon!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise AccountingError(f"steps must be a positive integer, got {steps!r}")
    check_charge(1.0, sample_rate)

    def epsilon(sigma: float, rough: bool = False) -> float:
        groups = ((sigma, float(sample_rate), steps),)
        if rough:
            return _rdp_epsilon(groups, target_delta, _FEW_ORDERS)
        return _epsilon(kind, groups, target_delta)

    # A cheap bracket first: a distribution at far too little noise takes minutes to build.
    high = 1.0
    while epsilon(high, rough=True) > target_epsilon:
        high *= 1.5
        if high > 1e7:
            raise AccountingError(
                f"target_epsilon={target_epsilon} at target_delta={target_delta} cannot be met with {steps} "
                f"steps at sample_rate={sample_rate}: raise them, or take fewer steps or smaller batches"
            )
    while high > 0.05 and epsilon(high / 1.1, rough=True) <= target_epsilon:
        high /= 1.1
    while epsilon(high) > target_epsilon:  # the rough bound undercut the fine one (grids differ): step back
        high *= 1.1
    low, low_epsilon, high_epsilon = high, 0.0, epsilon(high)
    while low_epsilon <= target_epsilon:
        if low < 0.05:
            return high
        high, high_epsilon = low, epsilon(low)
        low /= 1.25 if high_epsilon > 0.2 * target_epsilon else 2.0
        low_epsilon = epsilon(low)
    return _narrow(epsilon, target_epsilon, (low, low_epsilon), (high, high_epsilon))


def _narrow(epsilon: Any, target: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """Close the bracket (sigma, epsilon) low < high around the target; returns its upper end, which meets it."""
    upward = True
    while high[0] / low[0] > 1.0005:
        middle = math.sqrt(low[0] * high[0])
        if 0 < high[1] < low[1] < math.inf:
            # epsilon is nearly a power of sigma: interpolate in logarithms, then aim a little past the root on the
            # side that moved last, so that both ends close in.
            share = math.log(low[1] / target) / math.log(low[1] / high[1])
            middle = low[0] * (high[0] / low[0]) ** share * (1.0002 if upward else 0.9998)
            margin = (high[0] / low[0]) ** 0.05
            middle = min(max(middle, low[0] * margin), high[0] / margin)
        value = epsilon(middle)
        if value <= target:
            high, upward = (middle, value), False
        else:
            low, upward = (middle, value), True
    return high[0]


def group(segments: Iterable[Segment], extra_steps: Iterable[tuple[float, float, int]] = ()) -> Groups:
    """Number of releases of each (noise multiplier, sample rate)."""
    counts: dict[tuple[float, float], int] = {}
    for segment in segments:
        pair = (segment.noise_multiplier, segment.sample_rate)
        counts[pair] = counts.get(pair, 0) + segment.count
    for noise_multiplier, sample_rate, count in extra_steps:
        pair = check_charge(noise_multiplier, sample_rate)
        if count < 0:
            raise AccountingError(f"extra_steps: a count cannot be negative, got {count}")
        counts[pair] = counts.get(pair, 0) + count
    return tuple((sigma, q, n) for (sigma, q), n in sorted(counts.items()) if n)


@lru_cache(maxsize=4096)
def _epsilon(kind: str, groups: Groups, delta: float) -> float:
    if not groups:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in groups):
        return math.inf
    gaussian = sum(n / (sigma * sigma) for sigma, q, n in groups if q == 1)  # Gaussians compose exactly
    sampled = _merge_nearly_equal(tuple(entry for entry in groups if entry[1] < 1))
    if kind == "pld" and not sampled:
        return _gaussian_epsilon(math.sqrt(gaussian), delta)
    if gaussian:
        sampled += ((1 / math.sqrt(gaussian), 1.0, 1),)
    if kind == "rdp":
        return _rdp_epsilon(sampled, delta)
    return _pld_epsilon(sampled, delta)


def _merge_nearly_equal(groups: Groups) -> Groups:
    """With very many different pairs (a noise scheduler), round the noise down (and rates up) to steps of 3 %.

    Less noise or a higher rate can only cost more, so the result stays an upper bound.
    """
    if len(groups) <= _EXACT_GROUPS:
        return groups
    many_rates = len({q for _, q, _ in groups}) > 4
    counts: dict[tuple[float, float], int] = {}
    for sigma, q, n in groups:
        lower = min(sigma, _MERGE_RATIO ** math.floor(math.log(sigma, _MERGE_RATIO)))
        upper = min(1.0, max(q, _MERGE_RATIO ** math.ceil(math.log(q, _MERGE_RATIO)))) if many_rates else q
        counts[lower, upper] = counts.get((lower, upper), 0) + n
    return tuple((sigma, q, n) for (sigma, q), n in sorted(counts.items()))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon of a Gaussian mechanism with sensitivity / noise = mu (Balle and Wang, 2018, theorem 8)."""
    from scipy.special import log_ndtr

    def delta_at(epsilon: float) -> float:
        first = float(log_ndtr(mu / 2 - epsilon / mu))
        second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
        return math.exp(first) * -math.expm1(min(0.0, second - first))

    if delta_at(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_at(high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if delta_at(middle) <= delta else (middle, high)
    return high


def _pld_epsilon(groups: Groups, delta: float) -> float:
    interval, fine_enough = _discretisation(groups)
    # Rounding in the convolutions may move this much probability; what it could hide is taken off delta.
    rounding = _FFT_ERROR * sum(n for _, _, n in groups)
    if rounding > 0.1 * delta:
        return _rdp_epsilon(groups, delta)
    with _quiet():
        compose = _steps if len(groups) > 1 else _steps.__wrapped__  # a lone group is never asked for twice
        parts = [compose(sigma, q, n, interval) for sigma, q, n in groups]
        while len(parts) > 1:  # a balanced tree: partners of similar size
            parts = [
                parts[i].compose(parts[i + 1]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)
            ]
        epsilon = float(parts[0].get_epsilon_for_delta(delta - rounding))
    return epsilon if fine_enough else min(epsilon, _rdp_epsilon(groups, delta))


def _discretisation(groups: Groups) -> tuple[float, bool]:
    """Grid spacing of the privacy loss, and whether it is fine enough for epsilon to be tight.

    Losses are moved to the grid such that epsilon can only grow: by less than about 1 % where the spacing is a quarter
    of a step's root mean square loss, by some 15 % where it equals it, without limit above that.
    """
    steps = sum(n for _, _, n in groups)
    squares = sum(n * _mean_square_loss(sigma, q) for sigma, q, n in groups)
    typical = math.sqrt(squares / steps)
    wanted = min(_DISCRETISATION, typical / 4)
    ranges = [_loss_range(sigma, q) for sigma, q, _ in groups]
    total = squares + 16 * math.sqrt(squares) + max(ranges)
    least = max(sum(ranges) / max(_POINTS_BUILT, _POINTS_EACH * len(groups)), total / _POINTS_COMPOSED, _FINEST)
    # Powers of two, so that the spacing (and with it the caches) changes rarely as steps are added.
    exponent = math.floor(math.log2(wanted / _DISCRETISATION))
    if _DISCRETISATION * 2.0**exponent < least:
        exponent = math.ceil(math.log2(least / _DISCRETISATION))
    interval = _DISCRETISATION * 2.0**exponent
    return interval, interval <= typical


def _mean_square_loss(sigma: float, q: float) -> float:
    """Order-2 Renyi divergence of one step, about the mean square of its privacy loss."""
    inverse = 1 / (sigma * sigma)
    return 2 * math.log(q) + inverse if inverse > 500 else math.log1p(q * q * math.expm1(inverse))


def _loss_range(sigma: float, q: float) -> float:
    """Width of the privacy losses of one step that have probability above about exp(-50)."""
    top = 10 / sigma + 0.5 / (sigma * sigma)
    if q == 1:
        return 2 * top
    upper = top + math.log(q + (1 - q) * math.exp(-top))
    return upper + min(upper, -math.log1p(-q))


@lru_cache(maxsize=128)
def _steps(sigma: float, q: float, count: int, interval: float) -> Any:
    pld = _one_step(sigma, q, interval)
    if count > 16:
        return pld.self_compose(count)
    result = None  # self_compose first spends 80 passes on bounding the result; by squaring, few steps cost less
    while True:
        if count & 1:
            result = pld if result is None else result.compose(pld)
        count >>= 1
        if not count:
            return result
        pld = pld.compose(pld)


@lru_cache(maxsize=128)
def _one_step(sigma: float, q: float, interval: float) -> Any:
    pld = _dp_accounting().pld.privacy_loss_distribution
    return pld.from_gaussian_mechanism(
        standard_deviation=sigma, sampling_prob=q, value_discretization_interval=interval, pessimistic_estimate=True
    )


def _rdp_epsilon(groups: Groups, delta: float, orders: Sequence[float] | None = None) -> float:
    if orders is None:
        orders = tuple(_dp_accounting().rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
        if len(groups) > _EXACT_GROUPS:
            orders = _FEW_ORDERS
    else:
        orders = tuple(orders)
    with _quiet():
        # The allowance also keeps each divergence positive: dp-accounting reads a negative one as epsilon = 0.
        total = sum(n * (_rdp_of_step(sigma, q, orders) + _RDP_ERROR) for sigma, q, n in groups)
        epsilon, _ = _dp_accounting().rdp.rdp_privacy_accountant.compute_epsilon(orders, total, delta)
    return float(epsilon)


@lru_cache(maxsize=2048)
def _rdp_of_step(sigma: float, q: float, orders: tuple[float, ...]) -> np.ndarray[Any, Any]:
    """Renyi divergence of one step at each order (Mironov, Talwar and Zhang, 2019)."""
    import numpy as np

    library = _dp_accounting()
    accountant = library.rdp.RdpAccountant(orders)
    accountant.compose(library.PoissonSampledDpEvent(q, library.GaussianDpEvent(sigma)))
    return np.maximum(
        np.asarray(accountant._rdp, dtype=np.float64), 0.0
    )  # no public accessor; a missing attribute fails loudly


@lru_cache(maxsize=1)
def _dp_accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld.privacy_loss_distribution
        import dp_accounting.rdp.rdp_privacy_accountant
    except ImportError as error:
        raise AccountingError(
            f"privacy accounting needs the package dp-accounting ({error}); install it with `pip install dp-accounting`"
        ) from error
    return dp_accounting


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """dp-accounting warns through absl of orders that it leaves out, and numpy of overflow there: both are harmless."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        logger.setLevel(level)


def _check_kind(kind: str) -> str:
    if kind in ("gdp", "clt"):
        raise AccountingError(
            f"accountant {kind!r} is refused: the CLT approximation can understate epsilon; use 'pld'"
        )
    if kind not in KINDS:
        raise AccountingError(f"accountant must be one of {KINDS}, got {kind!r}")
    return kind


def _check_delta(delta: float, name: str) -> None:
    if not (_is_number(delta) and 0 < delta < 1):
        raise AccountingError(f"{name} must lie in (0, 1), got {delta!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
