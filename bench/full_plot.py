"""Pictures of how training all weights grows: `python -m bench.full_plot growth|sizes` draws them from the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench import results
from bench.providers import PROVIDERS

COLOURS = {
    "ours": "#0b6e4f",
    "ours_full": "#2a9d8f",
    "plain_full": "#52606d",
    "opacus_hooks_full": "#8d6a9f",
    "opacus_ghost_full": "#c8553d",
    "ours_ghostclip": "#e08e45",
}


def _lines(axis: Any, measured: dict[str, dict[str, Any]], key: str, unit: float) -> None:
    for name, points in measured.items():
        sizes = [int(size) for size in points]
        values = [point[key] / unit for point in points.values()]
        axis.plot(sizes, values, "o-", color=COLOURS.get(name), label=PROVIDERS[name].label, markersize=3)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)


def draw(part: str, content: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = content["result"]
    figure, axes = plt.subplots(
        2 if part == "growth" else 1, 2, figsize=(10, 7 if part == "growth" else 4), squeeze=False
    )
    if part == "growth":
        labels = {"length": "tokens (2 texts, 2 layers, width 256)", "side": "side of the image (2 images, ResNet-18)"}
        for row, (kind, own) in zip(axes, result.items(), strict=False):  # one kind after the other is measured
            for axis, key, unit, name in (
                (row[0], "seconds", 1.0, "s a step"),
                (row[1], "peak_bytes", 2**20, "peak MiB"),
            ):
                _lines(axis, own["measured"], key, unit)
                axis.set_xlabel(labels[kind])
                axis.set_ylabel(name)
    else:
        turned: dict[str, dict[str, Any]] = {}
        for width, found in result.items():
            for name, own in found.items():
                turned.setdefault(name, {})[width] = own
        _lines(axes[0][0], turned, "largest_batch", 1.0)
        _lines(axes[0][1], turned, "records_per_second", 1.0)
        for axis, name in zip(axes[0], ("largest batch in 16 GiB", "records a second, batch 16"), strict=True):
            axis.set_xlabel("width (4 layers, 128 tokens)")
            axis.set_ylabel(name)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> None:
    part = sys.argv[1]
    path = results.path(f"{part}.json")
    draw(part, json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
