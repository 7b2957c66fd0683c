"""The command line and torchrun: several nodes, wrong worlds, exit codes, signals."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.dist.pool import Pool
from tests.loop.test_stop import nothing_is_left, processes_in
from tests.loop.test_trainers import QUICKSTART, command, place, steps, train  # noqa: F401

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


@pytest.mark.full
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


@pytest.mark.full
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


# The number of steps may change where the learning rate does not depend on it.
ENDLESS = ("parallel.dp=2", "optim.schedule=constant")


@contextmanager
def started(place: Path, run_dir: Path) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:  # noqa: F811
    """A run of two ranks without an end, and the ranks. Afterwards nothing is left of it."""
    before, shared_memory = processes_in(place), set(os.listdir("/dev/shm"))
    options = ["train", SFT, *ENDLESS, "train.steps=100000", "eval.limit=1", f"run.dir={run_dir}"]
    command = [sys.executable, "-m", "megatron_rl", *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=place, text=True, **streams) as run:
        try:
            yield run, wait_for_ranks(run)
            assert run.poll() is not None
            assert nothing_is_left(place, before)
            assert set(os.listdir("/dev/shm")) <= shared_memory
        finally:
            run.kill()


def wait_for_ranks(run: subprocess.Popen) -> list[psutil.Process]:
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline:
        # Between its fork and its exec a child looks like its parent; a helper of the start may be gone when asked.
        ranks = {}
        for child in psutil.Process(run.pid).children():
            with suppress(psutil.NoSuchProcess):
                ranks[child.environ().get("RANK")] = child
        if {"0", "1"} <= ranks.keys():
            return [ranks["0"], ranks["1"]]
        time.sleep(0.1)
    raise AssertionError("the run has not started its ranks")


def wait_for_a_step(run: subprocess.Popen, run_dir: Path) -> None:
    lines = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not lines.exists() or lines.read_text().count("\n") < 2:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.full
def test_a_signal_stops_the_run_after_a_step(pool: Pool, place: Path, tmp_path: Path) -> None:  # noqa: F811
    """Exit code 0 and a checkpoint of the very last step, which the same command continues from."""
    with started(place, tmp_path / "run") as (run, _):
        wait_for_a_step(run, tmp_path / "run")
        os.kill(run.pid, signal.SIGTERM)
        out, errors = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "megatron-rl: SIGTERM: the run saves and stops at the next step boundary; a second signal" in errors
    last = steps(tmp_path / "run")[-1]["step"]
    assert out.splitlines()[-1] == (
        f"megatron-rl: stopped by SIGTERM after step {last}; checkpoint saved; run the same command to go on"
    )
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"
    options = [*ENDLESS, "eval.limit=1", f"train.steps={last + 1}", f"run.dir={tmp_path}/run"]
    pool.run(train, 2, str(place), SFT, options)
    assert [row["step"] for row in steps(tmp_path / "run")] == list(range(last + 2))


@pytest.mark.full
def test_a_second_signal_ends_the_run_at_once(place: Path, tmp_path: Path) -> None:  # noqa: F811
    """Also while its ranks are still starting, where the first one waits for them."""
    with started(place, tmp_path / "run") as (run, ranks):
        os.kill(run.pid, signal.SIGUSR1)
        time.sleep(1.5)
        assert run.poll() is None and all(rank.is_running() for rank in ranks)
        os.kill(run.pid, signal.SIGTERM)
        assert run.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.full
def test_a_lost_rank_is_named_with_its_place(place: Path, tmp_path: Path) -> None:  # noqa: F811
    with started(place, tmp_path / "run") as (run, ranks):
        wait_for_a_step(run, tmp_path / "run")
        ranks[1].kill()
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGKILL
    assert "Traceback" not in errors
    (said,) = [line for line in errors.splitlines() if line.startswith("megatron-rl: ")]
    told = re.fullmatch(
        r"megatron-rl: rank 1 was killed by SIGKILL in step (\d+)(, phase [\w/]+)?; the other ranks were stopped", said
    )
    assert told and 0 <= int(told[1]) - steps(tmp_path / "run")[-1]["step"] <= 1, said
