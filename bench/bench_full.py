"""What does private training of all weights cost, and how does it grow?

    pytest bench/bench_full.py                       everything: results/cpu/full.json, growth.json, sizes.json, PNGs
    python -m bench.bench_full step --threads 1      one part: step | growth | sizes; --only, --save NAME

* ``step``: ours and the methods of the literature, by our options and by Opacus, against the same step without privacy.
  Each is checked against one-sample gradients in float64 first; who fails gets no number.
* ``growth``: time and peak bytes of a step against the length of texts and the side of images, as in figure 3 of the
  paper (arXiv 2210.00036), biases against all weights.
* ``sizes``: the largest batch that a given memory holds, from peaks of ever larger batches until each sample adds the
  same to them, and records a second, against the width of the model, as in its figure 4.

The layout of a model is asked for anew on batches 1, 2, 4, 8 of a run, so what is timed lies between these.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from bench import full_plot, results
from bench.bench_step import verify
from bench.environment import environment
from bench.models import CASES, Case, ResNet18, _images, _seeded, _tokens, roberta_of
from bench.providers import PROVIDERS, Settings, Step
from bench.timing import interleave
from dp_bitfit_kernels._allocator import peak_bytes

PLAIN, OURS, HOOKS, GHOST, BIASES = "plain_full", "ours_full", "opacus_hooks_full", "opacus_ghost_full", "ours"
BY_NAME = ("ours_instantiated", "ours_fastgradclip", "ours_ghostclip", "ours_mixghostclip")
STEP = (PLAIN, OURS, HOOKS, GHOST, *BY_NAME, BIASES)
GROWTH = (BIASES, OURS, PLAIN, HOOKS, GHOST, "ours_ghostclip")
MOST_BYTES = 6 << 30  # a contender that the last size took beyond this is left out of the next
MOST_SECONDS = 20.0
MEMORY = 16 << 30  # of the device whose largest batch is asked for
SETTLED = 4  # steps before the first that is timed

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
SIDES = (32, 64, 128, 224, 384, 512)
WIDTHS = (128, 256, 512)
BATCHES = (8, 16, 32, 64, 128)
TIMED = 16  # samples of the steps whose records a second are asked for
STEADY = 0.05  # by how much what a sample adds may differ from what it added between smaller batches

# part, case -> {contender: (most, of it)}: upper bounds of ratios of time and of peak bytes, as asked for
TARGETS: dict[str, dict[str, dict[str, float]]] = {
    "roberta_b16_t128": {
        "time": {HOOKS: 0.75, GHOST: 0.6, PLAIN: 1.35},
        "peak": {HOOKS: 0.45, GHOST: 1.0, PLAIN: 1.20},
    },
    "resnet18_b4_224": {"time": {HOOKS: 0.7}, "peak": {}},
}


def _built(name: str, case: Case, settled: int) -> Step:
    step = PROVIDERS[name].build(case, case.batch(), Settings())
    if name.startswith("ours"):
        for _ in range(settled):
            step()
    return step


def times(case: Case, names: Iterable[str], threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians, and ratios of ``OURS`` to each within the rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps = {name: _built(name, case, 2 * SETTLED) for name in names}
        taken = interleave(steps, rounds=rounds, budget_s=seconds)
    finally:
        torch.set_num_threads(before)
    return {
        "rounds": taken.rounds,
        "median_ms": {name: 1e3 * taken.median(name) for name in steps},
        "spread": {name: taken.spread(name) for name in steps},
        "ours_over": {name: taken.ratio(OURS, name).to_json() for name in steps if OURS in steps},
        "cpu_ours_over": {name: taken.ratio(OURS, name, cpu=True).to_json() for name in steps if OURS in steps},
    }


def run_step(name: str, names: Iterable[str], threads: Iterable[int], rounds: int, seconds: float) -> dict[str, Any]:
    case = CASES[name]
    verdict = verify(case, names)
    sound = [own for own in verdict if verdict[own]["passed"]]
    peaks = {own: peak_bytes(partial(_built, own, case, 0)).peak for own in sound}
    gc.collect()
    time = {str(count): times(case, sound, count, rounds, seconds) for count in threads}
    result = {"reason": case.reason, "check": verdict, "peak_bytes": peaks, "time": time}
    return {**result, "targets_met": _met(name, result)}


def _met(name: str, result: dict[str, Any]) -> dict[str, bool]:
    asked, peaks = TARGETS.get(name, {"time": {}, "peak": {}}), result["peak_bytes"]
    met = {
        f"peak bytes <= {most} of {other}": peaks[OURS] <= most * peaks[other]
        for other, most in asked["peak"].items()
        if {OURS, other} <= peaks.keys()
    }
    for threads, time in result["time"].items():
        for other, most in asked["time"].items():
            if other in time["ours_over"]:
                ratio = time["ours_over"][other]["value"]
                met[f"time <= {most} of {other}, {threads} thread(s): {ratio:.3f}"] = ratio <= most
    return met


def texts(length: int, width: int = 256, batch: int = 2, layers: int = 2) -> Case:
    make = _seeded(partial(roberta_of, width, layers, length + 2))
    return Case(f"text of {length} tokens", "growth", make, _tokens(batch, length, 2))


def images(side: int, batch: int = 2) -> Case:
    make: Callable[[], nn.Module] = _seeded(partial(ResNet18, 100))
    return Case(f"image of {side} pixels", "growth", make, _images(batch, side, 100))


def grow(
    make: Callable[[int], Case], sizes: Iterable[int], names: Iterable[str], threads: int
) -> Iterator[dict[str, Any]]:
    """{contender: {size: {seconds, peak_bytes}}}, each as far as it goes; after each size, what is known."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    beyond: dict[str, str] = {}
    torch.set_num_threads(threads)
    for size in sizes:
        case = make(size)
        for name in found:
            if name in beyond:
                continue
            peak = peak_bytes(partial(_built, name, case, 0)).peak
            taken = interleave({name: _built(name, case, SETTLED)}, rounds=3, budget_s=MOST_SECONDS, warm_up=0)
            found[name][str(size)] = {"seconds": taken.median(name), "peak_bytes": peak}
            print(f"{case.name:24s} {name:20s} {taken.median(name):8.3f} s {peak / 2**20:9.1f} MiB", flush=True)
            gc.collect()
            if 4 * peak > MOST_BYTES or 3 * taken.median(name) > MOST_SECONDS:
                beyond[name] = f"after {size}"
        yield {"measured": found, "left_out": beyond}


def largest(width: int, names: Iterable[str], threads: int) -> dict[str, Any]:
    """{contender: largest batch in MEMORY bytes, records a second at TIMED}, of a text model of this width."""
    torch.set_num_threads(threads)
    found: dict[str, Any] = {}
    for name in names:
        peaks, each = _slope(name, width)
        most = max(peaks)
        found[name] = {
            "peak_bytes": {str(size): peak for size, peak in peaks.items()},
            "bytes_a_sample": each,
            "largest_batch": int(most + (MEMORY - peaks[most]) // each),
        }
        print(width, name, found[name]["largest_batch"], flush=True)
    steps = {name: _built(name, texts(128, width, TIMED, 4), SETTLED) for name in names}
    taken = interleave(steps, rounds=5, budget_s=90.0, warm_up=0)
    for name in names:
        found[name]["records_per_second"] = TIMED / taken.median(name)
        print(width, name, f"{found[name]['records_per_second']:.1f}/s", flush=True)
    gc.collect()
    return found


def _slope(name: str, width: int) -> tuple[dict[int, int], float]:
    """Peaks by batch size, and what a sample adds to them once it is the same from size to size.

    The peak of a small batch may lie in the release, which holds all weights whatever the batch.
    """
    peaks: dict[int, int] = {}
    slopes: list[float] = []
    for size in BATCHES:
        if peaks and 3 * max(peaks.values()) > MEMORY:
            break
        peaks[size] = peak_bytes(partial(_built, name, texts(128, width, size, 4), 0)).peak
        gc.collect()
        if len(peaks) > 1:
            slopes.append((peaks[size] - peaks[size // 2]) / (size - size // 2))
        if len(slopes) > 1 and abs(slopes[-1] - slopes[-2]) <= STEADY * slopes[-1]:
            break
    return peaks, slopes[-1]


def run(
    part: str, names: Iterable[str] | None, threads: Iterable[int], rounds: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """What is known so far, after each case or size."""
    whole: dict[str, Any] = {"bench": part, "environment": environment(), "threads": list(threads), "result": {}}
    content = whole["result"]
    if part == "step":
        for name in TARGETS:
            content[name] = run_step(name, names or STEP, threads, rounds, seconds)
            print(name, content[name]["targets_met"], flush=True)
            yield whole
    elif part == "growth":
        for kind, make, sizes in (("length", texts, LENGTHS), ("side", images, SIDES)):
            for content[kind] in grow(make, sizes, names or GROWTH, max(threads)):
                yield whole
    else:
        for width in WIDTHS:
            content[str(width)] = largest(width, names or GROWTH, max(threads))
            yield whole


FILES = {"step": "full", "growth": "growth", "sizes": "sizes"}


def publish(part: str, content: dict[str, Any], name: str | None = None) -> None:
    target = results.write(f"{name or FILES[part]}.json", content)
    if part != "step":
        full_plot.draw(part, content, target.with_suffix(".png"))


def test_full(benchmark: Any) -> None:
    made: dict[str, dict[str, Any]] = {}

    def work() -> None:
        for part in FILES:
            for content in run(part, None, (1, 2), 24, 120.0):
                made[part] = content
                publish(part, content)

    benchmark.pedantic(work, rounds=1, iterations=1)
    for name, case in made["step"]["result"].items():
        assert case["check"][OURS]["passed"], (name, case["check"][OURS])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=tuple(FILES))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", help="contenders")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=120.0, help="timing budget per case and thread count")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/cpu/NAME.json and its picture")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else None
    counts = [int(count) for count in given.threads.split(",")]
    for content in run(given.part, names, counts, given.rounds, given.seconds):
        if given.save:
            publish(given.part, content, given.save)


if __name__ == "__main__":
    main()
