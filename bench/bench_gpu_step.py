"""A private bias-only step on a GPU against the same step without privacy: eager, bf16 autocast, time and peak memory.

    python -m bench.bench_gpu_step [--json FILE] [--cases roberta_base_t128,...]

Ours and plain autograd take turns within one run (medians of their ratios side by side); a second plain model is the
control. Random weights: times and bytes do not depend on what a network has learnt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import dp_bitfit_kernels as dpk

ROUNDS = 12


def _roberta(layers: int, width: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        config = RobertaConfig(
            vocab_size=50_265,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            max_position_embeddings=514,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return RobertaForSequenceClassification(config)

    return build


# name -> (model, B, T)
CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "roberta_base_t128": (_roberta(12, 768), 32, 128),
    "roberta_base_t512": (_roberta(12, 768), 32, 512),
    "roberta_large_t128": (_roberta(24, 1024), 32, 128),
    "roberta_large_t512": (_roberta(24, 1024), 32, 512),
}


def _loss(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits.float(), labels)


def _plain(build: Callable[[], nn.Module], tokens: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    model = build().cuda().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        _loss(model, tokens, labels).backward()
        optimizer.step()

    return step


def _ours(build: Callable[[], nn.Module], tokens: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    model = dpk.convert_model(build().cuda().train())
    batch = len(tokens)
    engine = dpk.PrivacyEngine()
    model, optimizer, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3),
        data_loader=DataLoader(range(100 * batch), batch_size=batch),  # type: ignore[arg-type]
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    warnings.filterwarnings("ignore", message="this batch does not come from the private loader")

    def step() -> None:
        with engine.batch(batch):
            optimizer.zero_grad()
            _loss(model, tokens, labels).backward()
            optimizer.step()

    return step


def _milliseconds(step: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _peak(make: Callable[[], Callable[[], None]]) -> int:
    torch.cuda.empty_cache()
    step = make()
    step()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def run_case(build: Callable[[], nn.Module], batch: int, length: int) -> dict[str, Any]:
    tokens = torch.randint(4, 50_000, (batch, length), device="cuda")
    labels = torch.randint(0, 2, (batch,), device="cuda")
    makers = {
        "ours": lambda: _ours(build, tokens, labels),
        "plain_bias": lambda: _plain(build, tokens, labels),
        "control": lambda: _plain(build, tokens, labels),
    }
    peaks = {name: _peak(make) for name, make in makers.items() if name != "control"}
    torch.cuda.empty_cache()
    steps = {name: make() for name, make in makers.items()}
    for step in steps.values():
        step()
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS):
        names = list(steps)
        for name in names[turn % 3 :] + names[: turn % 3]:
            taken[name].append(_milliseconds(steps[name]))
    base = taken["plain_bias"]
    return {
        "ms": {name: statistics.median(values) for name, values in taken.items()},
        "time_ratio": {
            name: statistics.median(a / b for a, b in zip(values, base, strict=True)) for name, values in taken.items()
        },
        "peak_bytes": peaks,
        "peak_ratio": peaks["ours"] / peaks["plain_bias"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    given = parser.parse_args()
    found: dict[str, Any] = {"cases": {}, "table": []}
    for name in given.cases.split(","):
        case = found["cases"][name] = run_case(*CASES[name])
        line = (
            f"{name:20s} ours {case['ms']['ours']:7.1f} ms, plain {case['ms']['plain_bias']:7.1f} ms: "
            f"x{case['time_ratio']['ours']:.3f} (control x{case['time_ratio']['control']:.3f}), "
            f"peak x{case['peak_ratio']:.3f}"
        )
        found["table"].append(line)
        print(line, flush=True)
        torch.cuda.empty_cache()
        if given.json:
            given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
