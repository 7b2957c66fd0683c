"""Pictures as data URIs, for a page that needs no network."""

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_rl.report.comparison import COLORS, INK
from megatron_rl.report.events import Distribution
from megatron_rl.report.series import Curve

# More points than a picture has columns only make it heavy.
MOST_POINTS = 600
_HEALTHY = "#d9ead3"


def plot_curves(
    curves: Mapping[str, Sequence[Curve | None]],
    *,
    steps: tuple[int, int],
    healthy: tuple[float, float] | None = None,
    log: bool = False,
) -> str:
    """Curves by name, from the first to the last of `steps`, so that one which ends early is seen to.

    Of each name the first run's is solid and a second one's dashed; None where it has none.
    """
    figure, panel = _blank()
    drawn = [curve.finite().values for of_runs in curves.values() for curve in of_runs if curve is not None]
    for place, (name, of_runs) in enumerate(curves.items()):
        color, label = COLORS[place % len(COLORS)], name
        for curve, style in zip(of_runs, ("-", "--")):
            if curve is None:
                continue
            shown = thinned(curve)
            marker = "o" if len(shown.steps) == 1 else ""
            panel.plot(*shown, style, color=color, linewidth=1.4, marker=marker, markersize=4, label=label)
            label = "_"  # matplotlib leaves such a label out of the legend
    if log and all((values > 0).all() for values in drawn):
        panel.set_yscale("log")
    room = 0.03 * (steps[1] - steps[0]) or 0.5
    panel.set_xlim(steps[0] - room, steps[1] + room)
    if healthy is not None:
        low, high = panel.get_ylim()
        panel.axhspan(*healthy, color=_HEALTHY, zorder=0, linewidth=0)
        panel.set_ylim(min(low, healthy[0]), max(high, healthy[1]))
    if len(curves) > 1:
        figure.legend(frameon=False, fontsize=7.5, loc="outside upper left", ncols=2)
    return _data_uri(figure)


def plot_distribution(distributions: Sequence[Distribution]) -> str:
    """How values are spread, step by step: the range, 10 to 90%, the middle half, the median."""
    figure, panel = _blank()
    steps = [one.step for one in distributions]
    spread = np.array([one.quantiles for one in distributions]).T
    for (low, high), alpha in zip(((0, 6), (1, 5), (2, 4)), (0.12, 0.22, 0.35)):
        panel.fill_between(steps, spread[low], spread[high], color=COLORS[0], alpha=alpha, linewidth=0)
    panel.plot(steps, spread[3], color=COLORS[0], linewidth=1.6, marker="o" if len(steps) == 1 else "")
    return _data_uri(figure)


def thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS points; of each stretch of steps the lowest and the highest value stay."""
    if len(curve.steps) <= MOST_POINTS:
        return curve
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(curve.steps)), MOST_POINTS // 2):
        values = curve.values[stretch]
        if np.isnan(values).all():
            kept.append(int(stretch[0]))
            continue
        kept += sorted({int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])})
    return Curve(curve.steps[kept], curve.values[kept])


def _blank() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.1, 2.5), layout="constrained")
    panel = figure.subplots()
    panel.set_xlabel("step", color=INK, fontsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(which="both", colors=INK, length=3, labelsize=8)
    panel.ticklabel_format(axis="y", scilimits=(-3, 5))
    panel.margins(x=0.03)
    return figure, panel


def _data_uri(figure: Figure) -> str:
    """The figure as an SVG that is the same for the same figure."""
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "megatron-rl"}):
        figure.savefig(
            picture, format="svg", facecolor="white", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode()
