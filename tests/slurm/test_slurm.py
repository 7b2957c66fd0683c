"""Jobs of `megatron-rl slurm` on a real Slurm: they train, save, make room, go on, and end as runs without Slurm do."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.loop.test_trainers import QUICKSTART, command, comparable, place, steps, warm_start  # noqa: F401
from tests.slurm.cluster import Cluster

SFT = f"{QUICKSTART}/sft.yaml"
OPTIONS = ["train.steps=60", "train.batch_size=64", "eval.every=0", "eval.limit=20"]
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


def started(cluster: Cluster, job: str, run: Path) -> None:
    """Waits until the run is in the midst of its steps."""
    lines = run / "metrics.jsonl"
    cluster.wait(lambda: lines.exists() and lines.read_text().count("\n") > 4, 300)
    assert cluster.job(job)["JobState"] == "RUNNING"


def printed(run: Path, job: str) -> str:
    """What the nodes of the first attempt printed; any of them may have rank 0."""
    return "".join(path.read_text() for path in (run / "slurm").glob(f"sft-{job}/attempt-0/train-*.log"))


def test_asked_to_stop_it_saves_and_goes_on(cluster: Cluster, place: Path, alone: Path) -> None:  # noqa: F811
    """As before its time limit. The evaluation waits for the end of the second attempt."""
    data = "runs/quickstart/data/heldout.jsonl"
    run = place / "runs" / "asked"
    job, evaluation = submit(
        cluster, place, *TWO_NODES, f"--evaluate={data}", "parallel.tp=2", *OPTIONS, f"run.dir={run}"
    )
    started(cluster, job, run)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait_until(job, "COMPLETED")["Restarts"] == "1"
    said = cluster.said(job)
    assert said.count("megatron-rl: asked to stop\n") == said.count("megatron-rl: queued again\n") == 1
    assert "megatron-rl: stopped by SIGUSR1 after step" in printed(run, job)
    assert_same(run, alone)
    cluster.wait_until(evaluation, "COMPLETED")
    (report,) = (run / "eval").glob("*/summary.json")
    figures, last = json.loads(report.read_text())["val"]["figures"], steps(alone)[-1]
    assert figures == {name: last[name] for name in figures} and "val/accuracy" in figures


@pytest.mark.full
def test_it_makes_room_and_goes_on(cluster: Cluster, place: Path, alone: Path) -> None:  # noqa: F811
    run = place / "runs" / "preempted"
    (job,) = submit(cluster, place, *TWO_NODES, "--partition=low", "parallel.tp=2", *OPTIONS, f"run.dir={run}")
    started(cluster, job, run)
    wanted = ["--nodes=2", "--exclusive", "--partition=high", "--output=/dev/null", "--wrap=srun sleep 1"]
    other = cluster.run("sbatch", "--parsable", *wanted)
    cluster.wait_until(other, "COMPLETED")
    assert len(steps(run)) < len(steps(alone))
    assert cluster.wait_until(job, "COMPLETED")["Restarts"] == "1"
    assert_same(run, alone)


def test_a_cancelled_job_does_not_come_back(cluster: Cluster, place: Path) -> None:  # noqa: F811
    """Though it is asked to stop as well, and saves if there is time."""
    run = place / "runs" / "cancelled"
    options = ["train.steps=10000", "eval.every=0", "eval.limit=2", "optim.schedule=constant", f"run.dir={run}"]
    (job,) = submit(cluster, place, "--device=cpu", "--ranks-per-node=1", *options)
    started(cluster, job, run)
    cluster.run("scancel", job)
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-j", job), 120)
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("CANCELLED", "0")


def test_an_array_trains_the_cases_of_a_sweep(cluster: Cluster, place: Path) -> None:  # noqa: F811
    """Each in its own directory and with its own options, side by side."""
    cases = {"slow": ["optim.lr=1e-3"], "fast": ["optim.lr=4e-3", "train.steps=3"]}
    (place / "sweep.json").write_text(json.dumps({"cases": cases}))
    one_node = ["--device=cpu", "--ranks-per-node=1", "--sweep=sweep.json", "--job-name=sweep"]
    options = ["train.batch_size=8", "eval.limit=2", "optim.schedule=constant", "optim.warmup_steps=0"]
    (job,) = submit(cluster, place, *one_node, "train.steps=2", "run.dir=runs/sweep", *options)
    for number in range(2):
        cluster.wait_until(f"{job}_{number}", "COMPLETED")
    rows = {case: steps(place / "runs" / "sweep" / case) for case in cases}
    assert [len(rows[case]) for case in cases] == [3, 3]
    assert [rows[case][-1]["actor/lr"] for case in cases] == [1e-3, 4e-3]


def test_a_bad_node_is_left_out(cluster: Cluster, place: Path) -> None:  # noqa: F811
    """The job moves to the other node."""
    (place / "site.sh").write_text("PREFLIGHT_COMMAND='test \"$SLURMD_NODENAME\" != n1 || { echo worn out; false; }'\n")
    options = ["train.steps=1", "train.batch_size=8", "eval.limit=2", "run.dir=runs/moved"]
    (job,) = submit(cluster, place, "--device=cpu", "--ranks-per-node=1", "--site=site.sh", *options)
    last = cluster.wait_until(job, "COMPLETED")
    said = cluster.said(job)
    assert "megatron-rl: preflight: n1: rank 0: " in said and "ended with 1: worn out\n" in said
    assert "megatron-rl: preflight leaves out n1\n" in said
    assert (last["Restarts"], last["ExcNodeList"], last["NodeList"]) == ("1", "n1", "n2")
    assert len(steps(place / "runs" / "moved")) == 2


def test_a_bad_node_of_two_is_told_from_the_good_one(cluster: Cluster, place: Path) -> None:  # noqa: F811
    (place / "second.sh").write_text("PREFLIGHT_COMMAND='test \"$SLURMD_NODENAME\" != n2'\n")
    (job,) = submit(cluster, place, *TWO_NODES, "--site=second.sh", "parallel.tp=2", "run.dir=runs/never")
    cluster.wait(lambda: cluster.job(job)["ExcNodeList"] == "n2", 120)
    cluster.run("scancel", job)
    assert "megatron-rl: preflight: n2: rank 1: 'test " in cluster.said(job)
    assert not (place / "runs" / "never" / "metrics.jsonl").exists()


# In place of an interpreter that has vLLM.
STAND_IN = """#!/bin/sh
echo "$SLURMD_NODENAME" "$@" >"servers/$SLURM_PROCID"
"""


def test_servers_have_nodes_of_their_own(cluster: Cluster, place: Path) -> None:  # noqa: F811
    """A stand-in notes where it is started and how. The trainer, here of demonstrations, is told of all of them."""
    (place / "servers").mkdir()
    (place / "vllm").write_text(STAND_IN)
    (place / "vllm").chmod(0o755)
    options = ["train.steps=1", "train.batch_size=8", "data.val=null", "run.dir=runs/served", "parallel.tp=2"]
    server = ["engine=vllm_server", "vllm.server.python=./vllm", "vllm.server.broadcast=true"]
    nodes = ["--device=cpu", "--ranks-per-node=2", "--rollout-nodes=1"]
    (job,) = submit(cluster, place, *nodes, *options, *(f"rollout.{option}" for option in server))
    cluster.wait_until(job, "COMPLETED")
    port = 20000 + int(job) % 1000 * 10 + 2
    told = (place / "runs" / "served" / "config.yaml").read_text()
    for number in range(2):
        assert f"- http://127.0.0.1:{port + number}\n" in told
        node, *flags = (place / "servers" / str(number)).read_text().split()
        assert (node, flags[:2]) == ("n2", ["-m", "vllm.entrypoints.openai.api_server"])
        assert flags[flags.index("--port") + 1] == str(port + number)
        assert flags[flags.index("--model") + 1] == "runs/quickstart/base"
    assert "n1" in (place / "runs" / "served" / "slurm" / f"sft-{job}.log").read_text()


@pytest.mark.full
def test_a_real_time_limit(cluster: Cluster, place: Path) -> None:  # noqa: F811
    """Slurm itself asks a run without an end to stop, up to a minute early; it saves, and goes on after that step."""
    run = place / "runs" / "limited"
    options = ["parallel.tp=2", "train.steps=100000", "eval.every=0", "eval.limit=2", "optim.schedule=constant"]
    (job,) = submit(cluster, place, *TWO_NODES, "--time=3", "--stop-before=45", *options, f"run.dir={run}")
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", 300)
    (stopped,) = re.findall(r"stopped by SIGUSR1 after step (\d+)", printed(run, job))
    cluster.wait_until(job, "RUNNING")
    cluster.wait(lambda: (run / "metrics.jsonl").read_text().count("\n") > int(stopped) + 1, 300)
    cluster.run("scancel", job)
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-j", job), 120)
    assert [row["step"] for row in steps(run)] == list(range(len(steps(run))))


@pytest.mark.full
def test_the_settings_of_ema_as_an_array(cluster: Cluster, place: Path, warm_start: Path, tmp_path: Path) -> None:  # noqa: F811
    """Every setting in its own run, and each is what it is without Slurm; here one of them is compared."""
    sweep = yaml.safe_load((QUICKSTART.parents[1] / "tools" / "sweeps" / "ema.yaml").read_text())
    cases = {case: options for case, options in sweep["cases"].items() if case != "gspo"}
    grpo = f"{QUICKSTART}/grpo.yaml"
    kept = {"cases": cases, "options": sweep["options"], "seeds": [1]}
    (tmp_path / "ema.yaml").write_text(yaml.safe_dump(kept))
    arguments = ["--device=cpu", "--ranks-per-node=2", f"--sweep={tmp_path}/ema.yaml", "--submit", "run.dir=runs/ema"]
    job = cluster.run(sys.executable, "-m", "megatron_rl", "slurm", grpo, *arguments, cwd=place)
    for number in range(6):
        cluster.wait_until(f"{job}_{number}", "COMPLETED", 1800)
    runs = [place / "runs" / "ema" / f"{case.replace(' ', '_')}_1" for case in cases]
    assert len({json.dumps(comparable(steps(run)[-1])) for run in runs}) == 6
    options = [*sweep["options"], *cases["beta 0.9"], "train.seed=1", "run.dir=runs/ema/alone"]
    done = command("train", grpo, *options, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(place / "runs" / "ema" / "beta_0.9_1", place / "runs" / "ema" / "alone")
