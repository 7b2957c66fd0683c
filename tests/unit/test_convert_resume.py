"""A conversion that is killed goes on where it was; its memory and its speed."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from megatron_rl.checkpoint.manifest import files_of, measure, read_manifest
from megatron_rl.cli import main
from megatron_rl.convert import jobs, safetensors_files, sharded
from tests.models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
SMALL = 60_000  # bytes of a file, or of the tensors of a job, so that there are many
# A slow disk, so that there is time to kill.
SLOW = f"""
import os, sys, time
from megatron_rl.cli import main
from megatron_rl.convert import safetensors_files, sharded
sharded.FILE_BYTES = safetensors_files.JOB_BYTES = {SMALL}
wait = lambda sync: lambda descriptor: (time.sleep(0.1), sync(descriptor))
os.fsync, os.fdatasync = wait(os.fsync), wait(os.fdatasync)
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "FILE_BYTES", SMALL)
    monkeypatch.setattr(safetensors_files, "JOB_BYTES", SMALL)


@pytest.fixture
def places(small: None, tmp_path: Path) -> dict[str, tuple[object, ...]]:
    """The arguments of each verb, before those of its target."""
    model = tiny_tokenizer(tiny_model(tmp_path / "model", "qwen3_moe"), 99)
    assert main(["convert", "import", str(model), str(tmp_path / "checkpoint"), "--tp", "2"]) == 0
    return {
        "import": (model,),
        "export": (tmp_path / "checkpoint",),
        "reshard": (tmp_path / "checkpoint",),
    }


OPTIONS = {"import": ("--tp", 2, "--ep", 2), "export": (), "reshard": ("--tp", 4)}


def noted(target: Path) -> int:
    """Jobs in the journal of a conversion into `target`."""
    journal = target.with_name(target.name + ".partial") / jobs.JOURNAL
    return journal.read_text().count("\n") - 1 if journal.is_file() else 0


@pytest.mark.parametrize("verb", ["import", "export", "reshard"])
def test_killed_and_run_again_it_continues_and_is_the_same(
    places: dict[str, tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def arguments(name: str) -> list[str]:
        return list(map(str, (verb, *places[verb], tmp_path / name, *OPTIONS[verb])))

    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments("killed")], cwd=ROOT)
    deadline = time.monotonic() + 120
    while noted(tmp_path / "killed") < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = noted(tmp_path / "killed")
    assert done >= 3 and not (tmp_path / "killed").exists()
    # The last line may be cut off: then it does not count.
    journal = tmp_path / "killed.partial" / jobs.JOURNAL
    os.truncate(journal, journal.stat().st_size - 5)
    ran: list[str] = []
    do = jobs._run

    def counted(job: jobs.Job, held: jobs.Receipt | None) -> jobs.Receipt:
        if held is None:
            ran.append(job.name)
        return do(job, held)

    monkeypatch.setattr(jobs, "_run", counted)
    assert main(["convert", *arguments("killed")]) == 0
    again, ran[:] = list(ran), []
    assert main(["convert", *arguments("whole")]) == 0
    assert len(again) == len(ran) - (done - 1) > 0
    names = files_of(tmp_path / "whole")
    assert files_of(tmp_path / "killed") == names
    assert measure(tmp_path / "killed", names) == measure(tmp_path / "whole", names)
    assert not (tmp_path / "killed.partial").exists()


def test_what_was_lost_after_it_was_noted_is_written_again(
    places: dict[str, tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a checkpoint's files the hash is looked at before they are taken for finished."""
    arguments = ["convert", "import", str(places["import"][0]), str(tmp_path / "out")]
    monkeypatch.setattr(sharded, "chunks_of", None)  # the end is never reached
    with pytest.raises(TypeError):
        main(arguments)
    partial = tmp_path / "out.partial"
    assert noted(tmp_path / "out") > 3
    victims = sorted(partial.glob("*.distcp"))[:2]
    os.truncate(victims[0], 100)
    victims[1].write_bytes(bytes(victims[1].stat().st_size))
    monkeypatch.undo()
    monkeypatch.setattr(sharded, "FILE_BYTES", SMALL)
    assert main(arguments) == 0 and main([*arguments[:3], str(tmp_path / "whole")]) == 0
    assert read_manifest(tmp_path / "out") == read_manifest(tmp_path / "whole")


def test_another_conversion_into_the_same_place_starts_anew(
    places: dict[str, tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another layout, say: nothing of the interrupted one is in it."""
    model = str(places["import"][0])
    monkeypatch.setattr(sharded, "chunks_of", None)
    with pytest.raises(TypeError):
        main(["convert", "import", model, str(tmp_path / "out"), "--tp", "4"])
    monkeypatch.undo()
    monkeypatch.setattr(sharded, "FILE_BYTES", SMALL)
    assert main(["convert", "import", model, str(tmp_path / "out")]) == 0
    assert main(["convert", "import", model, str(tmp_path / "whole")]) == 0
    assert read_manifest(tmp_path / "out") == read_manifest(tmp_path / "whole")


def test_two_conversions_into_one_place_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tmp_path / "model")
    with jobs.partial_directory(tmp_path / "out", overwrite=False):
        assert main(["convert", "import", str(model), str(tmp_path / "out")]) == 2
    assert "is under way in another process" in capsys.readouterr().err
    assert main(["convert", "import", str(model), str(tmp_path / "out")]) == 0


def test_a_full_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "model")
    capsys.readouterr()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["convert", "import", str(model), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "goes on when it is started again: [Errno 28] No space left on device" in said
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_convert", ROOT / "tools" / "bench_convert.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.full), "qwen3_moe"])
def test_memory_stays_below_what_was_allowed(bench: ModuleType, tmp_path: Path, family: str) -> None:
    """The resident set above what it was with the libraries imported; an embedding alone is larger."""
    for row in bench.measure(250_000_000, "48MB", 1, family, tmp_path):
        assert row["bytes"] > 200_000_000 and row["interpreter"] > 100_000_000
        assert 0 < row["peak_above_start"] < 48_000_000, row


@pytest.mark.full
def test_a_gigabyte_within_300_megabytes_at_half_the_speed_of_a_copy(bench: ModuleType, tmp_path: Path) -> None:
    """Of reshard, which hashes every byte twice, the speed is measured and not held."""
    for row in bench.measure(1_000_000_000, "300MB", 5, "llama", tmp_path):
        assert row["peak_above_start"] < 300_000_000, row
        assert row["speed_of_copy"] >= 0.5 or row["verb"] == "reshard", row
