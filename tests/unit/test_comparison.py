"""Curves of several cases and seeds: what is read from the table is what is drawn."""

from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest

from megatron_rl.report.comparison import FIELDS, plot_comparison, read_curves, summary

TABLE = """case,seed,step,reward,accuracy,seconds,date
b,1,0,,0.25,0.0,2026-01-02
b,1,10,0.4,0.50,3.5,2026-01-02
a,1,0,,0.25,0.0,2026-01-02
a,1,10,0.6,0.75,3.5,2026-01-02
b,2,0,,0.25,0.0,2026-01-02
b,2,10,0.8,1.00,3.5,2026-01-02
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "curves.csv"
    path.write_text(TABLE)
    return path


def test_cases_stay_in_order_and_seeds_together(table: Path) -> None:
    assert TABLE.splitlines()[0].split(",") == list(FIELDS)
    curves = read_curves(table, "accuracy")
    assert list(curves) == ["b", "a"] and dict(read_curves(table, "reward")["b"]) == {10: [0.4, 0.8]}
    assert dict(curves["b"]) == {0: [0.25, 0.25], 10: [0.5, 1.0]}


def test_summary_by_hand(table: Path) -> None:
    lines = summary(table, target=0.75).splitlines()
    assert lines[2] == "| b | 2 | 1 of 2 seeds | 75.0% (50.0% to 100.0%) | 0.600 |"
    assert lines[3] == "| a | 1 | 10 | 75.0% (75.0% to 75.0%) | 0.600 |"


def test_more_columns_have_a_panel_and_a_final_value_each(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = zip(table.read_text().splitlines(), ("entropy", "0.5", "0.3", "0.7", "0.1", "0.5", "0.2"), strict=True)
    table.write_text("".join(f"{row},{value}\n" for row, value in rows))
    lines = summary(table, target=0.75, more=["entropy"]).splitlines()
    assert lines[0].endswith("| final reward | final entropy |") and lines[1].count("---") == 6
    assert lines[2].endswith("| 0.600 | 0.250 |") and lines[3].endswith("| 0.600 | 0.100 |")
    saved: list[matplotlib.figure.Figure] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: saved.append(figure))
    plot_comparison(table, tmp_path / "c.png", title="t", more=["entropy"])
    *_, panel = saved[0].axes
    assert len(saved[0].axes) == 3 and panel.get_title() == "entropy"
    assert [line.get_data()[1].tolist() for line in panel.lines] == [[0.5, 0.25], [0.7, 0.1]]


def test_a_case_without_a_figure_is_left_out(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = zip(table.read_text().splitlines(), ("kept", "", "0.3", "", "", "", "0.2"), strict=True)
    table.write_text("".join(f"{row},{value}\n" for row, value in rows))
    lines = summary(table, more=["kept"]).splitlines()
    assert lines[2].endswith("| 0.600 | 0.250 |") and lines[3].endswith("| 0.600 |  |")
    saved: list[matplotlib.figure.Figure] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: saved.append(figure))
    plot_comparison(table, tmp_path / "c.png", title="t", more=["kept"])
    (line,) = saved[0].axes[-1].lines
    assert line.get_label() == "b (2 seeds)" and line.get_data()[1].tolist() == [0.25]


def test_line_is_the_mean_and_band_the_range(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[matplotlib.figure.Figure] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: saved.append(figure))
    plot_comparison(table, tmp_path / "c.png", title="t")
    reward, panel = saved[0].axes
    assert [line.get_data()[1][0] for line in reward.lines] == pytest.approx([0.6, 0.6])
    lines = {line.get_label(): np.column_stack(line.get_data()).tolist() for line in panel.lines}
    assert lines == {"b (2 seeds)": [[0, 0.25], [10, 0.75]], "a (1 seeds)": [[0, 0.25], [10, 0.75]]}
    band = panel.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 10][:, 1].min() == 0.5 and band[band[:, 0] == 10][:, 1].max() == 1.0
