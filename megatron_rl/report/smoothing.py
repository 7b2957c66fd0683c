"""What smoothing importance weights did: a table, and three pictures, from the event files of a sweep's runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_rl.algorithms.ema_weights import variance_ratio
from megatron_rl.report.comparison import COLORS, INK
from megatron_rl.report.curves import ACCURACY

TARGET = 0.95
RAW, SMOOTH = "ema/raw_weights_variance", "ema/smoothed_weights_variance"


class Case(NamedTuple):
    """One setting: the logged steps of each seed."""

    name: str
    runs: list[list[dict[str, Any]]]

    def values(self, key: str) -> list[float]:
        """A figure at every step of every seed that has it."""
        return [row[key] for run in self.runs for row in run if row.get(key) is not None]

    def by_step(self, key: str) -> dict[int, float]:
        """The mean over seeds at each step."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for row in run:
                if row.get(key) is not None:
                    found.setdefault(row["step"], []).append(row[key])
        return {step: fmean(values) for step, values in sorted(found.items())}

    @property
    def beta(self) -> float | None:
        found = self.values("ema/beta")
        return found[0] if found else None


def read_case(name: str, paths: Sequence[Path]) -> Case:
    """`paths` are the `metrics.jsonl` of the seeds."""
    return Case(name, [[json.loads(line) for line in path.read_text().splitlines()] for path in paths])


def table(cases: Sequence[Case]) -> str:
    """A Markdown table, a line per case; variances and norms are means over steps and seeds."""
    plain = median(cases[0].values("timing_s/update_actor"))
    lines = [
        "| case | var(w) | var(w') | var(w) / var(w') | grad norm, std / mean | steps to "
        f"{TARGET:.0%} | final accuracy | update time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        norms = [fmean(_ratio_of_spread(run)) for run in case.runs]
        raw, smooth = case.values(RAW), case.values(SMOOTH)
        cells = [
            case.name,
            f"{fmean(raw):.4f}" if raw else "",
            f"{fmean(smooth):.4f}" if smooth else "",
            f"{fmean(raw) / fmean(smooth):.2f}" if smooth else "",
            f"{fmean(norms):.2f}",
            _steps_to_target(case),
            f"{fmean(_final(run) for run in case.runs):.1%}",
            f"{median(case.values('timing_s/update_actor')) / plain:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ratio_of_spread(run: Sequence[Mapping[str, Any]]) -> list[float]:
    norms = [row["actor/grad_norm"] for row in run if "actor/grad_norm" in row]
    return [pstdev(norms) / fmean(norms)]


def _final(run: Sequence[Mapping[str, Any]]) -> float:
    return [row[ACCURACY] for row in run if ACCURACY in row][-1]


def _steps_to_target(case: Case) -> str:
    first = [next((row["step"] for row in run if row.get(ACCURACY, 0) >= TARGET), None) for run in case.runs]
    reached = [step for step in first if step is not None]
    return f"{fmean(reached):.0f}" if len(reached) == len(first) else f"{len(reached)} of {len(first)} seeds"


def plot_smoothing(cases: Sequence[Case], out_png: Path, *, title: str) -> None:
    """Variance over time; variance ratio by beta beside the theory; bias against variance."""
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold")
    panels = figure.subplots(1, 3)
    _over_time(panels[0], cases)
    smoothed = [case for case in cases if case.beta is not None]
    _by_beta(panels[1], smoothed)
    _bias_and_variance(panels[2], smoothed)
    for panel in panels:
        panel.grid(color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK, length=3)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(out_png, dpi=160, facecolor="white")


def _over_time(panel: Axes, cases: Sequence[Case]) -> None:
    for place, case in enumerate(cases):
        curve = case.by_step(SMOOTH) or case.by_step(RAW)
        if curve:
            panel.plot(list(curve), list(curve.values()), color=COLORS[place % len(COLORS)], label=case.name)
    panel.set(title="variance of the weight that the loss sees", xlabel="step", yscale="log")


def _by_beta(panel: Axes, cases: Sequence[Case]) -> None:
    betas = [case.beta for case in cases if case.beta is not None]
    found = [fmean(case.values(RAW)) / fmean(case.values(SMOOTH)) for case in cases]
    grid = [min(betas) + i * (1 - min(betas)) / 50 for i in range(51)]
    panel.plot(grid, [variance_ratio(beta) for beta in grid], color="#999999", label="(2 - beta) / beta")
    panel.plot(betas, found, "o", color=COLORS[0], label="measured")
    panel.set(title="var(w) / var(w')", xlabel="beta")


def _bias_and_variance(panel: Axes, cases: Sequence[Case]) -> None:
    for place, case in enumerate(cases):
        bias = fmean(case.values("ema/weights_diff_rms"))
        panel.plot(bias, fmean(case.values(SMOOTH)), "o", color=COLORS[(place + 1) % len(COLORS)], label=case.name)
    panel.set(title="bias and variance", xlabel="root mean square of w - w'", ylabel="var(w')")
