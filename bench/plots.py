"""PNG of a step result: what a step costs against plain bias-only training, in time and in bytes.

`python -m bench.plots [RESULT.json]` draws it anew from the result file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench import results
from bench.providers import BASELINE, PROVIDERS

COLOURS = {
    "ours": "#0b6e4f",
    "plain_bias": "#9aa5b1",
    "control": "#cbd2d9",
    "opacus_hooks_bias": "#e08e45",
    "opacus_ghost_bias": "#c8553d",
    "plain_full": "#52606d",
    "opacus_hooks_full": "#8d6a9f",
    "opacus_ghost_full": "#5f4b8b",
}


def draw_step(result: dict[str, Any], target: Path) -> None:
    """One row of panels a case: time with 1 and 2 threads (95 % interval as whiskers), peak bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = result["cases"]
    columns = [f"time, {t} thread{'s' if t != '1' else ''}" for t in _threads(cases)] + ["peak tensor bytes"]
    figure, axes = plt.subplots(
        len(cases), len(columns), figsize=(4.3 * len(columns), 1.9 * len(cases) + 0.9), squeeze=False, sharey="row"
    )
    for row, (name, case) in zip(axes, cases.items(), strict=True):
        for axis, threads in zip(row, _threads(cases), strict=False):
            _bars(axis, case["time"].get(threads, {}).get("ratio", {}))
        _bars(row[-1], {key: {"value": value} for key, value in case["memory"].get("ratio", {}).items()})
        row[0].set_title(name, loc="left", fontsize=10, fontweight="bold")
    for axis, title in zip(axes[-1], columns, strict=True):
        axis.set_xlabel(f"{title} / plain bias-only", fontsize=8)
    environment = result["environment"]
    figure.suptitle(
        f"One private step against plain bias-only autograd (1.0)   torch {environment['versions']['torch']}, "
        f"opacus {environment['versions']['opacus']}, {environment['cores']} cores",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _threads(cases: dict[str, Any]) -> list[str]:
    return sorted({threads for case in cases.values() for threads in case["time"]})


def _bars(axis: Any, ratios: dict[str, dict[str, float]]) -> None:
    names = [name for name in PROVIDERS if name in ratios][::-1]
    values = [ratios[name]["value"] for name in names]
    axis.barh(range(len(names)), values, color=[COLOURS[name] for name in names], height=0.72)
    for place, name in enumerate(names):
        ratio = ratios[name]
        if "low" in ratio and name != BASELINE:
            axis.plot([ratio["low"], ratio["high"]], [place, place], color="black", linewidth=1)
        axis.annotate(
            f"{ratio['value']:.2f}", (max(ratio["value"], ratio.get("high", 0.0)), place),
            xytext=(3, 0), textcoords="offset points", va="center", fontsize=7,
        )  # fmt: skip
    axis.set_yticks(range(len(names)), [PROVIDERS[name].label for name in names], fontsize=7)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.tick_params(axis="x", labelsize=7)
    axis.margins(x=0.12)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else results.path("step.json")
    target = source.with_suffix(".png")
    draw_step(json.loads(source.read_text()), target)
    print(target)


if __name__ == "__main__":
    main()
