"""A measured case, the machine it was measured on, and the file that both are kept in."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

FORMAT = "megatron_rl bench 1"
Clock = Literal["cpu", "wall"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case. Ratios are ours over the baseline's, so that less is better."""

    bench: str
    case: str  # with its size and dtype: rows of two files are the same case where these words are the same
    times: Sequence[float]  # seconds of each repeat
    clock: Clock = "cpu"  # seconds of this process's processors, or of the clock on the wall
    threads: int = 1
    baseline: str | None = None
    ratio: float | None = None  # the median over the repeats
    limit: str | None = None
    share: float | None = None  # of the limit that is reached
    figures: Mapping[str, float] = field(default_factory=dict)
    wanted: Mapping[str, float] = field(default_factory=dict)  # upper bounds of figures, or of `ratio`

    @property
    def seconds(self) -> float:
        return median(self.times)

    @property
    def least(self) -> float:
        return min(self.times)

    @property
    def spread(self) -> float:
        """The middle half of the repeats over their median."""
        low, _, high = quantiles(self.times, n=4, method="inclusive")
        return (high - low) / self.seconds

    def measured(self, name: str) -> float:
        """What a wanted bound is a bound of."""
        value = self.ratio if name == "ratio" else self.figures[name]
        assert value is not None, (self.case, name)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    cpu: str
    capability: str  # the instructions that torch uses
    cores: int
    torch: str


@dataclass(frozen=True, slots=True)
class Report:
    """What one or more benches measured."""

    machine: Machine
    date: str
    rows: Sequence[Row]


def write_report(report: Report, path: Path) -> None:
    content = {
        "format": FORMAT,
        "date": report.date,
        "machine": asdict(report.machine),
        "rows": [{**asdict(row), "seconds": row.seconds, "least": row.least} for row in report.rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_report(path: Path) -> Report:
    """ValueError where the file is none that `write_report` wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; name a file of `megatron-rl bench --json`") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} has no format {FORMAT!r}: name a file of `megatron-rl bench --json`")
    return Report(Machine(**content["machine"]), content["date"], [_row(row) for row in content["rows"]])


def _row(content: Mapping[str, Any]) -> Row:
    """Without what is computed from the rest."""
    return Row(**{item.name: content[item.name] for item in fields(Row)})
