"""Learning curves of several cases over several seeds, as one picture."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIELDS = ("case", "seed", "step", "reward", "accuracy", "seconds", "date")
COLORS = ("#1f4e8c", "#e39a4f", "#3d8f5f", "#a64d79", "#7a6a53", "#5b8fb9", "#c0504d", "#8064a2")
INK = "#333333"

# case -> step -> the figure of each seed
Curves = dict[str, dict[int, list[float]]]


def read_curves(table: Path, figure: str) -> Curves:
    """One column of a table with FIELDS; cases in the order of their first line, blanks left out."""
    curves: Curves = {}
    with table.open(newline="") as lines:
        for row in csv.DictReader(lines):
            curve = curves.setdefault(row["case"], defaultdict(list))
            if row[figure]:
                curve[int(row["step"])].append(float(row[figure]))
    return curves


def summary(table: Path, *, target: float = 0.95, more: Sequence[str] = ()) -> str:
    """A Markdown table, a line per case: held-out accuracy at the end, and the first evaluation at the target.

    `more` are further columns, of which the last values are shown, where there are any.
    """
    rewards, others = read_curves(table, "reward"), [read_curves(table, column) for column in more]
    titles = ["case", "seeds", f"steps to {target:.0%}", "final accuracy, mean (lowest to highest)", "final reward"]
    titles += [f"final {column}" for column in more]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for case, curve in read_curves(table, "accuracy").items():
        last = max(curve)
        seeds = range(len(curve[last]))
        first = [next((step for step in sorted(curve) if curve[step][seed] >= target), None) for seed in seeds]
        reached = [step for step in first if step is not None]
        steps = f"{fmean(reached):.0f}" if len(reached) == len(first) else f"{len(reached)} of {len(first)} seeds"
        spread = f"{fmean(curve[last]):.1%} ({min(curve[last]):.1%} to {max(curve[last]):.1%})"
        finals = [_final(curves[case]) for curves in (rewards, *others)]
        lines.append(f"| {case} | {len(seeds)} | {steps} | {spread} | {' | '.join(finals)} |")
    return "\n".join(lines) + "\n"


def _final(curve: dict[int, list[float]]) -> str:
    """The mean over seeds at the last step that has the figure; nothing for a case that has no such figure."""
    return f"{fmean(curve[max(curve)]):.3f}" if curve else ""


def plot_comparison(table: Path, out_png: Path, *, title: str, more: Sequence[str] = ()) -> None:
    """Training reward and held-out accuracy side by side: per case the mean over seeds, and the range of the seeds.

    Below them the columns `more`, each on an axis of its own.
    """
    rows = 1 + (len(more) + 1) // 2
    figure = Figure(figsize=(10.5, 0.6 + 3.6 * rows), layout="constrained")
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold")
    left = figure.add_subplot(rows, 2, 1)
    panels = [left, figure.add_subplot(rows, 2, 2, sharey=left)]
    panels += [figure.add_subplot(rows, 2, place) for place in range(3, 3 + len(more))]
    names = ("training reward", "held-out accuracy", *more)
    for panel, column, name in zip(panels, ("reward", "accuracy", *more), names):
        _draw(panel, read_curves(table, column))
        panel.set_title(name, color=INK, fontsize=11)
        panel.set_xlabel("step", color=INK)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK, length=3)
    panels[1].tick_params(labelleft=False)
    panels[1].legend(frameon=False, loc="best")
    figure.savefig(out_png, dpi=160, facecolor="white")


def _draw(panel: Axes, curves: Curves) -> None:
    for place, (case, curve) in enumerate(curves.items()):
        if not curve:
            continue
        steps = sorted(curve)
        seeds = max(len(values) for values in curve.values())
        color = COLORS[place % len(COLORS)]
        low, high, mean = ([of(curve[step]) for step in steps] for of in (min, max, fmean))
        panel.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        # Thick first and thin last, so that curves that coincide are all seen.
        width = 1.2 + 2.8 * (len(curves) - 1 - place) / max(len(curves) - 1, 1)
        panel.plot(steps, mean, color=color, linewidth=width, label=f"{case} ({seeds} seeds)")
