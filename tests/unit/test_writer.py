"""What a run leaves on disk and on the terminal, also when it is killed and resumed."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rl.metrics.writer import LiveTable, Writer

STEP = {
    "perf/tokens_per_second": 5123.4,
    "critic/score/mean": 0.43,
    "actor/loss": 0.012,
    "actor/grad_norm": 0.8,
    "response_length/mean": 4.1,
    "timing_s/step": 1.23,
    "unknown/figure": 7.0,
}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_one_line_per_step_on_disk_and_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Writer(tmp_path, 100, "grpo") as writer:
        writer.log(12, STEP)
        writer.log(13, {"val/accuracy": 0.5, "sft/loss": math.nan})
    assert capsys.readouterr().out == (
        "step 12/100  reward 0.43  loss 0.012  grad_norm 0.8  len 4.1  tok/s 5123  1.2 s\n"
        "step 13/100  accuracy 0.5  loss nan\n"
    )
    first, second = rows(tmp_path)
    assert first.pop("time") > 1.7e9
    assert first == {"step": 12, **STEP}
    assert second.pop("time") >= 1.7e9
    assert second == {"step": 13, "val/accuracy": 0.5, "sft/loss": None}


def test_nan_and_infinity_are_null(tmp_path: Path) -> None:
    with Writer(tmp_path, 3, "sft") as writer:
        writer.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    (row,) = rows(tmp_path)
    assert {key: row[key] for key in "abcd"} == {"a": None, "b": None, "c": None, "d": 1.0}


def test_tensorboard_holds_every_figure_and_text(tmp_path: Path) -> None:
    with Writer(tmp_path, 3, "grpo") as writer:
        writer.log(1, {"x/y": 0.5})
        writer.log(2, {"x/y": 0.25})
        writer.text(2, "val/answers", "| prompt | response |")
    assert curve(tmp_path, "x/y") == [(1, 0.5), (2, 0.25)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("val/answers/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (2, b"| prompt | response |")


def test_figures_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with Writer(tmp_path, 3, "grpo") as writer:
        writer.log(1, {"x": 0.5})
        assert [row["x"] for row in rows(tmp_path)] == [0.5]
        assert curve(tmp_path, "x") == [(1, 0.5)]


@pytest.mark.parametrize(
    ("first_step", "kept"), [(0, []), (3, [(1, 1.0), (2, 1.0)]), (9, [(s, 1.0) for s in range(1, 6)])]
)
def test_resume_drops_what_will_be_logged_again(tmp_path: Path, first_step: int, kept: list[tuple[int, float]]) -> None:
    with Writer(tmp_path, 20, "grpo") as writer:
        for step in range(1, 6):
            writer.log(step, {"x": 1.0})
    with Writer(tmp_path, 20, "grpo", first_step=first_step) as writer:
        writer.log(first_step, {"x": 2.0})
    expected = [*kept, (first_step, 2.0)]
    assert [(row["step"], row["x"]) for row in rows(tmp_path)] == expected
    assert curve(tmp_path, "x") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_resume_drops_a_line_cut_short_by_a_kill(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x"')
    with Writer(tmp_path, 3, "grpo", first_step=2) as writer:
        writer.log(2, {"x": 2.0})
    assert [(row["step"], row["x"]) for row in rows(tmp_path)] == [(1, 1.0), (2, 2.0)]


def test_live_table_shows_the_latest_steps() -> None:
    screen = io.StringIO()
    table = LiveTable(100, "grpo", Console(file=screen, force_terminal=True, width=100, color_system=None))
    table.show(0, {"val/accuracy": 0.25})
    for step in range(1, 21):
        table.show(step, {"critic/score/mean": step / 100, "timing_s/step": 1.5})
    screen.truncate(0)
    table.close()
    picture = screen.getvalue()
    header = next(line for line in picture.splitlines() if "reward" in line)
    # Step 0 has left the table, and its figure with it.
    assert header.replace("┃", " ").split() == ["step", "reward", "time"]
    cells = [line.replace("│", " ").split() for line in picture.splitlines() if line.startswith("│")]
    assert cells == [[str(step), f"{step / 100:.3g}", "1.5", "s"] for step in range(9, 21)]
    assert "20/100" in picture
