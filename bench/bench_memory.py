"""What does a model keep for its backward pass, and what does keeping less cost in time?

    pytest bench/bench_memory.py                                    every case; result file and figure
    python -m bench.bench_memory --cases roberta,gpt2 [--no-time] [--save]   some

Bytes twice over, in one run: what autograd is seen to save (saved-tensor hooks), and how much more the allocator has
handed out when the forward has ended than before it began, output included, so that nothing kept beside autograd
escapes. Both against plain autograd that trains the same biases, BatchNorm by its statistics. Before any number, the
gradient of every bias is compared with plain autograd's under the same random masks. Each case has a process of its
own, so that no case meets the heap that another left.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

import dp_bitfit_kernels as dpk
from bench import memory_models, memory_plot, results
from bench.environment import environment
from bench.memory_models import CASES, MemoryCase
from bench.providers import is_bias
from bench.timing import interleave
from dp_bitfit_kernels._allocator import peak_bytes

METHODS = ("plain_full", "plain_bias", "off", "exact", "compact")
TOLERANCE = 1e-4  # of the largest element of all gradients; float32 against float32
SECONDS = 100.0
ROUNDS = 60


def prepare(model: nn.Module, method: str) -> nn.Module:
    """The model as the method trains it. Statistics of BatchNorm are frozen throughout."""
    if method in ("off", "exact", "compact"):
        dpk.convert_model(model, memory=method)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "plain_full" or is_bias(name))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def bias_gradients(case: MemoryCase, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(5)
    case.run(model, inputs).float().sin().sum().backward()
    grads = [p.grad.flatten() for name, p in model.named_parameters() if is_bias(name) and p.grad is not None]
    model.zero_grad()
    return torch.cat(grads).double()


def check(case: MemoryCase, base: nn.Module) -> dict[str, float]:
    """Largest difference of a bias's gradient from plain autograd's, relative to the largest gradient.

    On a quarter of the table's size; compact is lossy by design and only reported.
    """
    inputs = case.inputs(2, max(32, case.sizes[0][1] // 4))
    if case.name == "vit":
        inputs = case.inputs(2, 224)
    want = bias_gradients(case, prepare(copy.deepcopy(base), "plain_bias"), inputs)
    found = {}
    for method in ("off", "exact", "compact"):
        got = bias_gradients(case, prepare(copy.deepcopy(base), method), inputs)
        found[method] = float((got - want).abs().max() / want.abs().max())
        if method != "compact" and not found[method] <= TOLERANCE:
            raise AssertionError(f"{case.name}, {method}: gradients differ by {found[method]:.2e} of the largest")
    found["compact_norm"] = float((got - want).norm() / want.norm())
    return found


def kept(case: MemoryCase, model: nn.Module, batch: int, size: int) -> dict[str, int]:
    """Bytes by saved-tensor hooks, by the allocator after a forward, and at the peak of forward and backward."""
    inputs = case.inputs(batch, size)
    given = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs.values())}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() and storage.data_ptr() not in given:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = case.run(model, inputs)
    hooks = sum(seen.values())
    del output
    held = peak_bytes(lambda: lambda: case.run(model, inputs), warm_up=0)

    def step() -> None:
        case.run(model, inputs).float().sum().backward()
        model.zero_grad()

    whole = peak_bytes(lambda: step, warm_up=0)
    return {"hooks": hooks, "allocator": held.after - held.resident, "peak": whole.peak - whole.resident}


def measure_memory(case: MemoryCase, base: nn.Module, methods: Iterable[str] = METHODS) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for batch, size in case.sizes:
        rows = {}
        for method in methods:
            rows[method] = kept(case, prepare(copy.deepcopy(base), method), batch, size)
            gc.collect()
        plain = rows["plain_bias"]
        ratios = {m: {measure: row[measure] / plain[measure] for measure in row} for m, row in rows.items()}
        found[str(size)] = {"batch": batch, "bytes": rows, "ratio": ratios}
    return found


def measure_curve(case: MemoryCase, base: nn.Module) -> dict[str, dict[str, float]]:
    """Bytes per sample by the allocator, against the size of the input; Opacus' hooks beside ours where it can."""
    curve: dict[str, dict[str, float]] = {}
    for method in (*METHODS, "opacus_hooks"):
        curve[method] = {}
        for size in case.curve:
            model = copy.deepcopy(base)
            try:
                model = opacus_hooks(model) if method == "opacus_hooks" else prepare(model, method)
                found = peak_bytes(lambda m=model, s=size: lambda: case.run(m, case.inputs(1, s)), warm_up=0)
            except NotImplementedError as refused:  # by Opacus, for a layer that it does not know
                print(f"  {case.name}: no line for Opacus: {str(refused)[:150]} ...")
                break
            curve[method][str(size)] = found.after - found.resident
    return {method: line for method, line in curve.items() if line}


def opacus_hooks(model: nn.Module) -> nn.Module:
    from opacus import GradSampleModule

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_bias(name))
    wrapped: nn.Module = GradSampleModule(model)
    return wrapped


TIMED: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet50": (memory_models.resnet, 4, 224),
    "roberta": (lambda: memory_models.roberta(2), 8, 128),
    "vit": (lambda: memory_models.vit(2), 4, 224),
    "gpt2": (lambda: memory_models.gpt2(2), 2, 512),
    "conv_groupnorm": (memory_models.conv_groupnorm, 4, 224),
}


def measure_time(name: str, threads: int, seconds: float = SECONDS) -> dict[str, Any]:
    """Forward and backward, not private, interleaved: what keeping less costs or saves by itself."""
    case = CASES[name]
    build, batch, size = TIMED[name]
    inputs = case.inputs(batch, size)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base = build()
    models = {m: prepare(copy.deepcopy(base), m) for m in ("plain_bias", "exact", "compact")}
    models["control"] = prepare(copy.deepcopy(base), "plain_bias")

    def stepping(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            case.run(model, inputs).float().sum().backward()
            model.zero_grad()

        return step

    steps = {name: stepping(model) for name, model in models.items()}
    samples = interleave(steps, rounds=ROUNDS, every={}, budget_s=seconds)
    return {
        "rounds": samples.rounds,
        "batch": batch,
        "size": size,
        "median_ms": {name: 1e3 * samples.median(name) for name in steps},
        "ratio": {name: samples.ratio(name, "plain_bias").to_json() for name in steps},
    }


def run_case(name: str) -> dict[str, Any]:
    case = CASES[name]
    torch.manual_seed(0)
    base = case.build()
    found: dict[str, Any] = {"reason": case.reason, "check": check(case, base)}
    found["memory"] = measure_memory(case, base)
    if case.curve:
        found["curve"] = measure_curve(case, base)
    found["targets"] = targets(case, found)
    return found


def targets(case: MemoryCase, found: dict[str, Any]) -> dict[str, bool]:
    met = {}
    for size, memory in found["memory"].items():
        for method, limit in (("exact", case.exact), ("compact", case.compact)):
            if limit is not None:
                worst = max(memory["ratio"][method][measure] for measure in ("hooks", "allocator"))
                met[f"{method} at {size}: {worst:.3f} <= {limit:.3f}"] = worst <= limit
    return met


def summary(name: str, found: dict[str, Any]) -> str:
    lines = [name, *(f"  {'met   ' if met else 'MISSED'} {what}" for what, met in found["targets"].items())]
    for size, memory in found["memory"].items():
        for method, row in memory["bytes"].items():
            ratio = memory["ratio"][method]
            shown = "  ".join(f"{measure} {row[measure] / 2**20:9.2f} MiB x{ratio[measure]:.3f}" for measure in row)
            lines.append(f"  {size:>5} {method:11s} {shown}")
    return "\n".join(lines)


def times(name: str, found: dict[str, Any]) -> list[str]:
    lines = []
    for threads, time in found["time"].items():
        shown = "  ".join(f"{m} x{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for m, r in time["ratio"].items())
        lines.append(f"{name}, {threads} thread(s), plain {time['median_ms']['plain_bias']:.0f} ms: {shown}")
    return lines


def alone(job: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What the job returns, run in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *arguments).result()


def run(names: Iterable[str], *, time: bool = True, save: bool = False) -> None:
    """Bytes of every case first, then the times, which want a quiet machine."""
    names = list(names)
    for name in names:
        found = alone(run_case, name)
        print(summary(name, found), flush=True)
        if save:
            publish(name, {"environment": environment(), **found})
    for name in names:
        if time and name in TIMED:
            timed = {"time": {str(threads): alone(measure_time, name, threads) for threads in (1, 2)}}
            print("\n".join(times(name, timed)), flush=True)
            if save:
                publish(name, timed)


def publish(name: str, found: dict[str, Any]) -> None:
    """Put what was found of a case into the result file, beside what is there; the figure is drawn anew."""
    target = results.path("memory.json")
    content = json.loads(target.read_text()) if target.exists() else {"cases": {}}
    command = f"python -m bench.bench_memory --cases {name} --save"
    content["cases"].setdefault(name, {}).update(found, command=command)
    results.write("memory.json", content)
    memory_plot.draw(content, results.path("memory.png"))


def test_memory(benchmark: Any) -> None:
    benchmark.pedantic(lambda: run(CASES, save=True), rounds=1, iterations=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--save", action="store_true", help="also into bench/results/cpu/memory.json and .png")
    options = parser.parse_args()
    run(options.cases.split(","), time=not options.no_time, save=options.save)


if __name__ == "__main__":
    main()
