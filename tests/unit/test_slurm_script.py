"""What the script of a job decides when a step has ended, with stand-ins for Slurm's programs around it.

`tests/slurm` has the same script on a real Slurm, which cannot be brought into every state in a short time.
"""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_rl.cli import main

ROOT = Path(__file__).parents[2]

# The fields of the job are those of the environment. As Slurm does, it ends the script that queues its job again.
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") tr , '\\n' <<<"$3" ;;
    "show node") echo "   NodeAddr=10.0.0.${3#n} NodeHostName=$3" ;;
    "show job") echo "Id=7 JobState=$JOB_STATE StartTime=$START PreemptTime=$PREEMPTED ExcNodeList=$OUT ExitCode=0:0" ;;
    requeue*) echo requeue >>calls; (sleep 0.3; kill "$PPID") >/dev/null 2>&1 & ;;
    update*) echo "${@:3}" >>calls ;;
esac
"""
SRUN = """#!/bin/bash
echo "$@" >>steps
case "$*" in
    *node_check*)
        for argument; do case $argument in --folder=*) folder=${argument#*=} ;; esac; done
        if [[ $REPORT ]]; then echo "$REPORT" >"$folder/nodes.txt"; fi
        printf %s "$BAD" >"$folder/bad_nodes.txt"
        [[ $REPORT && -z $FAULT ]]
        ;;
    *) sleep 0.1; eval "$RUN" ;;
esac
"""
SAVES = "mkdir -p run/checkpoints; echo step_00000001 >run/checkpoints/latest"
ENDS = "mkdir -p run/checkpoints run/hf; echo step_00000009 >run/checkpoints/latest"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def job(place: Path, *arguments: str, script: str = "train", **state: str) -> tuple[int, list[str], str]:
    """The script's exit code (-15: Slurm ended it), what it asked Slurm for, and what it said."""
    overrides = ["run.dir=run", "train.steps=9", "parallel.tp=2"]
    config = str(ROOT / "examples" / "quickstart" / "sft.yaml")
    assert main(["slurm", config, *overrides, "--nodes=2", "--ranks-per-node=1", "--evaluate=x", *arguments]) == 0
    usual = {
        "JOB_STATE": "RUNNING",
        "START": "2026-01-02T00:00:00",
        "PREEMPTED": "None",
        "OUT": "(null)",
        "REPORT": "all well",
        "FAULT": "",
        "BAD": "",
    }
    slurm = {"SLURM_JOB_NAME": "sft", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1,n2", "RUN": "true"}
    path = os.pathsep.join([str(place / "bin"), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", f"run/slurm/{script}.sbatch"],
        env={**os.environ, **usual, **slurm, **state, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = place / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stdout + done.stderr


CASES = {
    "done": ({"RUN": ENDS}, 0, []),
    "fails": ({"RUN": f"{SAVES}; exit 3"}, 3, []),
    "fails after its end": ({"RUN": f"{ENDS}; exit 1"}, 1, []),
    "stopped": ({"RUN": SAVES}, -15, ["requeue"]),
    "stopped without a checkpoint": ({"RUN": "true"}, 1, []),
    "stopped too often": ({"RUN": SAVES, "SLURM_RESTART_COUNT": "20"}, 1, []),
    "cancelled": ({"RUN": SAVES, "JOB_STATE": "CANCELLED"}, 1, []),
    "makes room": ({"RUN": "exit 143", "PREEMPTED": "2026-01-02T00:00:00"}, -15, ["requeue"]),
    "made room before, and fails": ({"RUN": "exit 3", "PREEMPTED": "2026-01-01T23:59:59"}, 3, []),
    "a bad node": ({"FAULT": "1", "BAD": "n2"}, -15, ["requeue", "ExcNodeList=n2"]),
    "more bad nodes": ({"FAULT": "1", "BAD": "n1", "OUT": "n8,n9"}, -15, ["requeue", "ExcNodeList=n8,n9,n1"]),
    "too many bad nodes": ({"FAULT": "1", "BAD": "n1", "OUT": "n7,n8,n9"}, 1, []),
    "nobody to blame": ({"FAULT": "1"}, 1, []),
    "no report": ({"REPORT": ""}, 1, []),
}


@pytest.mark.parametrize("case", CASES)
def test_whether_it_goes_on(place: Path, case: str) -> None:
    state, code, calls = CASES[case]
    assert job(place, **state)[:2] == (code, calls)


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_the_script_reaches_the_run_once(place: Path, name: str) -> None:
    """Also where Slurm sends more of them: a second one would end the run at once."""
    waits = f"trap 'echo got >>got' USR1; for i in 1 2 3; do kill -{name} $PPID; sleep 0.1; done; {SAVES}"
    found, calls, said = job(place, RUN=waits)
    assert (found, calls) == (-15, ["requeue"]), said
    assert (place / "got").read_text() == "got\n" and said.count("megatron-rl: asked to stop\n") == 1


def test_an_old_checkpoint_is_no_reason(place: Path) -> None:
    (place / "run" / "checkpoints").mkdir(parents=True)
    (place / "run" / "checkpoints" / "latest").write_text("step_00000001\n")
    os.utime(place / "run" / "checkpoints" / "latest", (1, 1))
    assert job(place)[:2] == (1, [])


def test_a_run_that_is_to_end_early_exports_nothing(place: Path) -> None:
    assert job(place, "run.stop_after=1", RUN=SAVES)[:2] == (0, [])


def test_an_evaluation_goes_on_until_its_summary(place: Path) -> None:
    (place / "run" / "eval" / "all").mkdir(parents=True)
    answers = "touch run/eval/all/samples.jsonl"
    assert job(place, script="eval", RUN=answers)[:2] == (-15, ["requeue"])
    assert job(place, script="eval", RUN=f"{answers} run/eval/all/summary.json")[:2] == (0, ["requeue"])


def test_each_node_is_told_who_it_is(place: Path) -> None:
    """The host, its own address and where to meet, in torchrun's variables."""
    for node, expected in enumerate([("10.0.0.1", "is_host=1"), ("10.0.0.2", "is_host=0")]):
        # What follows `bash -c` among the arguments of srun is run as the node would, with `env` in place of the run.
        run = (
            f'while [[ $1 != -c ]]; do shift; done; SLURM_NODEID={node} bash -c "$2" node env | grep PET_ >told; {ENDS}'
        )
        assert job(place, RUN=run)[0] == 0
        variables = dict(line.split("=", 1) for line in (place / "told").read_text().splitlines())
        assert (variables["PET_LOCAL_ADDR"], variables["PET_RDZV_CONF"]) == expected
        assert variables["PET_RDZV_ENDPOINT"] == "10.0.0.1:20070" and variables["PET_RDZV_ID"] == "7-0"
        assert (variables["PET_NNODES"], variables["PET_NPROC_PER_NODE"]) == ("2", "1")
