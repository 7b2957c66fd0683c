"""Rows of measurements: their statistics, their file, their lines, and what changed since another time."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.bench.comparison import Change, changes, compared
from megatron_rl.bench.rows import Machine, Report, Row, read_report, write_report
from megatron_rl.bench.table import duration, heading, lines

MACHINE = Machine(cpu="A CPU", capability="AVX2", cores=2, torch="2.13.0")


def row(case: str = "sum", **changes: Any) -> Row:
    return Row(**{"bench": "ops", "case": case, "times": (2.0, 1.0, 3.0, 10.0, 2.0), **changes})


def report(*rows: Row, **changes: Any) -> Report:
    return Report(dataclasses.replace(MACHINE, **changes), "2026-01-02", list(rows))


def test_statistics_of_the_repeats() -> None:
    """Sorted 1, 2, 2, 3, 10: the middle half goes from 2 to 3."""
    assert (row().seconds, row().least, row().spread) == (2.0, 1.0, 0.5)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    full = row(
        "product",
        clock="wall",
        threads=2,
        baseline="plain",
        ratio=0.5,
        limit="peak",
        share=0.25,
        figures={"MiB": 3.0},
        wanted={"MiB": 2.0},
    )
    written = report(row(), full)
    write_report(written, tmp_path / "a.json")
    read = read_report(tmp_path / "a.json")
    assert (read.machine, read.date) == (MACHINE, "2026-01-02")
    assert [dataclasses.replace(r, times=tuple(r.times)) for r in read.rows] == written.rows
    raw = json.loads((tmp_path / "a.json").read_text())
    assert (raw["rows"][0]["seconds"], raw["rows"][0]["least"]) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not valid JSON"),
        ("[]", "has no format 'megatron_rl bench 1': name a file of `megatron-rl bench --json`"),
        ('{"format": "another"}', "has no format 'megatron_rl bench 1'"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=str(path)) as refused:
        read_report(path)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.345, "12.3 s"), (1234.5, "1234 s"), (0.00219, "2.19 ms"), (4.2e-6, "4.2 us")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_of_a_row() -> None:
    measured = row(
        baseline="plain torch",
        ratio=0.72,
        limit="its 5 products",
        share=0.83,
        figures={"x products": 1.2, "peak MiB": 4768.2, "x peak": 0.06},
        wanted={"x products": 1.8, "x peak": 0.05},
    )
    first, second = lines(measured).split("\n")
    assert first.split() == ["sum", "2", "s", "50%", "0.72", "plain", "torch", "83.0%", "its", "5", "products"]
    assert (
        second == "    x products 1.2 (wanted at most 1.8), peak MiB 4,768, x peak 0.06 (wanted at most 0.05: MISSED)"
    )
    assert heading("ops").index("median") + len("median") == first.index("2 s") + len("2 s")
    assert lines(row(clock="wall")).split() == ["sum,", "wall", "clock", "2", "s", "50%"]
    bounded = row(baseline="copy", ratio=1.5, wanted={"ratio": 1.15})
    assert lines(bounded).endswith("    ratio 1.5 (wanted at most 1.15: MISSED)")


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        # The middle halves of (9, 10, 11) times a number are a tenth of the median.
        (1.0, 1.09, ""),
        (1.0, 1.11, "worse"),
        (1.0, 0.92, ""),
        (1.0, 0.90, "better"),
    ],
)
def test_only_more_than_the_spread_is_a_change(old: float, new: float, verdict: str) -> None:
    before, after = (row(times=tuple(t * scale for t in (9.0, 10.0, 11.0))) for scale in (old, new))
    change = Change(before, after, same_conditions=True)
    assert change.spread == pytest.approx(0.1)
    assert change.over_old == pytest.approx(new / old)
    assert change.verdict == verdict


def test_the_larger_spread_counts() -> None:
    calm, wild = row(times=(1.0, 1.0, 1.0)), row(times=(0.8, 1.2, 2.0))
    assert Change(calm, wild, same_conditions=True).spread == wild.spread == pytest.approx(0.5)
    assert Change(calm, wild, same_conditions=True).verdict == ""


def test_other_machines_are_compared_by_their_ratios() -> None:
    old = report(row("a", ratio=2.0, times=(1.0, 1.0, 1.0)), row("b", times=(1.0, 1.0, 1.0)), cpu="Another", cores=8)
    new = report(row("a", ratio=3.0, times=(9.0, 9.0, 9.0)), row("b", times=(9.0, 9.0, 9.0)))
    with_ratio, without = changes(old, new)
    assert (with_ratio.same_conditions, with_ratio.over_old, with_ratio.verdict) == (False, 1.5, "worse")
    assert math.isnan(without.over_old) and without.verdict == ""
    text = "\n".join(compared(old, new))
    assert "cpu: Another then, A CPU now" in text and "cores: 8 then, 2 now" in text
    assert "no seconds are compared" in text


def test_other_threads_are_said() -> None:
    old, new = report(row("a", threads=1)), report(row("a", threads=2))
    assert not changes(old, new)[0].same_conditions
    assert "  threads of ops a: 1 then, 2 now" in list(compared(old, new))


def test_a_comparison_in_words() -> None:
    calm = {"ratio": 1.5, "baseline": "copy"}
    old = report(row("same", times=(2.0, 2.0, 2.0), **calm), row("gone"))
    new = report(row("same", times=(3.0, 3.0, 3.0), **calm), row("fresh"))
    said = list(compared(old, new))
    assert said[0] == "against 2026-01-02:"
    assert said[2].split() == ["ops", "same", "2", "s", "3", "s", "1.50", "0%", "1.5", "->", "1.5", "worse"]
    assert said[3:] == ["only then: ops gone", "only now: ops fresh"]
