"""Learning curves of several cases over several seeds, as one picture."""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

FIELDS = ("case", "seed", "step", "accuracy", "seconds", "date")
COLORS = ("#1f4e8c", "#e39a4f", "#3d8f5f", "#a64d79", "#7a6a53", "#5b8fb9", "#c0504d", "#8064a2")
INK = "#333333"

# case -> step -> held-out accuracy of each seed
Curves = dict[str, dict[int, list[float]]]


def read_curves(table: Path) -> Curves:
    """The accuracies of a table with the columns FIELDS, cases in the order of their first line."""
    curves: Curves = {}
    with table.open(newline="") as lines:
        for row in csv.DictReader(lines):
            curves.setdefault(row["case"], defaultdict(list))[int(row["step"])].append(float(row["accuracy"]))
    return curves


def plot_comparison(table: Path, out_png: Path, *, title: str) -> None:
    """Per case the mean over seeds as a line, and a band from the lowest to the highest seed."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    panel = figure.subplots()
    for color, (case, curve) in zip(COLORS, read_curves(table).items()):
        steps = sorted(curve)
        seeds = max(len(values) for values in curve.values())
        panel.fill_between(
            steps, [min(curve[s]) for s in steps], [max(curve[s]) for s in steps], color=color, alpha=0.15, linewidth=0
        )
        panel.plot(steps, [fmean(curve[s]) for s in steps], color=color, linewidth=2.0, label=f"{case} ({seeds} seeds)")
    panel.set_title(title, color=INK, fontsize=13, fontweight="bold")
    panel.set_xlabel("step", color=INK)
    panel.set_ylabel("held-out accuracy", color=INK)
    panel.set_ylim(-0.04, 1.04)
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=INK, length=3)
    panel.legend(frameon=False, loc="lower right")
    figure.savefig(out_png, dpi=160, facecolor="white")
