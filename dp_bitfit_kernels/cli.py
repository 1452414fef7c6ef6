"""The command `dp-bitfit`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from ._validate import DPBiTFiTError
from .demo.outcome import Settings

# Asked for before the minute of work, not at its end.
_DEMO_NEEDS = ("dp_accounting", "matplotlib", "rich", "safetensors", "sklearn", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except DPBiTFiTError as error:
        print(f"dp-bitfit: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dp-bitfit", description="Differentially private bias-term fine-tuning.")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="fine-tune a small network privately on handwritten digits",
        description="Pre-trains a small network on printed characters (public), fine-tunes its biases with "
        "differential privacy on scikit-learn's handwritten digits (private), and compares. Nothing is downloaded.",
    )
    usual = Settings()
    budgets = " ".join(f"{epsilon:g}" for epsilon in usual.epsilons)
    demo.add_argument(
        "--epsilons",
        type=_positive,
        nargs="+",
        default=usual.epsilons,
        metavar="E",
        help=f"privacy budgets ({budgets})",
    )
    demo.add_argument(
        "--epochs", type=_whole, default=usual.epochs, help=f"epochs of each fine-tuning ({usual.epochs})"
    )
    demo.add_argument(
        "--seed",
        type=_seed,
        default=usual.seed,
        help=f"glyphs, first weights and split; never the noise ({usual.seed})",
    )
    demo.add_argument("--out", type=Path, default=Path(".demo"), help="folder for the figure and the biases (.demo)")
    demo.set_defaults(run=_demo)
    scan = commands.add_parser(
        "scan",
        help="say what would be trained of a model, without its weights",
        description="Builds the model on the meta device and prints the conversion report.",
    )
    scan.add_argument(
        "model", help="a class of transformers, a folder or name of one, timm:NAME, or package.module:Class"
    )
    scan.add_argument("--json", action="store_true", help="all of the report, as JSON")
    scan.add_argument("--biases", nargs="+", default="all", metavar="PATTERN", help="as convert_model takes them (all)")
    scan.add_argument("--train-modules", nargs="+", default=(), metavar="PATTERN", help="modules trained whole")
    scan.add_argument("--add-missing-biases", action="store_true", help="give layers without a bias one")
    scan.set_defaults(run=_scan)
    doctor = commands.add_parser(
        "doctor",
        help="what this installation has, and a self-test of each backend",
        description="Prints versions, devices and backends, why a backend is not available, and tests each that is. "
        "Exit status 1 where one computes wrongly.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _scan(options: argparse.Namespace) -> int:
    from .scan import report_of

    print(
        report_of(
            options.model,
            options.json,
            biases=options.biases,
            train_modules=options.train_modules,
            add_missing_biases=options.add_missing_biases,
        )
    )
    return 0


def _demo(options: argparse.Namespace) -> int:
    missing = [name for name in _DEMO_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"dp-bitfit demo needs {', '.join(missing)}: pip install 'dp-bitfit-kernels[demo]'", file=sys.stderr)
        return 1
    from .demo.report import print_table
    from .demo.run import run_demo

    settings = Settings(epsilons=tuple(options.epsilons), seed=options.seed, epochs=options.epochs)
    print_table(run_demo(settings, options.out))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine

    findings = []
    for finding in examine():
        print(f"{finding.subject:20s} {finding.state}", flush=True)
        findings.append(finding)
    return 0 if all(finding.sound for finding in findings) else 1


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number > 0")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2**32 - 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
