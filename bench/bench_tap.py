"""What does a tap cost by itself? Linear layers so small that only Python and dispatch are left, per layer and step.

    python -m bench.bench_tap [--save]

Least of several turns, forward and backward apart: plain bias-only autograd, converted without an engine, private. In a
real step the same code runs on caches that the layers' arithmetic has emptied, and takes longer.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader

import dp_bitfit_kernels as dpk
from bench import results
from bench.environment import environment

LAYERS, BATCH, WIDTH, TURNS, STEPS = 20, 4, 8, 15, 50


def _model() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def _turn(model: nn.Module, inputs: torch.Tensor, release: Callable[[], object]) -> tuple[float, float]:
    """Microseconds a layer of the forward and of the backward."""
    forward = backward = 0.0
    for _ in range(STEPS):
        begun = time.perf_counter()
        loss = model(inputs).sum()
        between = time.perf_counter()
        loss.backward()
        backward += time.perf_counter() - between
        forward += between - begun
        release()
    return 1e6 * forward / STEPS / LAYERS, 1e6 * backward / STEPS / LAYERS


def measure() -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    inputs = torch.randn(BATCH, WIDTH)
    plain, converted, private = _model(), dpk.convert_model(_model()), dpk.convert_model(_model())
    engine = dpk.PrivacyEngine()
    private, optimizer, _ = engine.make_private(
        module=private,
        optimizer=torch.optim.SGD([p for p in private.parameters() if p.requires_grad], lr=0.0),
        data_loader=DataLoader(range(100 * BATCH), batch_size=BATCH),  # type: ignore[arg-type]
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    warnings.filterwarnings("ignore", message="this batch does not come from the private loader")
    turns: dict[str, Callable[[], tuple[float, float]]] = {
        "plain": lambda: _turn(plain, inputs, plain.zero_grad),
        "converted": lambda: _turn(converted, inputs, converted.zero_grad),
        "private": lambda: _turn(private, inputs, optimizer.step),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for _ in range(TURNS):
        for name, turn in turns.items():
            taken[name].append(turn())
    parts = ("forward", "backward")
    return {name: {part: min(t[i] for t in kept) for i, part in enumerate(parts)} for name, kept in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    recorded, found = environment(), measure()
    for name, value in found.items():
        print(f"{name:10s} forward {value['forward']:5.1f} us, backward {value['backward']:5.1f} us a layer")
    if given.save:
        results.write("tap.json", {"bench": "tap", "environment": recorded, "microseconds_a_layer": found})


if __name__ == "__main__":
    main()
