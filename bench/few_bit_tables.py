"""Finds the tables of dp_bitfit_kernels/few_bits.py: `python -m bench.few_bit_tables`.

Eight pieces on which the derivative of an activation is nearest to a constant, in the mean square under a normal input
of standard deviation 2, over all ways to cut a fine grid (dynamic programming: exact on the grid).
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray

from dp_bitfit_kernels.reference_backward import KINDS, PLANES, derivative

DEVIATION = 2.0
REACH = 10.0
POINTS = 2001


NAMES = (*KINDS, "tanh")


def slope(name: str, x: torch.Tensor) -> torch.Tensor:
    return 1.0 - torch.tanh(x).square() if name == "tanh" else derivative(x, KINDS.index(name))


def best_pieces(name: str, pieces: int = 2**PLANES) -> tuple[list[float], list[float], float]:
    """Edges (pieces - 1) and levels (pieces) of an activation's derivative, and the mean squared error."""
    grid = np.linspace(-REACH, REACH, POINTS)
    weight = np.exp(-0.5 * (grid / DEVIATION) ** 2)
    weight /= weight.sum()
    value: NDArray[np.float64] = slope(name, torch.from_numpy(grid)).numpy()
    sums = [np.concatenate([[0.0], np.cumsum(weight * value**power)]) for power in (0, 1, 2)]

    def of_span(sum_: NDArray[np.float64]) -> NDArray[np.float64]:
        return sum_[None, :] - sum_[:, None]  # [first, end]

    mass, first, second = (of_span(s) for s in sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(mass > 0, second - first**2 / mass, 0.0)
    error[np.tril_indices(POINTS + 1)] = np.inf  # a piece holds a point at least
    best, cuts = error[0], []
    for _ in range(pieces - 1):
        total = best[:, None] + error
        cuts.append(total.argmin(0))
        best = total.min(0)
    ends = [POINTS]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    ends = [0, *sorted(ends)]
    edges = [float(grid[end - 1] + grid[end]) / 2 for end in ends[1:-1]]
    levels = [float(first[a, b] / mass[a, b]) for a, b in itertools.pairwise(ends)]
    return edges, levels, float(best[-1])


def main() -> None:
    for name in NAMES:
        edges, levels, error = best_pieces(name)
        print(f'"{name}": ({", ".join(f"{edge:.3f}" for edge in edges)}),')
        print(
            f'"{name}": ({", ".join(f"{level:.6f}" for level in levels)}),  # root mean square error {error**0.5:.4f}'
        )


if __name__ == "__main__":
    main()
