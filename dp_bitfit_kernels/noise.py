"""The key of the noise and of the sampler, and what finite precision costs.

The stream itself is ChaCha20 (RFC 8439) and lives in the ops ``random_words`` and ``noisy_sum``; PyTorch's
generators take no part in it.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ._validate import AccountingError, EngineError

STREAM_NOISE = 0
STREAM_SAMPLER = 1
KEY_BYTES = 32

_GRID = 2**20  # sensitivity of the integer sum; clipping.GRID, which this module does not import
_fork_generation = 0


def _count_fork() -> None:
    global _fork_generation
    _fork_generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class KeySource:
    """Owner of one 256-bit ChaCha20 key.

    Guarantees:

    * The key is 32 fresh bytes of ``os.urandom`` per object. No seed of PyTorch, NumPy or Python changes it.
    * A copy, a deep copy and a forked child each draw a key of their own before their first use, so that
      no (key, step) pair is ever used twice.
    * The key leaves the object only as the tensor that the ops take: not by ``repr``, not by pickling
      (refused), hence not by a checkpoint.

    ``unsafe_deterministic_seed`` derives the key from an integer instead, copies and forks included. Whoever
    knows the seed can subtract the noise: with it every privacy statement is epsilon = inf.
    """

    def __init__(self, unsafe_deterministic_seed: int | None = None):
        self._seed = None if unsafe_deterministic_seed is None else int(unsafe_deterministic_seed)
        self._tensors: dict[torch.device, Tensor] = {}
        self._draw()

    @property
    def deterministic(self) -> bool:
        """True where the key follows from a seed, and so protects nothing."""
        return self._seed is not None

    def key_tensor(self, device: torch.device | str) -> Tensor:
        """The key as 8 little-endian words -> [8] int32 on ``device``; the same tensor at each call."""
        if self._owner != (os.getpid(), _fork_generation):
            self._draw()
        device = torch.device(device)
        if device not in self._tensors:
            words = np.frombuffer(self._key, dtype="<i4").astype(np.int32)
            self._tensors[device] = torch.from_numpy(words).to(device)
        return self._tensors[device]

    def _draw(self) -> None:
        if self._seed is None:
            self._key = os.urandom(KEY_BYTES)
        else:
            self._key = hashlib.sha256(b"dp_bitfit_kernels unsafe seed %d" % self._seed).digest()
        self._owner = (os.getpid(), _fork_generation)
        self._tensors.clear()

    def __copy__(self) -> KeySource:
        return KeySource(self._seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeySource:
        return KeySource(self._seed)

    def __reduce__(self) -> NoReturn:
        raise EngineError(
            "the noise key is never saved: a KeySource cannot be pickled. Use engine.save_checkpoint, which leaves "
            "the key out; a resumed run draws a fresh one"
        )

    def __repr__(self) -> str:
        return f"KeySource(deterministic={self.deterministic})"


def total_variation(sigma: float, dimension: int, steps: int) -> float:
    """Bound on the part of the numerical error that no factor e^a covers; see ``delta_slack``."""
    _check(sigma, dimension, steps)
    if sigma > 2.0**10:
        return 1.0
    return min(1.0, _pairs(dimension, steps) * 2.0**-76 * sigma * _GRID)


def epsilon_slack(sigma: float, dimension: int, steps: int) -> float:
    """The 2 a of ``delta_slack``: what float64 rounding adds to epsilon (about 1e-4 to 1e-3)."""
    distance = total_variation(sigma, dimension, steps)
    if distance in (0.0, 1.0):  # nothing to bound, or no bound
        return 0.0
    pairs = _pairs(dimension, steps)
    excess = math.log(1024.0 / distance)  # ln(1 / delta_a), delta_a = distance / 1024
    spread = pairs * 2.0**-92 * (sigma * _GRID) ** 2
    # exp(-(m - 1) a + m n tau + m^2 n chi^2) = delta_a, at the best m that keeps m * x_max <= 1
    order = max(2.0, min(2.0**20 / sigma, math.sqrt(excess / spread)))
    return 2.0 * (excess + order * distance + order**2 * spread) / (order - 1.0)


def delta_slack(sigma: float, dimension: int, steps: int, epsilon: float = 8.0) -> float:
    """Bound on the extra delta of the float64 noise against exact Gaussian noise.

    Let the ideal mechanism, ``steps`` releases of ``dimension`` coordinates S + floor(s z + 1/2) with
    s = sigma * 2^20 and exact independent z ~ N(0, 1), be (e, d)-DP for an e <= ``epsilon``. It is a rounding of
    the Gaussian mechanism, whose accounting it inherits. Guarantee: with u1 uniform of 76 and u2 of 52 bits (ChaCha20
    as an ideal cipher), the implemented mechanism is (e + 2 a, e^a d + delta_slack)-DP, 2 a = ``epsilon_slack``.

    Derivation, per Box-Muller pair, n = steps * ceil((dimension + 1) / 2) of them. Couple u1 + 1 = ceil(2^76 U1) and
    u2, to the nearest, 2^52 U2 with real uniforms U1, U2; r is the pair's radius, a cell a square of side w = 1 / s
    (one pair of integers). Four errors move the edges of the cells:

    (1) rounding of ln, sqrt, sine, cosine and products: at most 2^-49 |z| (tests measure it);
    (2) rounding of (u1 + 1) / 2^76, or from 3/4 on of its distance from 1, to float64, relative 2^-52: r by at most
        1.75 * 2^-52 min(r, 1 / r);
    (3) the steps of u1: r by at most 2^-76 / (U1 r), U1 = exp(-r^2 / 2);
    (4) the steps of u2: along the circle, by at most pi * 2^-52 r.

    For r <= 7.18 a cell's probability changes by a factor within 1 +- x, and adding up its four edges, none of which is
    nearer to 0 than w / 2, x(r) <= s (4.6 * 2^-49 r + 2.83 * 2^-76 e^(r^2 / 2) / r), so that x <= x_max = 2^-20 sigma
    and chi^2 = E x^2 <= 2^-92 s^2. For r > 7.18 count the probability tau that the two fall into different cells:

    * errors (1), (2) and (4): E x <= 0.03 * 2^-76 s.
    * error (3): a cell's count of u1 is wrong by a sawtooth of the phase y = 2^76 exp(-r^2 / 2) averaged
      along its edges. An edge at polar angle phi sweeps w r |cos phi| y phases; integration by parts bounds its
      part by min(1/2, 0.3 / (w r |cos phi| y)). Summed over all edges up to the r2 where w r y = 1, trebled for the
      strips in which (1), (2) and (4) act on a lattice, and beyond r2 by the mass exp(-r2^2 / 2) = 2^-76 s / r2 (which
      holds the cut at r = 10.26): <= 0.49 * 2^-76 s. A model with short words shows less than half of what this formula
      gives.

    Together tau <= 2^-76 s for sigma <= 2^10 (above, 1 is returned); n tau is ``total_variation``. On the rest, the
    log ratio L of the implemented to the ideal probability of a whole transcript (batches revealed, which can only
    help) has, for m x_max <= 1, ln E e^((m - 1) L) <= m n tau + m^2 n chi^2 in either direction; hence
    P(L > a) <= delta_a = n tau / 1024 for the a of ``epsilon_slack``. Going from the implemented to the ideal
    mechanism on D, over to D', and back again gives delta_slack = (1 + e^(epsilon + 2 a)) (n tau + delta_a).

    The cut alone costs 2^-76 a pair; the rest of tau is the price of u1's steps and falls with each further bit.
    """
    distance = total_variation(sigma, dimension, steps)
    exponent = epsilon + epsilon_slack(sigma, dimension, steps)
    if exponent > 700.0:
        return 1.0
    return min(1.0, (1.0 + math.exp(exponent)) * distance * (1.0 + 1.0 / 1024.0))


def _pairs(dimension: int, steps: int) -> int:
    return steps * ((dimension + 2) // 2) if dimension else 0


def _check(sigma: float, dimension: int, steps: int) -> None:
    if not (math.isfinite(sigma) and sigma >= 0.0):
        raise AccountingError(f"sigma must be finite and not negative, got {sigma}")
    if dimension < 0 or steps < 0:
        raise AccountingError(f"dimension and steps must not be negative, got {dimension} and {steps}")
