"""The comparison of smoothing: every cell of the table by hand, and the points of the pictures."""

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from megatron_rl.report.smoothing import Case, plot_smoothing, read_case, table


def run(path: Path, beta: float | None, norms: list[float], accuracies: list[float]) -> Path:
    rows: list[dict[str, Any]] = [{"step": 0, "val/accuracy": 0.3}]
    for step, (norm, accuracy) in enumerate(zip(norms, accuracies), start=1):
        row = {"step": step, "actor/grad_norm": norm, "val/accuracy": accuracy, "ema/raw_weights_variance": 0.3}
        row["timing_s/update_actor"] = 2.0 if beta is None else 3.0
        if beta is not None:
            row |= {"ema/beta": beta, "ema/smoothed_weights_variance": 0.2, "ema/weights_diff_rms": 0.1}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    off = [run(tmp_path / f"off{i}", None, [1, 3], [0.9, 0.96]) for i in range(2)]
    smoothed = [
        run(tmp_path / "a", 0.9, [2, 2], [0.95, 0.97]),
        run(tmp_path / "b", 0.9, [2, 2], [0.5, 0.93]),
    ]
    return [read_case("off", off), read_case("beta 0.9", smoothed)]


def test_every_cell(cases: list[Case]) -> None:
    lines = table(cases).splitlines()
    assert lines[2] == "| off | 0.3000 |  |  | 0.50 | 2 | 96.0% | 1.00 |"
    # One of two seeds reaches 95%.
    assert lines[3] == "| beta 0.9 | 0.3000 | 0.2000 | 1.50 | 0.00 | 1 of 2 seeds | 95.0% | 1.50 |"


def test_points(cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[matplotlib.figure.Figure] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: saved.append(figure))
    plot_smoothing(cases, tmp_path / "s.png", title="t")
    time, beta, bias = saved[0].axes
    assert [(line.get_label(), list(line.get_ydata())) for line in time.lines] == [
        ("off", [0.3, 0.3]),
        ("beta 0.9", [0.2, 0.2]),
    ]
    theory, measured = beta.lines
    assert theory.get_ydata()[0] == pytest.approx(1.1 / 0.9) and theory.get_ydata()[-1] == pytest.approx(1.0)
    assert [float(v) for v in (*measured.get_xdata(), *measured.get_ydata())] == pytest.approx([0.9, 1.5])
    assert [float(v) for v in (*bias.lines[0].get_xdata(), *bias.lines[0].get_ydata())] == pytest.approx([0.1, 0.2])
