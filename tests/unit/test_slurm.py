"""The scripts that `megatron-rl slurm` writes, without a Slurm; and what is found out about nodes."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.config.load import load_config
from megatron_rl.launch.node_check import blamed, culprits, rounds
from megatron_rl.launch.slurm import seconds
from megatron_rl.launch.torchrun import is_first, is_one_of_many
from megatron_rl.trainers.resume import FREE

ROOT = Path(__file__).parents[2]
GRPO = str(ROOT / "examples" / "cluster" / "sdpo_qwen3_8b_sibling.yaml")
QUICKSTART = "examples/quickstart/grpo.yaml"
SERVERS = ["rollout.engine=vllm_server", "rollout.vllm.tp=2", "rollout.vllm.server.broadcast=true"]
VARIANTS = {
    "one node": [],
    "CPUs": ["--device=cpu", "--ranks-per-node=4"],
    "nodes": ["--nodes=4", "--time=2-12:00:00", "--partition=long", "--account=a b", "--qos=high", "--job-name=mine"],
    "site": ["--nodes=2", f"--site={ROOT}/examples/cluster/site.sh"],
    "servers": ["--nodes=2", "--rollout-nodes=2", *SERVERS],
    "sweep": ["--sweep=sweep.yaml"],
    "pyxis": ["--container=image.sqsh", "--mounts=/data:/data"],
    "apptainer": ["--container=it's.sif", "--mounts=/data:/data", "--runtime=apptainer"],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a place").mkdir()
    monkeypatch.chdir(tmp_path / "a place")
    Path("sweep.yaml").write_text("cases: {cold: [], hot: [rollout.temperature=1.1]}\nseeds: [1, 2]\n")
    return tmp_path / "a place"


def scripts(*arguments: str) -> dict[str, str]:
    """What is written, by name."""
    assert main(["slurm", GRPO, *arguments, "--logs=logs", "--evaluate=it's held out.jsonl"]) == 0
    return {path.name: path.read_text() for path in Path("logs").iterdir()}


def shellcheck() -> str:
    # It is installed beside the interpreter, which need not be on the path.
    found = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, "shellcheck is not installed: pip install -e '.[dev]'"
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_clean(place: Path, variant: str) -> None:
    written = scripts(*VARIANTS[variant])
    assert written.keys() == {"train.sbatch", "eval.sbatch"}
    for text in written.values():
        assert "{{" not in text and "{%" not in text and "pkill" not in text
    done = subprocess.run([shellcheck(), *Path("logs").iterdir()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_example_of_a_site_is_clean() -> None:
    assert subprocess.run([shellcheck(), ROOT / "examples" / "cluster" / "site.sh"]).returncode == 0


def header(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: "".join(shlex.split(value)) for name, _, value in (line.partition("=") for line in lines)}


def test_what_is_asked_of_slurm(place: Path) -> None:
    written = scripts(*VARIANTS["nodes"])
    asked = header(written["train.sbatch"])
    assert asked == {
        "job-name": "mine", "nodes": "4", "ntasks-per-node": "1", "gpus-per-node": "8", "exclusive": "", "mem": "0",
        "partition": "long", "account": "a b", "qos": "high", "time": "2-12:00:00", "chdir": str(place),
        "output": f"{place}/logs/%x-%j.log", "open-mode": "append", "requeue": "", "signal": "B:USR1@300",
    }  # fmt: skip
    assert header(written["eval.sbatch"]) == asked | {"job-name": "mine-eval"}
    assert "gpus-per-node" not in header(scripts(*VARIANTS["CPUs"])["train.sbatch"])


def test_servers_are_more_nodes_and_the_evaluation_has_none(place: Path) -> None:
    written = scripts(*VARIANTS["servers"])
    assert header(written["train.sbatch"])["nodes"] == "4" and header(written["eval.sbatch"])["nodes"] == "2"
    assert "nodes=2 ranks_per_node=8\n" in written["train.sbatch"]
    assert "servers_per_node=4 urls=()\n" in written["train.sbatch"]


def test_an_array_has_an_element_for_each_case_and_seed(place: Path) -> None:
    text = scripts(*VARIANTS["sweep"], "train.steps=7")["train.sbatch"]
    assert header(text)["array"] == "0-3"
    # The shell's own reading of the last one.
    case = text[text.index("case $SLURM") : text.index("esac") + 4]
    shown = subprocess.run(
        [
            "bash",
            "-c",
            f'SLURM_ARRAY_TASK_ID=3; {case}; printf "%s\\n" "$run_dir" "$last_checkpoint" "${{overrides[@]}}"',
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    run_dir = "runs/sdpo_qwen3_8b_sibling/hot_2"
    options = ["rollout.temperature=1.1", "train.steps=7", "train.seed=2", f"run.dir={run_dir}"]
    assert shown.stdout.splitlines() == [run_dir, "step_00000007", *options]


def test_words_reach_the_command_as_they_are(place: Path) -> None:
    text = scripts("data.prompt_key=a $b 'c'")["train.sbatch"]
    (line,) = [line for line in text.splitlines() if line.startswith("overrides=(")]
    shown = subprocess.run(["bash", "-c", f'{line}; printf %s "${{overrides[0]}}"'], capture_output=True, text=True)
    assert shown.stdout == "data.prompt_key=a $b 'c'"


def test_servers_share_the_gpus_of_their_node() -> None:
    from megatron_rl.launch.rollout_server import own_launch

    urls = [f"http://10.0.0.{node}:{port}" for node in (7, 8) for port in (20012, 20013)]
    config = load_config(GRPO, [*SERVERS, f"rollout.vllm.server.urls=[{','.join(urls)}]"])
    place = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    launch, port = own_launch(config, place | {"SLURM_GPUS_ON_NODE": "4"})
    assert (launch.host, port, launch.gpus) == ("10.0.0.8", 20013, (2, 3))
    flags = launch.command(port)
    # A prompt of 1024 tokens and an answer of 2048.
    for flag, value in {"--max-model-len": "3072", "--tensor-parallel-size": "2", "--dtype": "bfloat16"}.items():
        assert flags[flags.index(flag) + 1] == value
    assert own_launch(config, place)[0].gpus == ()


def test_a_run_goes_on_with_servers_elsewhere() -> None:
    """Their addresses, which another attempt has others of, are no part of the mathematics."""
    assert "rollout.vllm.server.urls".startswith(FREE) and not "rollout.vllm.server.ahead".startswith(FREE)


def test_the_first_node_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert is_first() and not is_one_of_many()
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_RDZV_CONF", "is_host=1")
    assert is_first() and is_one_of_many()
    monkeypatch.setenv("PET_RDZV_CONF", "is_host=0")
    assert not is_first()


MISTAKES = [
    (["parallel.tq=2"], "override 'parallel.tq=2'|unknown key 'parallel.tq'"),
    (["--nodes=0"], "--nodes=0 must be at least 1"),
    (
        ["--ranks-per-node=6"],
        "parallel.tp=4, parallel.dp=None needs a multiple of 4 ranks, and --nodes=1",
    ),
    (["--nodes=3", "parallel.dp=4"], "needs 16 ranks, and --nodes=3 with --ranks-per-node=8 are 24"),
    (["--time=soon"], "--time='soon' is no time as 90 (minutes), 12:00:00 or 2-12:00:00"),
    (["--time=5"], "--time=5 is over before --stop-before=300 seconds"),
    (["--job-name=a/b"], "--job-name='a/b' must be letters"),
    (["--site=none.sh"], "--site='none.sh' is no file: examples/cluster/site.sh is one to start from"),
    (["--mounts=/data"], "--mounts=/data is for a container: name one with --container"),
    (["--rollout-nodes=1", "rollout.engine=hf"], "--rollout-nodes=1 needs rollout.engine=vllm_server, not hf"),
    (["--rollout-nodes=1", "rollout.engine=vllm_server"], "rollout.vllm.server.exchange"),
    (["--rollout-nodes=1", *SERVERS, "rollout.vllm.server.urls=[http://n7:1]"], "both name servers"),
    (["--rollout-nodes=1", *SERVERS, "rollout.vllm.tp=3"], "rollout.vllm.tp=3: it must divide them"),
    (["--sweep=none.yaml"], "--sweep='none.yaml' cannot be read"),
    (["--sweep=odd.yaml"], "--sweep='odd.yaml' has the key 'case'"),
    (["--sweep=empty.yaml"], "--sweep='empty.yaml' must have cases"),
    (["--sweep=wrong.yaml"], "train.steps=0"),
    ([f"--sweep={ROOT}/tools/sweeps/ema.yaml"], f"is of {QUICKSTART}, and not of"),
    (["--submit"], "--submit needs sbatch"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(case[0])[:40] for case in MISTAKES])
def test_a_mistake_is_one_line(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("PATH", str(place))
    Path("odd.yaml").write_text("cases: {a: []}\ncase: 1\n")
    Path("empty.yaml").write_text("cases: {}\n")
    Path("wrong.yaml").write_text("cases: {a: [train.steps=0]}\n")
    assert main(["slurm", GRPO, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert any(part in line for part in message.split("|")), line
    assert line.startswith("megatron-rl: ")


def test_times_are_those_of_sbatch() -> None:
    written = {"90": 5400, "1:30": 90, "2:00:00": 7200, "1-12": 129600, "1-12:30": 131400, "1-0:0:5": 86405}
    assert {text: seconds(text) for text in written} == written


@pytest.mark.parametrize("nodes", range(2, 8))
def test_each_node_tries_its_neighbours_and_one_at_a_time(nodes: int) -> None:
    tried = rounds(nodes)
    for pairs in tried:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
    ring = {frozenset((node, (node + 1) % nodes)) for node in range(nodes)}
    assert {frozenset(pair) for pairs in tried for pair in pairs} == ring
    assert sum(map(len, tried)) == len(ring)


def tried_with(nodes: int, bad: set[int]) -> set[int]:
    return culprits({pair: not bad & {*pair} for pairs in rounds(nodes) for pair in pairs})


def test_who_fails_with_all_neighbours_is_to_blame() -> None:
    for nodes in range(3, 8):
        assert all(tried_with(nodes, {node}) == {node} for node in range(nodes))
    assert tried_with(8, {1, 5}) == {1, 5}
    # Nobody can tell: of two, or where no pair is well.
    assert tried_with(2, {0}) == set() and tried_with(4, {0, 1, 2}) == set() and tried_with(5, set()) == set()


def check_nodes(folder: Path, environments: list[dict[str, str]], *options: str) -> tuple[int, str, list[str]]:
    """Nodes of one rank that are processes here; the exit code of the first, the report and the bad ones."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "megatron_rl.launch.node_check", f"--head={head}", "--ranks-per-node=1"]
    command += [f"--folder={folder}", "--timeout=10", *options, "--hosts", *"abc"[: len(environments)]]
    started = []
    for rank, own in enumerate(environments):
        place = {"PROCID": rank, "NTASKS": len(environments), "NODEID": rank, "LOCALID": 0}
        slurm = {f"SLURM_{name}": str(value) for name, value in place.items()}
        started.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), **slurm, **own}))
    codes = [process.wait(timeout=120) for process in started]
    return codes[0], (folder / "nodes.txt").read_text(), (folder / "bad_nodes.txt").read_text().split()


def test_three_nodes_of_which_one_has_no_network(tmp_path: Path) -> None:
    code, report, bad = check_nodes(tmp_path, [{}, {"GLOO_SOCKET_IFNAME": "nowhere0"}, {}], "--device=cpu")
    assert (code, bad) == (1, ["b"])
    assert "megatron-rl: preflight: b: rank 1: RuntimeError: " in report and "nowhere0" in report
    assert len((tmp_path / "canary.txt").read_text()) == 16


def test_a_node_without_its_gpus(tmp_path: Path) -> None:
    code, report, bad = check_nodes(tmp_path, [{"CUDA_VISIBLE_DEVICES": ""}], "--device=gpu")
    assert (code, bad) == (1, ["a"])
    assert report == "megatron-rl: preflight: a: rank 0: 0 GPUs, and 1 ranks\n"


def test_a_fault_of_all_nodes_is_none_of_theirs() -> None:
    assert blamed({0}, 1) == {0} and blamed({0, 1}, 3) == {0, 1} and blamed({0, 1, 2}, 3) == set()
