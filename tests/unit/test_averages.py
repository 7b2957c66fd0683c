"""What docs/averages.md says of windows and schedules is what the code computes."""

import math
import re
from pathlib import Path

import pytest

from megatron_rl.config.average import AverageConfig, AverageSchedule
from megatron_rl.ops.ema import decay
from megatron_rl.workers.average import decay_of

PAGE = (Path(__file__).parents[2] / "docs" / "averages.md").read_text(encoding="utf-8")


def table(first_column: str) -> list[list[str]]:
    """The rows of the table that begins with this heading."""
    block = re.search(rf"^\| {re.escape(first_column)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert block is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].splitlines()]


def test_table_of_the_warm_up() -> None:
    rows = table("updates done before")
    assert [int(row[0]) for row in rows] == [0, 1, 2, 10, 100, 1000, 10_000, 31_623, 100_000, 1_000_000]
    for number, two_thirds, three_quarters in rows:
        assert two_thirds == f"{decay(int(number), power=2 / 3):.4f}", number
        assert three_quarters == f"{decay(int(number), power=3 / 4):.4f}", number


def test_table_of_windows() -> None:
    """The half life is the number of updates after which a change has arrived by half."""
    rows = [[float(cell) for cell in row] for row in table("rate")]
    assert rows[0][0] == 0.001 and rows[-1] == [1, 0, 1, 0]
    for rate, kept, window, half_life in rows:
        assert kept == pytest.approx(1 - rate) and window == pytest.approx(1 / rate)
        if rate < 1:
            assert half_life == float(f"{math.log(2) / -math.log(1 - rate):.1f}"), rate
            assert kept**half_life == pytest.approx(0.5, abs=0.01)


def test_numbers_in_the_text() -> None:
    assert round(100 * 0.99**100) == 37 and round(100 / math.e) == 37
    assert decay(10_000, power=3 / 4) == pytest.approx(0.999) and decay(31_623) == pytest.approx(0.999)


def test_options_choose_the_decay() -> None:
    constant = decay_of(AverageConfig(rate=0.02))
    assert [constant(n) for n in (0, 1, 1000)] == [0.98] * 3
    warmup = AverageSchedule.warmup
    assert [decay_of(AverageConfig(schedule=warmup))(n) for n in (0, 1, 500)] == [0, 0, decay(500)]
    bent = decay_of(AverageConfig(schedule=warmup, inv_gamma=10, power=0.75, min=0.3, max=0.9, update_after=4))
    assert [bent(n) for n in (5, 6, 10**6)] == [0.0, 0.3, 0.9]
    assert bent(37) == 1 - 4.2**-0.75
