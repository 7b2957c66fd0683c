"""What a run leaves on disk and on the terminal, also when it is killed and resumed."""

import io
import json
import logging
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
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

WRAP = 'style="white-space: pre-wrap"'


def png(path: Path) -> tuple[Path, np.ndarray]:
    """A small picture without two equal pixels, and its pixels."""
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
    Image.fromarray(pixels).save(path)
    return path, pixels


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def events(run_dir: Path) -> EventAccumulator:
    # Zero keeps everything: by default a histogram or image of all but the latest steps is forgotten.
    everything = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance=everything).Reload()


def curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run_dir).Scalars(key)]


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
    (text,) = events(tmp_path).Tensors("val/answers/text_summary")
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


def test_tensorboard_holds_histograms(tmp_path: Path) -> None:
    with Writer(tmp_path, 3, "grpo") as writer:
        writer.log(1, {"x": 0.5}, {"len": [1.0, 2.0, 2.0, 9.0]})
        writer.log(2, {"x": 0.5}, {"len": [4, math.nan, -math.inf, 4], "empty": [], "nothing": [math.nan]})
        # Already on disk: `log` flushes.
        held = events(tmp_path)
    assert held.Tags()["histograms"] == ["len"]
    first, second = held.Histograms("len")
    assert (first.step, second.step) == (1, 2)
    value = first.histogram_value
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (1.0, 9.0, 4.0, 14.0, 90.0)
    below = [sum(n for n, end in zip(value.bucket, value.bucket_limit) if end < x) for x in (1, 2, 9, 11)]
    assert below == [0, 1, 3, 4]
    value = second.histogram_value
    assert (value.min, value.max, value.num, value.sum) == (4.0, 4.0, 2.0, 8.0)
    assert [sorted(row) for row in rows(tmp_path)] == [["step", "time", "x"]] * 2


def test_tensorboard_holds_images_bit_by_bit(tmp_path: Path) -> None:
    path, pixels = png(tmp_path / "curve.png")
    with Writer(tmp_path / "run", 3, "grpo") as writer:
        writer.image(2, "report/curve", path)
    (image,) = events(tmp_path / "run").Images("report/curve")
    assert (image.step, image.height, image.width) == (2, 4, 6)
    with Image.open(io.BytesIO(image.encoded_image_string)) as drawn:
        assert np.array_equal(np.asarray(drawn.convert("RGB")), pixels)


class Media(NamedTuple):
    """What the stub's Histogram, Html and Image make of their argument."""

    kind: str
    value: Any


class StubRun:
    def __init__(self, starting_step: int) -> None:
        self.id = "stub"
        self.starting_step = starting_step
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, data: dict[str, Any], *, step: int) -> None:
        assert not self.finished
        self.logged.append((step, data))

    def finish(self) -> None:
        self.finished = True


class StubWandb(ModuleType):
    """Records what is asked of W&B. `starting_step` is where the server says that the run goes on."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starting_step = 0
        self.asked: list[dict[str, Any]] = []
        self.runs: list[StubRun] = []

    def init(self, **arguments: Any) -> StubRun:
        self.asked.append(arguments)
        self.runs.append(StubRun(self.starting_step))
        return self.runs[-1]

    def Histogram(self, values: list[float]) -> Media:
        return Media("histogram", values)

    def Html(self, page: str) -> Media:
        return Media("html", page)

    def Image(self, path: str) -> Media:
        return Media("image", path)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StubWandb:
    stub = StubWandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_wandb_is_told_everything_with_its_step(tmp_path: Path, wandb: StubWandb) -> None:
    path, _ = png(tmp_path / "curve.png")
    with Writer(tmp_path / "run", 3, "grpo", wandb="sums", config={"train": {"steps": 3}}) as writer:
        writer.text(0, "val/answers", "| 1 < 2 | <script> |")
        writer.log(0, {"val/accuracy": 0.25})
        writer.log(1, {"actor/loss": 0.5, "x": 1.0}, {"len": [1.0, math.inf, 3.0], "none": [], "nan": [math.nan]})
        writer.image(1, "report/curve", path)
        (run,) = wandb.runs
        assert not run.finished
    assert run.finished
    assert run.logged == [
        (0, {"val/answers": Media("html", f"<pre {WRAP}>| 1 &lt; 2 | &lt;script&gt; |</pre>")}),
        (0, {"val/accuracy": 0.25}),
        (1, {"len": Media("histogram", [1.0, 3.0])}),
        (1, {"actor/loss": 0.5, "x": 1.0}),
        (1, {"report/curve": Media("image", str(path))}),
    ]
    (asked,) = wandb.asked
    assert len(asked.pop("id")) == 16
    assert asked == {
        "project": "sums",
        "dir": str(tmp_path / "run"),
        "name": "run",
        "resume": "allow",
        "config": {"train": {"steps": 3}},
    }
    # TensorBoard and the file have the figures as well.
    assert curve(tmp_path / "run", "x") == [(1, 1.0)]
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]


def test_a_run_directory_is_one_wandb_run(
    tmp_path: Path, wandb: StubWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        for run_dir in ("a", tmp_path / "a", "b/../a", "b"):
            Writer(run_dir, 3, "grpo", wandb="sums", first_step=4).close()
        wandb.starting_step = 4
        Writer("a", 3, "grpo", wandb="sums", first_step=4).close()
    first, *same, other, resumed = [asked["id"] for asked in wandb.asked]
    assert [*same, resumed] == [first] * 3
    assert other != first
    assert not caplog.records


def test_steps_that_wandb_keeps_are_said(tmp_path: Path, wandb: StubWandb, caplog: pytest.LogCaptureFixture) -> None:
    wandb.starting_step = 7
    Writer(tmp_path, 9, "grpo", wandb="sums", first_step=5).close()
    (record,) = caplog.records
    assert record.getMessage() == (
        "W&B run stub already has the steps before 7 and keeps them; this process starts at step 5"
    )


def test_without_a_project_wandb_is_left_alone(tmp_path: Path, wandb: StubWandb) -> None:
    Writer(tmp_path, 3, "grpo").close()
    assert wandb.asked == []


def test_missing_wandb_is_a_value_error_and_drops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Writer(tmp_path, 3, "grpo") as writer:
        writer.log(1, {"x": 1.0})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError) as caught:
        Writer(tmp_path, 3, "grpo", wandb="sums")
    assert str(caught.value) == "log.wandb='sums' needs wandb: pip install wandb, or remove log.wandb"
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_real_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The stub says what we send; this says that W&B takes it.
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    pytest.importorskip("wandb")
    path, pixels = png(tmp_path / "curve.png")
    with Writer(tmp_path / "run", 3, "grpo", wandb="sums", config={"seed": 1}) as writer:
        writer.text(1, "val/answers", "| 1 < 2 |")
        writer.log(1, {"x": 0.5, "bad": math.nan}, {"len": [1.0, 2.0]})
        writer.image(1, "report/curve", path)
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert run.stat().st_size > 0
    (page,) = run.parent.glob("files/media/html/val/*.html")
    assert "| 1 &lt; 2 |</pre>" in page.read_text()
    (copy,) = run.parent.glob("files/media/images/report/*.png")
    with Image.open(copy) as drawn:
        assert np.array_equal(np.asarray(drawn.convert("RGB")), pixels)


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
