"""The command line and torchrun: several nodes, wrong worlds, exit codes, signals."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.loop.test_trainers import QUICKSTART, command, place, steps  # noqa: F401

SFT = f"{QUICKSTART}/sft.yaml"


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "megatron_rl"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_mistakes_end_in_one_line(place: Path) -> None:  # noqa: F811
    done = command("train", SFT, "parallel.tp=0", cwd=place)
    assert (done.returncode, done.stderr) == (2, "megatron-rl: parallel.tp=0 must be greater than 0\n")


def test_two_nodes(place: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two torchruns that meet at a port, one rank each, cut one model between them."""
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    options = ["train", SFT, "parallel.pp=2", "train.steps=2", "eval.limit=1", f"run.dir={tmp_path}/run"]
    nodes = [
        subprocess.Popen([*torchrun(*meeting, f"--node-rank={node}"), *options], cwd=place, stdout=subprocess.PIPE)
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=180)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert "layout         tp=1 pp=2 vpp=1 dp=1; 2 process(es)" in outputs[0] and outputs[1] == ""
    assert [row["step"] for row in steps(tmp_path / "run")] == [0, 1, 2]


def test_a_world_that_does_not_fit_the_layout(place: Path, tmp_path: Path) -> None:  # noqa: F811
    """One line, from one rank, that says what to start."""
    options = ["train", SFT, "parallel.tp=2", "parallel.pp=2", f"run.dir={tmp_path}/run"]
    done = subprocess.run(
        [*torchrun("--standalone", "--nproc-per-node=2"), *options], cwd=place, capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("megatron-rl: ")]
    assert done.returncode != 0 and len(said) == 1
    assert (
        "parallel.tp=2, parallel.pp=2, parallel.dp=None needs a multiple of 4 processes, and this run has 2" in said[0]
    )
    assert not (tmp_path / "run").exists()


@pytest.fixture
def running(place: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:  # noqa: F811
    """A run of two ranks that has taken its first step, and the ranks."""
    options = ["train", SFT, "parallel.dp=2", "train.steps=100000", "eval.limit=1", f"run.dir={tmp_path}/run"]
    command = [sys.executable, "-m", "megatron_rl", *options]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        lines = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not lines.exists() or lines.read_text().count("\n") < 2:
            assert run.poll() is None and time.monotonic() < deadline, run.stderr
            time.sleep(0.2)
        ranks = [child for child in psutil.Process(run.pid).children() if "megatron_rl" in child.cmdline()]
        assert len(ranks) == 2
        yield run, sorted(ranks, key=lambda rank: rank.environ()["RANK"])
        run.kill()


def all_gone(ranks: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(ranks, timeout=10)[1]


def test_a_signal_reaches_the_ranks(running: tuple[subprocess.Popen, list[psutil.Process]]) -> None:
    run, ranks = running
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(timeout=60) == 128 + signal.SIGTERM
    assert all_gone(ranks)


def test_the_exit_code_of_a_lost_rank(running: tuple[subprocess.Popen, list[psutil.Process]]) -> None:
    run, ranks = running
    ranks[1].kill()
    assert run.wait(timeout=60) == 128 + signal.SIGKILL
    assert run.stderr is not None
    assert "megatron-rl: rank 1 ended with exit code 137; the other ranks were stopped" in run.stderr.read()
    assert all_gone(ranks)
