"""What does the host do in a step? A RoBERTa so narrow that its arithmetic costs nothing: Python, autograd, dispatch.

    python -m bench.bench_host [--layers 12] [--save]

On a GPU that waits for launches, this is the step. Plain bias-only autograd and ours take turns; medians, in
milliseconds, of the forward, the backward and the update (with clipping, noise and accounting), one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dp_bitfit_kernels as dpk
from bench import results
from bench.environment import environment

BATCH, LENGTH, TURNS = 2, 8, 80
PARTS = ("forward", "backward", "update")


def _model(layers: int) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return RobertaForSequenceClassification(config)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # foreach, as is torch's default on a GPU
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=True)


def _timed(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, labels: Tensor) -> tuple[float, ...]:
    marks = [time.perf_counter()]
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(input_ids=tokens).logits, labels)
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    optimizer.step()
    marks.append(time.perf_counter())
    return tuple(1e3 * (b - a) for a, b in pairwise(marks))


def measure(layers: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    tokens, labels = torch.randint(4, 50, (BATCH, LENGTH)), torch.zeros(BATCH, dtype=torch.long)
    plain, private = _model(layers), dpk.convert_model(_model(layers))
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    engine, of_plain = dpk.PrivacyEngine(), _optimizer(plain)
    private, optimizer, _ = engine.make_private(
        module=private,
        optimizer=_optimizer(private),
        data_loader=DataLoader(range(100 * BATCH), batch_size=BATCH),  # type: ignore[arg-type]
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    warnings.filterwarnings("ignore", message="this batch does not come from the private loader")
    taken: dict[str, list[tuple[float, ...]]] = {"plain": [], "private": []}
    for _ in range(TURNS):
        taken["plain"].append(_timed(plain, of_plain, tokens, labels))
        with engine.batch(BATCH):
            taken["private"].append(_timed(private, optimizer, tokens, labels))
    found = {}
    for name, turns in taken.items():
        parts = {part: statistics.median(turn[i] for turn in turns[10:]) for i, part in enumerate(PARTS)}
        found[name] = parts | {"step": statistics.median(sum(turn) for turn in turns[10:])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    recorded, found = environment(), measure(given.layers)
    for name, value in found.items():
        print(f"{name:8s} " + ", ".join(f"{part} {value[part]:6.2f} ms" for part in (*PARTS, "step")))
    if given.save:
        results.write("host.json", {"bench": "host", "environment": recorded, "layers": given.layers, "ms": found})


if __name__ == "__main__":
    main()
