"""`megatron-rl report`: exit codes, the two files it writes, and two runs held against each other."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.cli import main
from megatron_rl.metrics.bar import counting
from megatron_rl.metrics.writer import Writer
from megatron_rl.report.events import Distribution
from megatron_rl.report.plots import MOST_POINTS, plot_curves, plot_distribution, thinned
from megatron_rl.report.series import Curve
from tests.event_files import warm_up, write_scalars
from tests.unit.test_rules import healthy

ROOT = Path(__file__).parents[2]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags close in their order, and collects what a page points to and says."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "table":
            assert self.tags[-1] == ("div", {"class": "scroll"})
        self.tags.append((tag, found))
        self.ids |= {found["id"]} if found.get("id") else set()
        self.targets += [found[name] or "" for name in ("src", "href", "action", "srcset") if name in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def healthy_run(
    directory: Path,
    answer: str = "| prompt | response |\n|---|---|\n| 1+1= | 2 |",
    *,
    lr: float = 1e-4,
    shown: tuple[str, ...] = ("",),
) -> Path:
    """A run directory as a run leaves it, with the figures whose names begin so."""
    with Writer(directory, 30, "grpo") as writer:
        for step, row in enumerate(healthy(30), 1):
            scalars = {name: value for name, value in row.items() if value is not None and name.startswith(shown)}
            scores = np.random.default_rng(step).normal(size=64).tolist()
            writer.log(step, scalars, {"critic/score": scores} if step % 5 == 0 else {})
        writer.text(30, "val/answers", answer)
    config = f"trainer: grpo\noptim:\n  lr: {lr}\n  clip_grad: 1.0\ntrain:\n  steps: 30\n"
    (directory / "config.yaml").write_text(config)
    return directory


def test_a_healthy_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = healthy_run(tmp_path / "mine")
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert "nothing was found" in said and "report.html" in said
    page = (run / "report.html").read_text()
    text = (run / "report.md").read_text()
    for words in ("trainer grpo", "steps 1 to 30 of 30", "Nothing was found.", "Learning", "Length bias", "Samples"):
        assert words in page and words in text
    for words in ("Distributions", "Throughput", "Hard samples", "Gradients and updates"):
        assert (words in page) is (words != "Throughput") and (f"## {words}" in text) is (words != "Throughput")
    assert "| 1+1= | 2 |" in text and "<td>1+1=</td><td>2</td>" in page
    # What was written is not taken for a part of the run, and comes out the same.
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text() == page


def test_where_the_seconds_went(tmp_path: Path) -> None:
    """Phases by their seconds, parts after their phase; what is no phase of a step is left out."""
    step = {"step": 4.0, "gen": 1.0, "update_actor": 2.5, "update_actor/optimizer": 0.5, "testing": 9.0}
    rows = [{f"timing_s/{name}": factor * seconds for name, seconds in step.items()} for factor in (1.0, 3.0)]
    write_scalars(tmp_path / "run", enumerate(rows, 1))
    assert main(["report", str(tmp_path / "run")]) == 0
    table = [
        "| phase | seconds per step | share |",
        "| --- | --- | --- |",
        "| timing_s/update_actor | 5 | 62.5% |",
        "| timing_s/update_actor/optimizer | 1 | 12.5% |",
        "| timing_s/gen | 2 | 25.0% |",
    ]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "\n".join(table) in text and "timing_s/testing | 18" not in text


def test_a_sick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scalars(tmp_path / "warm_up", warm_up().items())
    out = tmp_path / "elsewhere" / "report"
    assert main(["report", str(tmp_path / "warm_up"), "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "the critic fails 5 of 5" in said and "severe       d_acc_jump: step 5:" in said
    assert not (tmp_path / "warm_up" / "report.md").exists()
    page, text = Reader((out / "report.html").read_text()), (out / "report.md").read_text()
    assert [found["class"] for tag, found in page.tags if tag == "td" and "class" in found] == ["mark fail"] * 5
    assert text.count("| fail |") == 5
    # The critic's table: a row for each step.
    assert "| step | d_acc | score_diff | teacher mean | std | range | student mean | std | range |" in text
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [row[0] for row in rows] == [f"| {step}" for step in range(1, 13)]
    assert rows[0][5:8] == ["-1 to 3.5", "1.03", "0.8"] and rows[9][6] == "-0.67"


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    """No address but its own pictures and places; it fits a phone; what a model wrote stays text."""
    nasty = "a <script>alert(1)</script> & <img src=http://example.org/x.png> ````python"
    run = healthy_run(tmp_path / "mine", nasty)
    assert main(["report", str(run)]) == 0
    source = (run / "report.html").read_text()
    page = Reader(source)
    assert source.startswith("<!DOCTYPE html>") and nasty in "".join(page.text)
    tags = {tag for tag, _ in page.tags}
    assert {"title", "h1", "figure", "table", "nav"} <= tags and not tags & {"script", "link", "iframe", "base"}
    viewport = [found["content"] for tag, found in page.tags if tag == "meta" and found.get("name") == "viewport"]
    assert viewport == ["width=device-width, initial-scale=1"]
    style = source[source.index("<style>") : source.index("</style>")]
    assert (
        "@import" not in style and "url(" not in style and "overflow-x: auto" in style and "background: #fff" in style
    )
    pictures = [target for target in page.targets if target.startswith("data:image/svg+xml;base64,")]
    assert len(pictures) > 10
    for target in set(page.targets) - set(pictures):
        assert target[0] == "#" and target[1:] in page.ids
    for picture in pictures:
        drawing = base64.b64decode(picture.split(",")[1]).decode()
        assert not re.search(r"(href|src)=\"(?!#)|url\((?!#)|<script|<image", drawing)
    assert all(found.get("alt") for tag, found in page.tags if tag == "img")
    assert f"`````\n{nasty}\n`````\n" in (run / "report.md").read_text()
    # Outside of what the model wrote there is no address.
    assert re.findall(r"https?:", source.replace("http://example.org", "")) == []


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("critic/score", "actor/entropy")
    one, other = healthy_run(tmp_path / "one", shown=few), healthy_run(tmp_path / "other", lr=3e-4, shown=few)
    assert main(["report", str(one), str(other)]) == 0
    page, text = (one / "report.html").read_text(), (one / "report.md").read_text()
    assert not (other / "report.md").exists()
    assert "| option | one | other |\n| --- | --- | --- |\n| optim.lr | 0.0001 | 0.0003 |\n\n" in text
    assert "clip_grad" not in text
    assert "In the pictures one is solid and other dashed." in page
    assert "<h3>one</h3>" in page and "<h3>other</h3>" in page
    write_scalars(tmp_path / "sick", warm_up().items())
    capsys.readouterr()
    assert main(["report", str(one), str(tmp_path / "sick")]) == 1
    said = capsys.readouterr().out
    assert "one: nothing was found" in said and "sick: severe" in said
    same = [healthy_run(tmp_path / name / "run", shown=few) for name in ("a", "b")]
    assert main(["report", *map(str, same)]) == 0
    text = (same[0] / "report.md").read_text()
    assert text.startswith("# a/run and b/run\n") and "| none |  |  |" in text


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write_scalars(tmp_path / "runs" / "one" / "tensorboard", [(1, {"a": 1.0})])
    write_scalars(tmp_path / "runs" / "two", [(1, {"a": 1.0})])
    (tmp_path / "file").write_text("")
    write_scalars(tmp_path / "good", [(1, {"a": 1.0})])
    for arguments, words in (
        ([tmp_path / "absent"], "absent is not a directory"),
        ([tmp_path / "empty"], "there is no run in it"),
        ([tmp_path / "runs"], f"event files of 2 runs; name one of them: {tmp_path}/runs/one, {tmp_path}/runs/two"),
        ([tmp_path / "good", tmp_path / "empty"], "there is no run in it"),
        ([tmp_path / "good", "--out", tmp_path / "file" / "x"], "name another --out"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("megatron-rl: ") and words in line
    # Figures without any value are no reason to fail.
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path / "empty")]) == 0


def test_help_names_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--help"], "report"), (["report", "--help"], "megatron-rl report runs/mine")):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0 and words in " ".join(capsys.readouterr().out.split())


def test_torch_is_not_waited_for(tmp_path: Path) -> None:
    write_scalars(tmp_path, warm_up().items())
    code = "import sys; from megatron_rl.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_progress_is_told_while_reading(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with counting("reading", 300_000_000) as on_bytes:
        for _ in range(3):
            on_bytes(100_000_000)
    assert capsys.readouterr().err == "megatron-rl: reading, 200 of 300 MB\n"


def test_long_curves_keep_their_spikes() -> None:
    values = np.sin(np.arange(100_000) / 5000)
    values[77_777], values[33_333] = 50.0, -50.0
    values[:400] = np.nan
    steps, kept = thinned(Curve(np.arange(100_000), values))
    assert MOST_POINTS // 2 <= len(kept) <= MOST_POINTS and (np.diff(steps) > 0).all()
    assert (np.nanmax(kept), np.nanmin(kept)) == (50.0, -50.0) and steps[np.nanargmax(kept)] == 77_777
    short = Curve(np.arange(5), np.arange(5.0))
    assert thinned(short) is short


def test_pictures_of_hard_cases() -> None:
    """Nothing finite, one point, zeros on an axis that would be logarithmic, one distribution."""
    nothing = Curve(np.arange(3), np.full(3, np.nan))
    point = Curve(np.array([7]), np.array([0.0]))
    for picture in (
        plot_curves({"a": [nothing]}, steps=(0, 3), healthy=(0.0, 1.0)),
        plot_curves({"a": [point, point], "b": [nothing]}, steps=(7, 7), log=True),
        plot_distribution([Distribution(1, [0.0] * 7)]),
    ):
        assert base64.b64decode(picture.split(",")[1]).rstrip().endswith(b"</svg>")


def test_the_second_run_is_dashed_also_where_it_is_alone() -> None:
    curve = Curve(np.arange(3), np.arange(3.0))
    for of_runs, dashed in (([curve, None], False), ([None, curve], True), ([curve, curve], True)):
        drawing = base64.b64decode(plot_curves({"a": of_runs}, steps=(0, 3)).split(",")[1])
        assert (b"stroke-dasharray" in drawing) is dashed


def test_a_broken_config_is_told_of(tmp_path: Path) -> None:
    write_scalars(tmp_path, [(1, {"a": 1.0})])
    (tmp_path / "config.yaml").write_text("- a\n- b\n")
    assert main(["report", str(tmp_path)]) == 0
    assert "config.yaml: not a YAML mapping" in (tmp_path / "report.md").read_text()
