"""A run that was killed and started again is, bit by bit, the run that was left alone."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tool's own, for the quickstart's data and its model as it is before any training."""
    sys.path[:0] = [str(ROOT / "tools"), str(QUICKSTART)]
    import kill_matrix
    import task

    place = tmp_path_factory.mktemp("kills")
    task.make_tokenizer(place / "base")
    task.make_model(place / "base", 1)
    task.make_data(place / "data", 1)
    data = [f"data.{name}={place}/data/{file}.jsonl" for name, file in (("train", "train"), ("val", "heldout"))]
    return [*kill_matrix.OPTIONS, f"model.path={place}/base", *data]


def tool() -> Any:
    import kill_matrix

    return kill_matrix


def test_a_killed_run_goes_on_as_if_nothing_had_been(options: list[str], tmp_path: Path) -> None:
    """Rank 0, between the renaming of a checkpoint and the moment it is in force; pipeline-parallel."""
    chosen = [*options, *tool().LAYOUTS["pp2"], "train.steps=4"]
    config, whole = str(QUICKSTART / "grpo.yaml"), tmp_path / "whole"
    assert tool().train(config, [*chosen, f"run.dir={whole}"], tmp_path / "log") == [0, 0]
    kill = tool().Kill("rename", 4, 0.0, "0")
    assert tool().attempt(config, chosen, kill, whole, tmp_path / "killed") == (2, True)
    # The comparison can fail.
    for name in ("metrics.jsonl", "hf/model.safetensors"):
        kept = (whole / name).read_bytes()
        wrong = kept.replace(b'"step": 3', b'"step": 7') if name[0] == "m" else kept[:-1] + bytes([kept[-1] ^ 1])
        (whole / name).write_bytes(wrong)
        assert not tool().same(tmp_path / "killed", whole)
        (whole / name).write_bytes(kept)
    assert tool().same(tmp_path / "killed", whole)


@pytest.mark.full
def test_kill_matrix(options: list[str], tmp_path: Path) -> None:
    rows = tool().matrix(str(QUICKSTART / "grpo.yaml"), options, tmp_path / "runs", tmp_path / "kills.csv")
    assert len(rows) == 30 and all(row["equal"] == "True" for row in rows), rows
