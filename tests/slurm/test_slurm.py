"""Jobs of `megatron-rl slurm` on a real Slurm: they train, save, make room, go on, and end as runs without Slurm do."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.loop.test_trainers import QUICKSTART, command, comparable, place, steps  # noqa: F401
from tests.slurm.cluster import Cluster

SFT = f"{QUICKSTART}/sft.yaml"
OPTIONS = ["train.steps=40", "train.batch_size=64", "eval.every=0", "eval.limit=20"]
TWO_NODES = ["--device=cpu", "--nodes=2", "--ranks-per-node=1"]


def submit(cluster: Cluster, cwd: Path, *arguments: str) -> list[str]:
    """`megatron-rl slurm --submit` as a user calls it; the ids of the jobs."""
    return cluster.run(sys.executable, "-m", "megatron_rl", "slurm", SFT, *arguments, "--submit", cwd=cwd).split()


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:  # noqa: F811
    """The run without Slurm: two tensor-parallel ranks on this machine."""
    done = command("train", SFT, "parallel.tp=2", *OPTIONS, "run.dir=runs/alone", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "runs" / "alone"


def assert_same(run: Path, other: Path) -> None:
    """Every figure of every step and every weight, bit by bit."""
    assert list(map(comparable, steps(run))) == list(map(comparable, steps(other)))
    weights, others = (load_file(path / "hf" / "model.safetensors") for path in (run, other))
    assert weights.keys() == others.keys() and all(weights[name].equal(others[name]) for name in weights)


def test_two_nodes_train_one_model(cluster: Cluster, place: Path, alone: Path) -> None:  # noqa: F811
    (job,) = submit(cluster, place, *TWO_NODES, "parallel.tp=2", *OPTIONS, "run.dir=runs/two")
    cluster.wait_until(job, "COMPLETED")
    print(cluster.said(job))
    assert_same(place / "runs" / "two", alone)
