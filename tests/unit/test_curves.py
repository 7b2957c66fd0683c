"""The learning curve draws the figures that were logged."""

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from matplotlib.image import imread

from megatron_rl.report.curves import ACCURACY, REWARD, Series, plot_learning_curve, read_series


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Every figure that is saved, for the test to look into."""
    saved: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def spy(figure: matplotlib.figure.Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", spy)
    return saved


def test_series_skips_what_is_absent_or_null(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.jsonl", [{"step": 0}, {"step": 1, "x": 0.5}, {"step": 2, "x": None}, {"step": 3, "x": 0.0}]
    )
    assert read_series(path, "x") == Series([1, 3], [0.5, 0.0])


def test_stages_stand_side_by_side_on_one_axis(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    sft = write(tmp_path / "sft.jsonl", [{"step": s, "sft/loss": 1.0, ACCURACY: s / 10} for s in range(4)])
    grpo = write(tmp_path / "grpo.jsonl", [{"step": s, ACCURACY: 0.5, REWARD: s / 20} for s in range(1, 9)])
    plot_learning_curve({"SFT": sft, "GRPO": grpo}, tmp_path / "curve.png", title="A run")
    height, width, _ = imread(tmp_path / "curve.png").shape
    assert width > height > 400
    (figure,) = figures
    first, second = figure.axes
    assert [panel.get_title() for panel in figure.axes] == ["SFT", "GRPO"]
    assert first.get_ylim() == second.get_ylim() == pytest.approx((-0.04, 1.1))
    (accuracy,) = first.get_lines()
    assert accuracy.get_xydata().tolist() == [[0, 0.0], [1, 0.1], [2, 0.2], [3, 0.3]]
    thin, thick = second.get_lines()
    assert (thin.get_label(), thick.get_label()) == ("training reward", "held-out accuracy")
    assert thin.get_linewidth() < thick.get_linewidth()
    assert list(thin.get_ydata()) == [s / 20 for s in range(1, 9)]
    assert sorted(note.get_text() for note in first.texts) == ["0.00", "0.30"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["held-out accuracy", "training reward"]


def test_rewards_beyond_one_are_not_cut_off(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    path = write(tmp_path / "m.jsonl", [{"step": 1, REWARD: -1.0}, {"step": 2, REWARD: 3.0}])
    plot_learning_curve({"GRPO": path}, tmp_path / "curve.png", title="A run")
    low, high = figures[0].axes[0].get_ylim()
    assert low < -1.0
    assert high > 3.0


def test_a_run_with_nothing_to_show_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [{"step": 1, "sft/loss": 0.5}])
    with pytest.raises(ValueError, match=r"m\.jsonl holds neither 'critic/score/mean' nor 'val/accuracy'"):
        plot_learning_curve({"SFT": path}, tmp_path / "curve.png", title="A run")
    with pytest.raises(ValueError, match="runs is empty"):
        plot_learning_curve({}, tmp_path / "curve.png", title="A run")
    assert not (tmp_path / "curve.png").exists()
