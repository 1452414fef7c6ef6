"""What is trained against what it costs: the runs behind the methods table in examples/README.md.

    python bench/experiments/methods.py --data DATA                     makes what is missing, in order
    python bench/experiments/methods.py --data DATA --only sst2_lora_eps8_0
    python bench/experiments/methods.py --missing | --list | --table | --plot

DATA holds the folders sst2, cifar10 and weights_cifar100_resnet. One run is one process of an example. It logs to
.runs/methods/NAME and goes on from its checkpoint when started again; a finished one leaves
bench/results/cpu/methods/NAME.json. `--collect` only copies the results of finished runs, `--list` prints the commands.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from examples import PHRASES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "cpu"
SEEDS = range(3)

# Batch, passes and clipping are one for all methods of a study, so that seconds and bytes compare.
TEXT = (
    "--train {data}/sst2/train.tsv --dev {data}/sst2/dev.tsv --limit 10000 --max-length 64 --pool-layers 4 "
    f"--label-phrases '{PHRASES}' --epochs 2 --batch-size 256 --max-physical-batch-size 64 --checkpoint-every 20"
)
IMAGE = (
    "--data {data}/cifar10/cifar10_10k2k.npz --weights {data}/weights_cifar100_resnet/cifar100_{network}.pth "
    "--epochs 3 --batch-size 1000 --max-physical-batch-size 100 --checkpoint-every 10"
)
COMMON = "--clipping flat --max-grad-norm 4 --threads 1 --measure-memory"


@dataclass(frozen=True)
class Study:
    """One data set and one network; `methods`: what is trained -> flags of its own."""

    script: str
    flags: str
    methods: dict[str, str]
    epsilons: tuple[int, int]
    title: str


_CIFAR_METHODS = {
    "head-only": "--head-lr 5e-2",
    "bitfit": "--lr 1e-2 --head-lr 5e-2",
    "full": "--full-lr 1e-3 --head-lr 5e-2",
    "1+bitfit": "--lr 1e-2 --full-lr 1e-3 --head-lr 5e-2",
    "2+bitfit": "--lr 1e-2 --full-lr 1e-3 --head-lr 5e-2",
}
STUDIES = {
    "sst2": Study(
        "text_classification.py",
        TEXT,
        {
            "head-only": "--head-lr 2e-2",
            "bitfit": "--lr 5e-3 --head-lr 2e-2",
            "full": "--full-lr 5e-4 --head-lr 2e-2",
            "lora": "--lora-lr 4e-3 --head-lr 2e-2",
            "lora+bitfit": "--lr 5e-3 --lora-lr 4e-3 --head-lr 2e-2",
            "1+bitfit": "--lr 5e-3 --full-lr 5e-4 --head-lr 2e-2",
        },
        (8, 3),
        "SST-2, 10,000 sentences, MiniLM",
    ),
    **{
        f"cifar10_{network}": Study(
            "image_classification.py",
            IMAGE.replace("{network}", network),
            _CIFAR_METHODS,
            (8, 2),
            f"CIFAR-10, 10,000 images, CIFAR-100 ResNet-{network.removeprefix('resnet')}",
        )
        for network in ("resnet20", "resnet56")
    },
}
LABELS = {
    "head-only": "linear probe",
    "bitfit": "DP-BiTFiT",
    "full": "DP full",
    "lora": "DP-LoRA",
    "lora+bitfit": "DP-LoRA + BiTFiT",
    "1+bitfit": "1+BiTFiT",
    "2+bitfit": "2+BiTFiT",
}
COLOURS = {
    "head-only": "#9aa5b1",
    "bitfit": "#0b6e4f",
    "full": "#8d6a9f",
    "lora": "#e08e45",
    "lora+bitfit": "#c8553d",
    "1+bitfit": "#3a7ca5",
    "2+bitfit": "#1f3f5b",
}


@dataclass(frozen=True)
class Run:
    study: str
    method: str
    epsilon: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.study}_{self.method.replace('+', '_')}_eps{self.epsilon}_{self.seed}"

    @property
    def folder(self) -> Path:
        return ROOT / ".runs" / "methods" / self.name

    @property
    def result(self) -> Path:
        return RESULTS / "methods" / f"{self.name}.json"

    def command(self, data: str) -> list[str]:
        study = STUDIES[self.study]
        flags = f"{study.flags.replace('{data}', data)} {COMMON} {study.methods[self.method]}"
        own = ["--method", self.method, "--epsilon", str(self.epsilon), "--seed", str(self.seed)]
        return [
            f"examples/{study.script}",
            *shlex.split(flags),
            *own,
            "--output",
            f".runs/methods/{self.name}",
            "--resume",
        ]

    def collect(self, data: str) -> bool:
        """Copy a finished run's result, freed of this machine's paths. False where it has not finished."""
        source = self.folder / "result.json"
        if not source.exists():
            return False
        result = json.loads(source.read_text().replace(data, "DATA"))
        result["command"] = shlex.join(["python", *self.command("DATA")])
        self.result.parent.mkdir(parents=True, exist_ok=True)
        self.result.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{self.name}: accuracy {result['accuracy']:.4f}, {result['cpu_seconds']:.0f} s")
        return True


def runs() -> Iterator[Run]:
    """All runs, the most telling first."""
    small = [name for name in STUDIES if name != "cifar10_resnet56"]
    order = [(name, place, seed) for place in (0, 1) for seed in SEEDS for name in small]
    order += [("cifar10_resnet56", place, seed) for place in (0, 1) for seed in SEEDS]
    for name, place, seed in order:
        study = STUDIES[name]
        yield from (Run(name, method, study.epsilons[place], seed) for method in study.methods)


def results(study: str, method: str, epsilon: int) -> list[dict[str, Any]]:
    paths = [Run(study, method, epsilon, seed).result for seed in SEEDS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def rows(study: str, epsilon: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for method in STUDIES[study].methods:
        if found := results(study, method, epsilon):
            yield method, found


def table() -> str:
    """Markdown: one table a study and epsilon that has a finished run."""
    lines: list[str] = []
    for name, study in STUDIES.items():
        for epsilon in study.epsilons:
            body = [_row(method, found) for method, found in rows(name, epsilon)]
            if not body:
                continue
            head = (
                f"| {study.title}, epsilon = {epsilon} | accuracy, mean | of each seed | seconds | peak MiB | trained |"
            )
            lines += [head, "|---|---:|---|---:|---:|---:|", *body, ""]
    return "\n".join(lines)


def _row(method: str, found: list[dict[str, Any]]) -> str:
    accuracies = [100 * result["accuracy"] for result in found]
    trained = [phase["elements"] for phase in found[0]["phases"] or [{"elements": found[0]["trained_elements"]}]]
    cells = [
        LABELS[method],
        f"{statistics.mean(accuracies):.1f} %",
        " / ".join(f"{value:.1f}" for value in accuracies),
        f"{statistics.mean(result['cpu_seconds'] for result in found):.0f}",
        f"{_peak(found):.0f}",
        ", then ".join(f"{elements:,}" for elements in trained),
    ]
    return f"| {' | '.join(cells)} |"


def _peak(found: list[dict[str, Any]]) -> float:
    """MiB, the most of the seeds: they may have been run by different versions."""
    return float(max(result["peak_bytes"] for result in found) / 2**20)


def plot(target: Path) -> None:
    """Accuracy against seconds and against peak bytes: a marker a method, its seeds as whiskers (least to most)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(name, epsilon) for name, study in STUDIES.items() for epsilon in study.epsilons]
    panels = [panel for panel in panels if any(rows(*panel))]
    figure, axes = plt.subplots(len(panels), 2, figsize=(10, 2.6 * len(panels) + 0.5), squeeze=False, sharey="row")
    for line, (name, epsilon) in zip(axes, panels, strict=True):
        for method, found in rows(name, epsilon):
            values = [100 * result["accuracy"] for result in found]
            mean = statistics.mean(values)
            spread = [[mean - min(values)], [max(values) - mean]]
            seconds = statistics.mean(result["cpu_seconds"] for result in found)
            for axis, x in zip(line, (seconds, _peak(found)), strict=True):
                label = f"{LABELS[method]} ({len(found)})"
                style = {"color": COLOURS[method], "label": label, "markersize": 6, "capsize": 2, "elinewidth": 1}
                axis.errorbar(x, mean, yerr=spread, fmt="D" if "+bitfit" in method else "o", **style)
        line[0].set_title(f"{STUDIES[name].title}, epsilon = {epsilon}", loc="left", fontsize=9, fontweight="bold")
        line[0].set_ylabel("accuracy, %", fontsize=8)
        line[0].set_xlabel("processor seconds, one thread", fontsize=8)
        line[1].set_xlabel("peak tensor MiB of one private step", fontsize=8)
        line[1].legend(
            fontsize=6.5, title="method (seeds)", title_fontsize=6.5, loc="upper left", bbox_to_anchor=(1, 1)
        )
        for axis in line:
            axis.tick_params(labelsize=7)
            axis.margins(0.12)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
    print(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="for runs and for --collect")
    parser.add_argument("--only", action="append", help="start of a run's name; may be repeated")
    action = parser.add_mutually_exclusive_group()
    for name in ("collect", "missing", "list", "table", "plot"):
        action.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    chosen = [run for run in runs() if not args.only or run.name.startswith(tuple(args.only))]
    if args.table:
        print(table())
    elif args.plot:
        plot(RESULTS / "methods.png")
    elif args.missing:
        print("\n".join(run.name for run in chosen if not run.result.exists()))
    elif args.list:
        print("\n".join(shlex.join(["python", *run.command("DATA")]) for run in chosen))
    elif args.data is None:
        parser.error("pass --data")
    else:
        for run in chosen:
            if not args.collect and not run.result.exists() and not (run.folder / "result.json").exists():
                if not (run.folder / "checkpoint.pt").exists():  # stopped before its first checkpoint: begin anew
                    shutil.rmtree(run.folder, ignore_errors=True)
                subprocess.run([sys.executable, *run.command(str(args.data))], cwd=ROOT, check=True)
            run.collect(str(args.data))


if __name__ == "__main__":
    main()
