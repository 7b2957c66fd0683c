"""Two hosts: network namespaces joined by a cable, in which the command of docs/multi_node.md is run as it stands."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron_rl.rewards.warden import die_with_parent
from tests.dist.pool import Pool
from tests.loop.test_trainers import QUICKSTART, ROOT, comparable, place, steps, train  # noqa: F401

SFT = f"{QUICKSTART}/sft.yaml"
OPTIONS = ["parallel.tp=2", "train.batch_size=8", "eval.limit=8", "optim.schedule=constant"]
HANG_S = 6.0
ADDRESSES = {"node-a": "10.0.0.1/24", "node-b": "10.0.0.2/24"}


class Host:
    """A network namespace with a host name of its own. A process holds it, and dies with this one at the latest."""

    def __init__(self, name: str) -> None:
        self.name = name
        hold = ["unshare", "--net", "--uts", "sh", "-c", f"hostname {name} && echo held && exec sleep infinity"]
        self.holder = subprocess.Popen(
            hold, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent
        )
        assert self.holder.stdout is not None and self.holder.stderr is not None
        self.refused = "" if self.holder.stdout.readline() == "held\n" else self.holder.stderr.read().strip()

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.holder.pid}", "--net", "--uts", *command]

    def ip(self, *arguments: str) -> None:
        subprocess.run(self.inside("ip", *arguments), check=True)

    def end(self) -> None:
        """Ends all that runs there."""
        with suppress(FileNotFoundError):
            namespace = os.readlink(f"/proc/{self.holder.pid}/ns/net")
            for process in psutil.pids():
                with suppress(OSError):  # it has ended, or is a zombie
                    if os.readlink(f"/proc/{process}/ns/net") == namespace:
                        os.kill(process, signal.SIGKILL)
        self.holder.communicate()


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts, whose interfaces eth0 are the ends of one cable."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (Debian: iproute2)")
    hosts = [Host(name) for name in ADDRESSES]
    try:
        for host in hosts:
            if host.refused:
                pytest.skip(f"needs the right to make network namespaces: {host.refused}")
        a, b = (str(host.holder.pid) for host in hosts)
        subprocess.run(["ip", *f"link add eth0 netns {a} type veth peer name eth0 netns {b}".split()], check=True)
        for host in hosts:
            host.ip("addr", "add", ADDRESSES[host.name], "dev", "eth0")
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", "eth0", "up")
        yield hosts
    finally:
        for host in hosts:
            host.end()


def documented_command(*options: str) -> str:
    """The script of the page, with one rank a node and another config."""
    (script,) = re.findall(r"```bash\n(HEAD=.*?)```", (ROOT / "docs" / "multi_node.md").read_text(), re.DOTALL)
    python = shlex.quote(sys.executable)
    for shown, ours in (
        ("torchrun ", f"{python} -m torch.distributed.run "),
        ("--nproc-per-node=8", "--nproc-per-node=1"),
        ("my.yaml parallel.tp=8", shlex.join([SFT, *OPTIONS, *options])),
    ):
        assert script.count(shown) == 1
        script = script.replace(shown, ours)
    return script


class Node:
    """The command on one host, and what it says."""

    def __init__(self, host: Host, folder: Path, output: Path, *options: str) -> None:
        self.out, self.err = (output / f"{host.name}.{stream}" for stream in ("out", "err"))
        command = host.inside("bash", "-c", documented_command(*options))
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)

    def verdicts(self) -> list[str]:
        return [line for line in self.err.read_text().splitlines() if line.startswith("megatron-rl: rank")]


def test_one_model_cut_between_two_hosts_is_the_one_that_one_host_trains(
    pool: Pool,
    place: Path,  # noqa: F811
    hosts: list[Host],
    tmp_path: Path,
) -> None:
    """To the last bit, the exported weights and every figure."""
    nodes = [Node(host, place, tmp_path, "train.steps=3", f"run.dir={tmp_path}/two") for host in hosts]
    assert [node.process.wait(timeout=120) for node in nodes] == [0, 0], [node.err.read_text() for node in nodes]
    assert "layout         tp=2 pp=1 vpp=1 dp=1; 2 process(es)" in nodes[0].out.read_text()
    assert nodes[1].out.read_text() == ""
    pool.run(train, 2, str(place), SFT, [*OPTIONS, "train.steps=3", f"run.dir={tmp_path}/one"])
    one, two = ([comparable(row) for row in steps(tmp_path / name)] for name in ("one", "two"))
    assert len(two) == 4 and one == two
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_a_cut_cable_is_reported_at_both_ends_and_ends_both(
    place: Path,  # noqa: F811
    hosts: list[Host],
    tmp_path: Path,
) -> None:
    """The store is on the first host; neither the rank on the second one nor its torchrun gets an answer from it."""
    options = ["train.steps=100000", f"run.hang_timeout_s={HANG_S:g}", f"run.dir={tmp_path}/run"]
    nodes = [Node(host, place, tmp_path, *options) for host in hosts]
    lines = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not lines.exists() or lines.read_text().count("\n") < 3:
        assert all(node.process.poll() is None for node in nodes) and time.monotonic() < deadline
        time.sleep(0.1)
    hosts[1].ip("link", "set", "eth0", "down")
    cut = time.monotonic()
    codes = [node.process.wait(timeout=60) for node in nodes]
    # A sixth more than the timeout, and what torchrun needs to end on a busy machine: a second on a quiet one.
    assert HANG_S / 2 < time.monotonic() - cut < HANG_S * 7 / 6 + 10
    # Of a shell, or of what it has become.
    assert codes[0] == 1 and codes[1] in (-signal.SIGKILL, 128 + signal.SIGKILL)
    at_a, at_b = (node.verdicts() for node in nodes)
    # What the first host knows is a quarter of a second old, so that it may be from before the first step.
    place_of = r"(start-up|step \d+(, phase [\w/]+)?) on node-b; "
    assert len(at_a) == len(at_b) == 1
    assert re.match(rf"megatron-rl: rank 1 has given no sign of life for [3-7] s: last seen in {place_of}", at_a[0])
    assert re.match(
        r"megatron-rl: rank 1 has had no answer from torchrun's store at 10\.0\.0\.1:\d+ for [3-7] s: the network to "
        rf"that machine, or the machine, is gone; {place_of}",
        at_b[0],
    )
    assert "Traceback" not in nodes[1].err.read_text()
