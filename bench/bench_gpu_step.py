"""A private bias-only step on a GPU against the same step without privacy: bf16 autocast, time and peak memory.

    python -m bench.bench_gpu_step [--json FILE] [--cases roberta_base_t128,...] [--modes eager,graph,compiled]

Ours and plain autograd take turns within one run (medians of their ratios side by side), each in the same mode: eager,
compiled by torch.compile, or as CUDA graphs; a second plain model is the control. In graphs also the floor: the frozen
model's forward, and a backward to its inputs alone. Random weights: times and bytes do not depend on what was learnt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dp_bitfit_kernels as dpk
from bench.gpu_models import CASES, GpuCase, loss_of

ROUNDS = 12
# Compiling takes longer than all else together: one case, unless more are asked for.
DEFAULT = [(case, mode) for case in CASES if case != "tiny" for mode in ("eager", "graph")]
DEFAULT.append(("roberta_base_t128", "compiled"))
Step = Callable[[], object]


class Bench:
    """One case in one mode; every method gets the same inputs."""

    def __init__(self, case: GpuCase, mode: str):
        self.case, self.mode = case, mode
        self.inputs = case.inputs(case.batch)
        self.labels = torch.arange(case.batch, device=self.inputs.device) % 2

    def model(self) -> nn.Module:
        with torch.device(self.inputs.device):
            return self.case.build().train()

    def loss(self, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        called = torch.compile(model, dynamic=False) if self.mode == "compiled" else model
        return lambda inputs, labels: loss_of(called, self.case.argument, inputs, labels)

    def ours(self) -> Step:
        model = dpk.convert_model(self.model())
        engine, batch = dpk.PrivacyEngine(), self.case.batch
        model, optimizer, _ = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3),
            data_loader=DataLoader(range(100 * batch), batch_size=batch),  # type: ignore[arg-type]
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
        loss = self.loss(model)
        if self.mode == "graph":
            captured = dpk.capture_step(optimizer, loss)
            return lambda: captured(self.inputs, self.labels)

        def step() -> None:
            with engine.batch(batch):
                optimizer.zero_grad()
                loss(self.inputs, self.labels).backward()
                optimizer.step()

        return step

    def plain_bias(self) -> Step:
        model = self.model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, loss = torch.optim.SGD(trained, lr=1e-3), self.loss(model)

        def step() -> None:
            optimizer.zero_grad()
            loss(self.inputs, self.labels).backward()
            optimizer.step()

        return self._graphed(step) if self.mode == "graph" else step

    def floor(self) -> Step:
        model = self.model().requires_grad_(False)
        inputs = self.inputs
        if self.case.embedded != self.case.argument:
            inputs = model.get_input_embeddings()(inputs)  # type: ignore[operator]
        inputs = inputs.detach().requires_grad_()

        def step() -> None:
            torch.autograd.grad(loss_of(model, self.case.embedded, inputs, self.labels), inputs)

        return self._graphed(step)

    def _graphed(self, step: Step) -> Step:
        if self.inputs.device.type != "cuda":
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def _milliseconds(step: Step) -> float:
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begun)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _peak(make: Callable[[], Step]) -> int:
    """Bytes of tensors and of graphs at the most, from the first step on."""
    if not torch.cuda.is_available():
        return 1
    torch.cuda.empty_cache()
    step = make()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(6):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def run_case(case: GpuCase, mode: str) -> dict[str, Any]:
    bench = Bench(case, mode)
    makers: dict[str, Callable[[], Step]] = {
        "ours": bench.ours,
        "plain_bias": bench.plain_bias,
        "control": bench.plain_bias,
    }
    peaks = {name: _peak(makers[name]) for name in ("ours", "plain_bias") if mode != "compiled"}
    if mode == "graph":
        makers["floor"] = bench.floor
    steps = {name: make() for name, make in makers.items()}
    for step in steps.values():
        for _ in range(6):  # past the eager steps before a capture
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(ROUNDS):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(_milliseconds(steps[name]))
    base = taken["plain_bias"]
    found: dict[str, Any] = {
        "ms": {name: statistics.median(values) for name, values in taken.items()},
        "time_ratio": {
            name: statistics.median(a / b for a, b in zip(values, base, strict=True)) for name, values in taken.items()
        },
    }
    if "floor" in taken:
        pairs = zip(taken["ours"], taken["floor"], strict=True)
        found["ratio_to_floor"] = statistics.median(a / b for a, b in pairs)
    if peaks:
        found |= {"peak_bytes": peaks, "peak_ratio": peaks["ours"] / peaks["plain_bias"]}
    return found


def line_of(name: str, mode: str, case: dict[str, Any]) -> str:
    ms, ratio = case["ms"], case["time_ratio"]
    line = f"{name:20s} {mode:8s} ours {ms['ours']:7.2f} ms, plain {ms['plain_bias']:7.2f} ms: x{ratio['ours']:.3f}"
    line += f" (control x{ratio['control']:.3f})"
    line += f", floor x{case['ratio_to_floor']:.3f}" if "ratio_to_floor" in case else ""
    return line + (f", peak x{case['peak_ratio']:.3f}" if "peak_ratio" in case else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", help="names, by comma; default: all, but compiled only the first")
    parser.add_argument("--modes", default="eager,graph,compiled")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="this batch does not come from the private loader")
    modes = given.modes.split(",")
    wanted = [(name, mode) for name, mode in DEFAULT if mode in modes]
    if given.cases:
        wanted = [(name, mode) for name in given.cases.split(",") for mode in modes]
    found: dict[str, Any] = {"cases": {}, "table": [], "failed": {}}
    for name, mode in wanted:
        try:
            case = found["cases"][f"{name}_{mode}"] = run_case(CASES[name], mode)
            line = line_of(name, mode, case)
        except Exception as error:  # noqa: BLE001  the other cases must still run
            found["failed"][f"{name}_{mode}"] = f"{type(error).__name__}: {error}"
            line = f"{name:20s} {mode:8s} FAILED: {type(error).__name__}: {str(error)[:150]}"
        found["table"].append(line)
        print(line, flush=True)
        if torch.cuda.is_available():
            torch._dynamo.reset()
            torch.cuda.empty_cache()
        if given.json:
            given.json.write_text(json.dumps(found))
    raise SystemExit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
