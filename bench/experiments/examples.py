"""The runs behind the accuracy tables in examples/README.md.

    python bench/experiments/examples.py sst2 --data DATA [--only bitfit_eps8] [--collect]

DATA holds the folders sst2, cifar10 and weights_cifar100_resnet. Runs log to .runs/NAME and resume when started again;
each finished run leaves bench/results/cpu/NAME.json. `--collect` only copies the results of finished runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PHRASES = (
    "a bad, boring film; it was terrible.; a terrible movie; negative sentiment | "
    "a good, enjoyable film; it was great.; a great movie; positive sentiment"
)
TEXT = (
    "--train {data}/sst2/train.tsv --dev {data}/sst2/dev.tsv --threads 1 --pool-layers 4 --clipping flat "
    f"--max-grad-norm 4 --lr 2e-3 --head-lr 2e-2 --epochs 2 --label-phrases '{PHRASES}'"
)
IMAGE = (
    "--data {data}/cifar10/cifar10_10k2k.npz --weights {data}/weights_cifar100_resnet/cifar100_resnet20.pth "
    "--threads 1 --epochs 5"
)
CIFAR_PRIVATE = "--epsilon 8 --clipping flat --max-grad-norm 4 --lr 1e-2 --head-lr 5e-2"

# memory="exact" against "compact", on 10,000 sentences.
SMALL = "--epsilon 8 --limit 10000 --batch-size 256 --epochs 3 --lr 5e-3 --checkpoint-every 20"

RUNS: dict[str, dict[str, str]] = {
    "sst2": {
        "bitfit_eps8": "--epsilon 8 --batch-size 1024 --epochs 3 --lr 5e-3 --checkpoint-every 2",
        "bitfit_eps3": "--epsilon 3 --batch-size 2048 --epochs 4 --checkpoint-every 2",
        "bitfit_eps8_short": "--epsilon 8 --batch-size 1024 --checkpoint-every 2",
        "head_only_eps8": "--epsilon 8 --batch-size 1024 --method head-only --epochs 1",
        "bitfit_non_private": "--non-private --batch-size 64 --lr 1e-3 --head-lr 5e-3 --epochs 1",
        **{
            f"10k_{memory}_{seed}": f"{SMALL} --memory {memory} --seed {seed}"
            for seed in range(3)
            for memory in ("exact", "compact")
        },
        **{f"10k_informative_{seed}": f"{SMALL} --biases informative --seed {seed}" for seed in range(3)},
    },
    "cifar10": {
        "bitfit_eps8": CIFAR_PRIVATE,
        "head_only_eps8": f"{CIFAR_PRIVATE} --method head-only",
        "bitfit_non_private": "--non-private --batch-size 100 --lr 5e-3",
        "head_only_non_private": "--non-private --batch-size 100 --lr 5e-3 --method head-only",
    },
}
SCRIPTS = {"sst2": ("text_classification.py", TEXT), "cifar10": ("image_classification.py", IMAGE)}


def command(study: str, name: str, data: Path) -> list[str]:
    script, inputs = SCRIPTS[study]
    flags = f"{inputs} {RUNS[study][name]}".replace("{data}", str(data))
    return [f"examples/{script}", *shlex.split(flags), "--output", f".runs/{study}_{name}", "--resume"]


def collect(study: str, name: str, data: Path) -> bool:
    """Copy a finished run's result, with the command freed of this machine's paths. False where it has not finished."""
    source = ROOT / ".runs" / f"{study}_{name}" / "result.json"
    if not source.exists():
        return False
    result = json.loads(source.read_text().replace(str(data), "DATA"))
    result["command"] = shlex.join(["python", *command(study, name, Path("DATA"))])
    target = ROOT / "bench" / "results" / "cpu" / f"{study}_{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{study}_{name}: accuracy {result['accuracy']:.4f}, epsilon {result['epsilon']}, {result['seconds']:.0f} s")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=RUNS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", action="append", help="name of a run; may be repeated")
    parser.add_argument("--collect", action="store_true")
    args = parser.parse_args()
    for name in args.only or RUNS[args.study]:
        if not args.collect and not (ROOT / ".runs" / f"{args.study}_{name}" / "result.json").exists():
            subprocess.run([sys.executable, *command(args.study, name, args.data)], cwd=ROOT, check=True)
        if not collect(args.study, name, args.data):
            print(f"{args.study}_{name}: not finished")


if __name__ == "__main__":
    main()
