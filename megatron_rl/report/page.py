"""What a report says, before it becomes Markdown or HTML."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_rl.report.findings import Finding, findings
from megatron_rl.report.panels import CRITIC, SECTIONS, THROUGHPUT, Panel, Section, present
from megatron_rl.report.plots import plot_curves, plot_distribution
from megatron_rl.report.series import RunData, flat
from megatron_rl.report.times import seconds_by_phase
from megatron_rl.report.verdict import Row, is_critic_run, verdict

_MOST_ROWS = 40
_MOST_TEXT = 6000
# What the critic's table shows; of two figures their range.
_CRITIC_COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("d_acc", ("critic/d_acc",)),
    ("score_diff", ("critic/score_diff",)),
    ("teacher mean", ("critic/teacher_value_mean",)),
    ("std", ("critic/teacher_value_std",)),
    ("range", ("critic/teacher_value_min", "critic/teacher_value_max")),
    ("student mean", ("critic/student_value_mean",)),
    ("std", ("critic/student_value_std",)),
    ("range", ("critic/student_value_min", "critic/student_value_max")),
)


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]


class Picture(NamedTuple):
    """`figure` is the name of what is drawn, where that is one figure; `says` is for those who do not see it."""

    title: str
    figure: str
    uri: str
    says: str


class Sample(NamedTuple):
    """A text that was logged; a table where it is one in Markdown."""

    title: str
    text: str
    table: Table | None


@dataclass
class Part:
    title: str
    note: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


@dataclass
class Page:
    """One report. `verdicts` and `found` are by run."""

    title: str
    facts: list[tuple[str, str]]
    verdicts: list[tuple[str, list[Row]]]
    found: list[tuple[str, list[Finding]]]
    parts: list[Part]


def make_page(runs: Sequence[RunData]) -> Page:
    """The report of one run, or of two held against each other."""
    names = run_names(runs)
    parts = [_comparison(runs, names)] if len(runs) > 1 else []
    parts += [_part(section, runs, names) for section in SECTIONS]
    parts[-1:-1] = [_distributions(runs, names)]
    parts += [_samples(runs, names), _all_figures(runs, names)]
    return Page(
        title=" and ".join(names),
        facts=[(name, _facts(run)) for name, run in zip(names, runs)],
        verdicts=[(name, verdict(run)) for name, run in zip(names, runs) if is_critic_run(run)],
        found=[(name, findings(run)) for name, run in zip(names, runs)],
        parts=[part for part in parts if part.pictures or part.tables or part.samples],
    )


def run_names(runs: Sequence[RunData]) -> list[str]:
    """The directories' names; as much of their paths as tells them apart."""
    parts = [run.directory.resolve().parts for run in runs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(runs) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(part[-depth:]).replace("//", "/") for part in parts]


def _facts(run: RunData) -> str:
    steps = run.steps
    size = sum(path.stat().st_size for path in run.files) / 1e6
    count = sum(len(curve.steps) for curve in run.curves.values())
    trainer = f"trainer {run.config['trainer']}, " if isinstance(run.config.get("trainer"), str) else ""
    asked = run.config.get("train")
    total = f" of {asked['steps']}" if isinstance(asked, dict) and "steps" in asked else ""
    until = f"steps {steps[0]} to {steps[-1]}{total}, " if len(steps) else "no steps, "
    files = "1 file" if len(run.files) == 1 else f"{len(run.files)} files"
    return f"{trainer}{until}{len(run.curves)} figures, {count:,} values from {files} ({size:.2f} MB)"


def _part(section: Section, runs: Sequence[RunData], names: Sequence[str]) -> Part:
    pictures = [picture for panel in section.panels if (picture := _picture(panel, runs))]
    part = Part(section.title, section.note if pictures else "", pictures)
    if section is CRITIC:
        part.tables = [table for run, name in zip(runs, names) if (table := _critic_table(run, name, len(runs) > 1))]
    if section is THROUGHPUT:
        part.tables = [table for run, name in zip(runs, names) if (table := _time_table(run, name, len(runs) > 1))]
    return part


def _picture(panel: Panel, runs: Sequence[RunData]) -> Picture | None:
    shown = list(dict.fromkeys(name for run in runs for name in present(panel, run)))
    if not shown:
        return None
    curves = {name: [run.curves.get(name) for run in runs] for name in shown}
    measured = [(name, curve.finite()) for name, of_runs in curves.items() for curve in of_runs if curve is not None]
    says = [
        f"{name} from {values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}"
        for name, (steps, values) in measured
        if len(steps)
    ]
    steps = np.concatenate([run.steps[[0, -1]] for run in runs if run.curves])
    uri = plot_curves(curves, steps=(int(steps.min()), int(steps.max())), healthy=panel.healthy, log=panel.log)
    return Picture(panel.title, shown[0] if len(shown) == 1 else "", uri, "; ".join(says))


def _critic_table(run: RunData, name: str, named: bool) -> Table | None:
    """By step; of a long run about forty steps, the first ten and the last among them."""
    columns = [(label, keys) for label, keys in _CRITIC_COLUMNS if all(key in run.curves for key in keys)]
    if not columns:
        return None
    curves = {key: run.curves[key] for _, keys in columns for key in keys}
    steps = np.unique(np.concatenate([curve.steps for curve in curves.values()]))
    if len(steps) > _MOST_ROWS:
        later = np.linspace(10, len(steps) - 1, _MOST_ROWS - 10).round().astype(int)
        steps = steps[np.concatenate([np.arange(10), later])]
    values = {key: dict(zip(curve.steps.tolist(), curve.values.tolist())) for key, curve in curves.items()}
    rows = [
        [str(step), *(" to ".join(_number(values[key].get(step)) for key in keys) for _, keys in columns)]
        for step in steps.tolist()
    ]
    return Table([f"step of {name}" if named else "step", *(label for label, _ in columns)], rows)


def _time_table(run: RunData, name: str, named: bool) -> Table | None:
    rows = [[phase, _number(seconds), f"{share:.1%}"] for phase, seconds, share in seconds_by_phase(run)]
    return Table([f"phase of {name}" if named else "phase", "seconds per step", "share"], rows) if rows else None


def _distributions(runs: Sequence[RunData], names: Sequence[str]) -> Part:
    part = Part("Distributions", "The median, and shaded the middle half, the middle 80% and the whole range.")
    for run, name in zip(runs, names):
        for key, found in sorted(run.distributions.items()):
            title = f"{key}, {name}" if len(runs) > 1 else key
            says = f"median from {found[0].quantiles[3]:.4g} to {found[-1].quantiles[3]:.4g}"
            part.pictures.append(Picture(title, "", plot_distribution(found), says))
    return part


def _samples(runs: Sequence[RunData], names: Sequence[str]) -> Part:
    part = Part("Samples")
    for run, name in zip(runs, names):
        for key, texts in sorted(run.texts.items()):
            last = texts[-1]
            title = f"{key} at step {last.step}" + (f", {name}" if len(runs) > 1 else "")
            cut = last.text[:_MOST_TEXT] + ("..." if len(last.text) > _MOST_TEXT else "")
            part.samples.append(Sample(title, cut, _markdown_table(last.text)))
    return part


def _markdown_table(text: str) -> Table | None:
    """A text that is one table in Markdown."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    rows = [[cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    if len(rows) < 3 or not all(line.startswith("|") for line in lines) or len({len(row) for row in rows}) != 1:
        return None
    return Table(rows[0], rows[2:])


def _all_figures(runs: Sequence[RunData], names: Sequence[str]) -> Part:
    part = Part("All figures")
    for run, name in zip(runs, names):
        rows = []
        for key, curve in sorted(run.curves.items()):
            steps, values = curve.finite()
            if len(steps):
                numbers = (values[0], values[-1], values.min(), values.max(), values.mean())
                rows.append([key, str(len(curve.steps)), *map(_number, numbers)])
        if rows:
            first = f"figure of {name}" if len(runs) > 1 else "figure"
            part.tables.append(Table([first, "values", "first", "last", "lowest", "highest", "mean"], rows))
    return part


def _comparison(runs: Sequence[RunData], names: Sequence[str]) -> Part:
    """The options that differ."""
    options = [flat(run.config) for run in runs]
    keys = list(dict.fromkeys(key for one in options for key in one))
    rows = [
        [key, *(str(one[key]) if key in one else "" for one in options)]
        for key in keys
        if len({repr(one.get(key)) for one in options}) > 1
    ]
    note = f"In the pictures {names[0]} is solid and {names[1]} dashed."
    return Part("Differences of the configs", note, tables=[Table(["option", *names], rows or [["none", "", ""]])])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
