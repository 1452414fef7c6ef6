"""The command `dp-bitfit`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ._validate import DPBiTFiTError


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
        description="Pre-trains a small network on printed digits (public), fine-tunes its biases with differential "
        "privacy on scikit-learn's handwritten digits (private), and compares. Nothing is downloaded.",
    )
    demo.add_argument(
        "--epsilons", type=_positive, nargs="+", default=[1.0, 3.0, 8.0], metavar="E", help="privacy budgets (1 3 8)"
    )
    demo.add_argument("--epochs", type=_whole, default=None, help="epochs of each fine-tuning")
    demo.add_argument("--seed", type=int, default=0, help="glyphs, initial weights and split; never the noise (0)")
    demo.add_argument("--out", type=Path, default=Path(".demo"), help="folder for the figure and the biases (.demo)")
    demo.set_defaults(run=_demo)
    return parser


def _demo(options: argparse.Namespace) -> int:
    try:
        from .demo.outcome import Settings
        from .demo.report import print_table
        from .demo.run import run_demo
    except ModuleNotFoundError as error:
        print(
            f"dp-bitfit demo needs {error.name}: pip install 'dp-bitfit-kernels[demo]'",
            file=sys.stderr,
        )
        return 1
    chosen = {} if options.epochs is None else {"epochs": options.epochs}
    settings = Settings(epsilons=tuple(options.epsilons), seed=options.seed, **chosen)
    print_table(run_demo(settings, options.out))
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
