"""`megatron-rl bench`: which benches run, one of them for real, and mistakes."""

from pathlib import Path

import pytest

from megatron_rl.bench import command
from megatron_rl.bench.measuring import this_machine
from megatron_rl.bench.rows import Report, Row, read_report, write_report
from megatron_rl.cli import main

CASE = "scan [8, 32768] beta 0.1"


def test_every_bench_has_its_script() -> None:
    scripts = {path.name for path in command.TOOLS.glob("bench_*.py")}
    assert set(command.SCRIPTS.values()) <= scripts


def test_benches_run_once_and_in_the_order_of_the_table() -> None:
    assert command.check_names(["ema", "ops", "ema"]) == ["ops", "ema"]
    assert command.check_names([]) == list(command.SCRIPTS)


def test_a_bench_is_measured_written_and_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old = Row(bench="scan", case=CASE, times=(1e-9, 1e-9, 1e-9), baseline="loop over tokens", ratio=0.5)
    write_report(Report(this_machine(), "2026-01-02", [old]), tmp_path / "old.json")
    options = ["--quick", "--json", f"{tmp_path}/new.json", "--compare", f"{tmp_path}/old.json"]
    assert main(["bench", *options, "scan"]) == 0
    scan, mean = read_report(tmp_path / "new.json").rows
    assert (scan.bench, scan.case, scan.baseline, len(scan.times)) == ("scan", CASE, "loop over tokens", 3)
    assert scan.ratio is not None and 0 < scan.ratio < 0.2  # the scan is far from a loop
    assert scan.share is not None and 0 < scan.share < 1
    assert 0 < scan.figures["relative error"] < 1e-5
    assert mean.case == "segment mean, 512 of 512"
    said = capfd.readouterr().out
    table, comparison = said.split("against 2026-01-02:")
    assert CASE in table and "loop over tokens" in table
    (line,) = [line for line in comparison.splitlines() if CASE in line]
    assert line.endswith("worse")
    assert "only now: scan segment mean, 512 of 512" in comparison


def test_a_failing_bench_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scan", "--repeats", "1"]) == 1
    said = capfd.readouterr().err
    assert "--repeats=1: at least 3, or nothing is known of the spread" in said
    assert "megatron-rl: failed: scan (exit code 2); the reasons are above" in said


def test_mistakes_are_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run", lambda *arguments: pytest.fail("a bench ran"))

    def refused(*arguments: object) -> str:
        assert main(["bench", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("megatron-rl: ") and said.count("\n") == 1, said
        return said

    assert "there is no bench 'trian': there are ops, scan," in (said := refused("trian"))
    assert "did you mean 'train'?" in said
    (tmp_path / "other.json").write_text("{}")
    assert "other.json has no format" in refused("scan", "--compare", tmp_path / "other.json")
    assert "there is no directory" in refused("scan", "--json", tmp_path / "nowhere" / "new.json")
    monkeypatch.setattr(command, "TOOLS", tmp_path / "tools")
    assert "clone the repository" in refused("scan")
