"""What the demonstration shows at its end: a table and a figure."""

from __future__ import annotations

import matplotlib
from rich.console import Console
from rich.table import Table

from .outcome import Outcome


def print_table(outcome: Outcome, console: Console | None = None) -> None:
    """Accuracy of each method, the epsilon it spent, its share of the gap to training without privacy, its time."""
    console = console or Console()
    before, plain, tried = outcome.before, outcome.plain, outcome.plain_all
    trained = f"{outcome.percent_trained:.2f} %"
    table = Table(title="Private handwritten digits, a network pre-trained on public glyphs")
    table.add_column("method")
    for heading in ("epsilon", "accuracy", "gap closed", "trained", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("before (pre-training)", "0", f"{before.accuracy:.1%}", "", "", f"{before.seconds:.1f} s")
    for row, closed in zip(outcome.private, outcome.closed, strict=True):
        table.add_row(
            "DP-BiTFiT", f"{row.epsilon:.2f}", f"{row.accuracy:.1%}", f"{closed:.0%}", trained, f"{row.seconds:.1f} s"
        )
    seconds = sum(row.seconds for row in tried) / len(tried)
    table.add_row(f"BiTFiT, best of {len(tried)}", "inf", f"{plain.accuracy:.1%}", "100%", trained, f"{seconds:.1f} s")
    console.print(table)
    console.print(
        f"The network also knows capitals; before, with letters ruled out: {outcome.before_digits_only:.1%}.\n"
        f"Trained: {outcome.trained:,} biases of {outcome.total:,} parameters. Epsilon: spent, at delta = 1/2n = "
        f"{outcome.delta:.2g}, one image added or removed.\n"
        f"Biases of epsilon = {outcome.private[-1].epsilon:.2f}: {outcome.saved} "
        f"({outcome.saved.stat().st_size:,} bytes); loaded into a fresh network: {outcome.reloaded:.1%} again.\n"
        f"Figure: {outcome.figure}\nAll of it took {outcome.seconds:.0f} s.",
        highlight=False,
        soft_wrap=True,
    )


def save_figure(outcome: Outcome) -> None:
    """Test accuracy against epsilon, between the two horizontal lines that bound it, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"font.size": 10}):
        axes = figure.add_subplot()
        epsilons = [row.epsilon or 0.0 for row in outcome.private]
        scores = [100 * row.accuracy for row in outcome.private]
        plain, before = 100 * outcome.plain.accuracy, 100 * outcome.before.accuracy
        axes.axhline(plain, color="tab:green", linestyle="--", label=f"BiTFiT, no privacy: {plain:.1f} %")
        axes.plot(epsilons, scores, "o-", color="tab:blue", label="DP-BiTFiT")
        axes.axhline(before, color="tab:gray", linestyle=":", label=f"before fine-tuning: {before:.1f} %")
        for epsilon, score in zip(epsilons, scores, strict=True):
            axes.annotate(f"{score:.1f} %", (epsilon, score), (0, 7), textcoords="offset points", ha="center")
        axes.set_xscale("log")
        axes.set_xticks(epsilons, [f"{epsilon:.2g}" for epsilon in epsilons])
        axes.minorticks_off()
        axes.margins(x=0.15)
        axes.set_ylim(min(before, *scores) - 6, max(plain, *scores) + 6)
        axes.set_xlabel(f"epsilon spent (delta = {outcome.delta:.2g})")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(f"Private handwritten digits, {outcome.percent_trained:.2f} % of parameters trained")
        figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(outcome.figure, dpi=150)
