"""A run as the report sees it: every figure as a curve, distributions, texts, the config and the alarms."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_rl.report.events import Distribution, Events, Points, Text

NAMES = Path(__file__).with_name("names.yaml")
CONFIGS = ("config.yaml", ".hydra/config.yaml")


class Curve(NamedTuple):
    """A figure: growing steps, and a value for each, which may be NaN."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def finite(self) -> "Curve":
        """Without what is no number."""
        keep = np.isfinite(self.values)
        return Curve(self.steps[keep], self.values[keep])


@dataclass
class RunData:
    """What was read of one run. `damages` says what could not be."""

    directory: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    distributions: dict[str, list[Distribution]] = field(default_factory=dict)
    texts: dict[str, list[Text]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    damages: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """Every step that any figure has."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *(curve.steps for curve in self.curves.values())]))

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, dict[str, float]]]:
        """Each step with those of the figures that it has."""
        here = {name: self.curves[name] for name in names if name in self.curves}
        places = dict.fromkeys(here, 0)
        for step in self.steps.tolist():
            row = {}
            for name, (steps, values) in here.items():
                place = places[name]
                if place < len(steps) and steps[place] == step:
                    row[name] = float(values[place])
                    places[name] += 1
            yield step, row


def event_files(directory: Path) -> list[Path]:
    """Those of the one run in a directory, oldest first; ValueError where there are several runs' or nothing at all."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: name a run directory, or one with TensorBoard event files")
    found = sorted(path for path in directory.rglob("*tfevents*") if path.is_file())
    own = [path for path in found if path.parent == directory / "tensorboard"]
    places = sorted({path.parent for path in found})
    if not own and len(places) > 1:
        runs = [place.parent if place.name == "tensorboard" else place for place in places]
        shown = ", ".join(str(place) for place in runs[:4]) + (", ..." if len(places) > 4 else "")
        raise ValueError(f"{directory} holds event files of {len(places)} runs; name one of them: {shown}")
    if not found and not (directory / "metrics.jsonl").is_file():
        raise ValueError(f"{directory} has neither a metrics.jsonl nor TensorBoard event files: there is no run in it")
    return own or found


def read_run(directory: Path, on_bytes: Callable[[int], object] = lambda count: None) -> RunData:
    """Reads all that there is. Of a figure that is in `metrics.jsonl` and in event files the former counts."""
    run = RunData(directory, files=event_files(directory))
    events = Events()
    for path in run.files:
        events.read(path, on_bytes)
    points = events.points
    lines = directory / "metrics.jsonl"
    if lines.is_file():
        points |= _points_of_lines(lines, run.damages)
        run.files.append(lines)
    names = our_names(list(points))
    run.curves = {names[name]: curve(points.pop(name)) for name in list(points)}
    run.distributions = {name: sorted(found) for name, found in events.distributions.items()}
    run.texts = {name: sorted(found) for name, found in events.texts.items()}
    run.damages += events.damages
    run.config = _read_config(directory, run.damages)
    if (directory / "alarms.jsonl").is_file():
        run.alarms = list(_read_lines(directory / "alarms.jsonl", run.damages))
    return run


def curve(points: Points) -> Curve:
    """In the order of steps. Of a step that was written again the last value counts."""
    steps, values = np.array(points.steps, np.int64), np.array(points.values, np.float64)
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True) if len(steps) else np.empty(0, bool)
    return Curve(steps[last], values[last])


def our_names(theirs: Sequence[str]) -> dict[str, str]:
    """What each name is called here; no two of them the same."""
    names = {name: name for name in theirs}
    taken = set(theirs)
    for stack in yaml.safe_load(NAMES.read_text(encoding="utf-8")).values():
        for pattern, ours in stack.items():
            match = next((name for name in sorted(theirs) if fnmatchcase(name, pattern)), None)
            if match is not None and ours not in taken:
                names[match] = ours
                taken.add(ours)
    return names


def _points_of_lines(path: Path, damages: list[str]) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for row in _read_lines(path, damages):
        for name, value in row.items():
            if name in ("step", "time") or not (value is None or isinstance(value, int | float)):
                continue
            points = found.setdefault(name, Points())
            points.add(int(row["step"]), math.nan if value is None else float(value))
    return found


def _read_lines(path: Path, damages: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines that have a step."""
    wrong = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
            else:
                wrong += 1
    if wrong:
        damages.append(f"{path.name}: {wrong} lines are cut off or no figures of a step, and were left out")


def _read_config(directory: Path, damages: list[str]) -> dict[str, Any]:
    for name in CONFIGS:
        if (directory / name).is_file():
            try:
                config = yaml.safe_load((directory / name).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                config = None
            if isinstance(config, dict):
                return config
            damages.append(f"{name}: not a YAML mapping; it was left out")
    return {}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
