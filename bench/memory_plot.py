"""PNG of bench_memory's result: bytes per sample against the size of the input, all methods.

`python -m bench.memory_plot` draws it anew from the result file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import results

STYLES = {
    "plain_full": ("#52606d", "autograd, all weights"),
    "plain_bias": ("#9aa5b1", "autograd, biases only"),
    "opacus_hooks": ("#e08e45", "Opacus hooks, biases only"),
    "off": ("#d4a72c", 'ours, memory="off"'),
    "exact": ("#0b6e4f", "ours, exact"),
    "compact": ("#63b995", "ours, compact"),
}


def draw(result: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {name: case["curve"] for name, case in result["cases"].items() if case.get("curve")}
    if not cases:
        return
    figure, axes = plt.subplots(1, len(cases), figsize=(3.6 * len(cases), 3.6), squeeze=False)
    for axis, (name, curve) in zip(axes[0], cases.items(), strict=True):
        for method, line in curve.items():
            colour, label = STYLES[method]
            sizes = [int(size) for size in line]
            axis.plot(sizes, [value / 2**20 for value in line.values()], "o-", color=colour, label=label, markersize=3)
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axis.set_title(name, fontsize=10, loc="left", fontweight="bold")
        axis.set_xlabel("tokens" if name in ("roberta", "gpt2") else "pixels a side", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("MiB a sample, kept for the backward", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    for axis in axes[0][1:]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(target, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(results.path("memory.json").read_text()), results.path("memory.png"))
