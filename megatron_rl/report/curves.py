"""The learning curve of a run, as a picture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

REWARD = "critic/score/mean"
ACCURACY = "val/accuracy"

REWARD_LABEL = "training reward"
ACCURACY_LABEL = "held-out accuracy"
REWARD_COLOR = "#e39a4f"
ACCURACY_COLOR = "#1f4e8c"
INK = "#333333"


class Series(NamedTuple):
    steps: list[int]
    values: list[float]


class Stage(NamedTuple):
    """What the picture shows of one run."""

    reward: Series
    accuracy: Series


def plot_learning_curve(runs: Mapping[str, Path], out_png: Path, *, title: str) -> None:
    """Training reward (thin) and held-out accuracy (thick) against the step.

    `runs` maps a stage's name to its `metrics.jsonl`. Stages stand side by side in the given order on one vertical
    axis, which covers 0 to 1 and more only where a reward leaves that range.
    """
    stages = {name: _read_stage(path) for name, path in runs.items()}
    if not stages:
        raise ValueError("runs is empty: name at least one metrics.jsonl")
    values = [value for stage in stages.values() for series in stage for value in series.values]
    low, high = min([0.0, *values]), max([1.0, *values])
    figure = Figure(figsize=(2.2 + 3.4 * len(stages), 4.0), layout="constrained")
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold")
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for panel, (name, stage) in zip(panels, stages.items()):
        _draw(panel, stage)
        _tidy(panel, name)
    # The room above is for the figures written over the points.
    panels[0].set_ylim(low - 0.04 * (high - low), high + 0.1 * (high - low))
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    labels = [label for label in (ACCURACY_LABEL, REWARD_LABEL) if label in handles]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(out_png, dpi=160, facecolor="white")


def has_curve(path: Path) -> bool:
    """Whether a `metrics.jsonl` holds anything that `plot_learning_curve` draws."""
    return any(read_series(path, key).steps for key in (REWARD, ACCURACY))


def read_series(path: Path, key: str) -> Series:
    """The steps and values of one metric; steps that lack it, or hold null for it, are left out."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return Series([step for step, _ in points], [value for _, value in points])


def _read_stage(path: Path) -> Stage:
    stage = Stage(read_series(path, REWARD), read_series(path, ACCURACY))
    if not any(series.steps for series in stage):
        raise ValueError(f"{path} holds neither {REWARD!r} nor {ACCURACY!r}: there is nothing to plot")
    return stage


def _draw(panel: Axes, stage: Stage) -> None:
    reward, accuracy = stage
    if reward.steps:
        panel.plot(*reward, color=REWARD_COLOR, linewidth=1.0, label=REWARD_LABEL)
    if accuracy.steps:
        (line,) = panel.plot(*accuracy, color=ACCURACY_COLOR, linewidth=2.4, label=ACCURACY_LABEL)
        line.set(marker="o", markersize=6, markeredgecolor="white")
        points = list(zip(*accuracy))
        for point in {points[0], points[-1]}:
            _write_value(panel, point)


def _write_value(panel: Axes, point: tuple[int, float]) -> None:
    panel.annotate(
        f"{point[1]:.2f}",
        point,
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        color=ACCURACY_COLOR,
        fontweight="bold",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _tidy(panel: Axes, name: str) -> None:
    panel.set_title(name, color=INK, fontsize=11)
    panel.set_xlabel("step", color=INK)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=INK, length=3)
    panel.margins(x=0.06)
