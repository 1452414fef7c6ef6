"""Eight levels that stand for the derivative of an activation: memory="compact".

Few-bit Backward (Novikov et al., arXiv 2202.00441): only the derivative at each element enters the input gradient,
so a piecewise constant function may stand for it, and only the number of the piece is kept. Here the pieces minimise
the mean squared error under a normal input of standard deviation 2, which covers what reaches an activation of a
pre-trained model (most within +-1, tails to 6 and beyond): ``python -m bench.few_bit_tables`` finds them by dynamic
programming, and a test finds them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Root mean square errors: 0.045, 0.045, 0.039, 0.038, 0.062.
EDGES: dict[str, tuple[float, ...]] = {
    "gelu": (-0.695, -0.375, -0.105, 0.155, 0.435, 0.775, 2.285),
    "gelu_tanh": (-2.285, -0.775, -0.435, -0.155, 0.105, 0.375, 0.695),
    "silu": (-1.265, -0.755, -0.365, -0.005, 0.355, 0.755, 1.265),
    "quick_gelu": (-0.715, -0.435, -0.205, 0.005, 0.215, 0.445, 0.725),
    "tanh": (-1.515, -0.945, -0.525, 0.475, 0.795, 1.155, 1.695),
}
LEVELS: dict[str, tuple[float, ...]] = {
    "gelu": (-0.063954, 0.114935, 0.313517, 0.519803, 0.726898, 0.924125, 1.095674, 1.016628),
    "gelu_tanh": (-0.016564, -0.095867, 0.076068, 0.273138, 0.480197, 0.686461, 0.884916, 1.064039),
    "silu": (-0.069525, 0.074266, 0.236238, 0.408757, 0.586362, 0.761519, 0.925734, 1.069525),
    "quick_gelu": (-0.056475, 0.082236, 0.242315, 0.415829, 0.592496, 0.764949, 0.922973, 1.056832),
    "tanh": (0.049404, 0.302845, 0.611451, 0.924410, 0.685410, 0.441074, 0.216863, 0.036201),
}


_made: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}


def tables(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Edges [7] and levels [8] float32 of an activation, on the device."""
    found = _made.get((name, device))
    if found is None:
        edges, levels = (torch.tensor(t[name], dtype=torch.float32, device=device) for t in (EDGES, LEVELS))
        found = (edges, levels)
        if type(found[0]) is Tensor:  # not of a mode that only plays tensors
            _made[name, device] = found
    return found
