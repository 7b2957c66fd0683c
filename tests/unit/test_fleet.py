"""Servers that die, hang and refuse: every request is answered once, with the current weights, or the run says why."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_rl.rollout.vllm.fleet import Fleet, Job
from megatron_rl.rollout.vllm.options import engine_options
from megatron_rl.rollout.vllm.server import Launch, Server
from megatron_rl.rollout.vllm.weights import EMBEDDING, OUTPUT, WeightFiles, read_weights, with_output_layer
from megatron_rl.types import RunError

FAKE = Path(__file__).parents[1] / "fake_vllm.py"
JOBS = [Job((number % 7, number % 3), {"seed": number, "n": 1}) for number in range(60)]


@dataclass
class FakeLaunch:
    """In place of `Launch`: starts the stand-in."""

    folder: Path
    name: str
    delay_s: float = 0.0
    host: str = "127.0.0.1"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def command(self, port: int) -> list[str]:
        return [sys.executable, str(FAKE), str(port), str(self.folder), self.name]

    def environment(self, folder: Path) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "DELAY_S": str(self.delay_s)}


MakeFleet = Callable[..., Fleet]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeFleet]:
    """A fleet of stand-ins a, b, ...; `faults` by name; at the end no process of it is left."""
    made: list[Fleet] = []
    (tmp_path / "weights").write_text("12345")

    def make_fleet(faults: dict[str, str], servers: list[Server] | None = None, **options: Any) -> Fleet:
        for name, lines in faults.items():
            (tmp_path / f"{name}.faults").write_text(lines.replace(", ", "\n"))
        defaults = {"tied": False, "max_sequences": 2, "start_timeout_s": 20.0, "timeout_s": 1.0, "restarts": 2}
        own = [Server(i, None, FakeLaunch(tmp_path, name)) for i, name in enumerate(faults)]  # type: ignore[arg-type]
        made.append(Fleet(own if servers is None else servers, tmp_path, **(defaults | options)))
        return made[-1]

    yield make_fleet
    for fleet in made:
        fleet.close()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


def update(fleet: Fleet, label: str = "run:1") -> None:
    fleet.submit(fleet.update(label)).result(60)


def answer(fleet: Fleet, jobs: list[Job] = JOBS) -> list[dict]:
    groups = fleet.submit(fleet.answer(jobs)).result(60)
    assert all(len(group) == 1 for group in groups)
    return [response for group in groups for response in group]


def check(answers: list[dict], label: str = "run:1", jobs: list[Job] = JOBS) -> None:
    assert [found["tokens"] for found in answers] == [[job.parameters["seed"], *job.token_ids] for job in jobs]
    assert {found["finish_reason"] for found in answers} == {"stop"}
    assert {tuple(found["labels"]) for found in answers} == {((0, label),)}


def calls(folder: Path, name: str, verb: str) -> int:
    path = folder / f"{name}.{verb}"
    return path.stat().st_size if path.exists() else 0


def test_the_faster_server_does_more(make: MakeFleet, tmp_path: Path) -> None:
    fleet = make({"a": "", "b": ""})
    fleet.servers[1].launch.delay_s = 0.1  # type: ignore[union-attr, misc]
    update(fleet)
    assert fleet.checksums == {"w": 5}
    check(answer(fleet))
    by_a, by_b = (calls(tmp_path, name, "generate") for name in "ab")
    assert by_a + by_b == len(JOBS) and by_a > by_b > 0
    assert answer(fleet, []) == []
    update(fleet, "run:2")
    check(answer(fleet), "run:2")
    assert [calls(tmp_path, name, "start") for name in "ab"] == [1, 1]


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("what", ["dies", "hangs"])
def test_one_that_stops_answering_is_started_again(make: MakeFleet, tmp_path: Path, servers: int, what: str) -> None:
    """It is given the current weights before anything else; where there is another, that one goes on."""
    fleet = make({"a": f"generate 9 {what}"} | ({"b": ""} if servers == 2 else {}))
    update(fleet)
    check(answer(fleet))
    assert calls(tmp_path, "a", "generate") >= 9
    check(answer(fleet))
    update(fleet, "run:2")
    check(answer(fleet), "run:2")
    assert calls(tmp_path, "a", "start") == 2


@pytest.mark.parametrize("verb", ["pause", "collective_rpc", "update_weight_version", "reset_prefix_cache", "resume"])
def test_one_that_dies_in_an_update_has_the_weights_afterwards(make: MakeFleet, tmp_path: Path, verb: str) -> None:
    fleet = make({"a": f"{verb} 2 dies", "b": f"{verb} 2 fails"})
    update(fleet)
    update(fleet, "run:2")
    check(answer(fleet), "run:2")
    assert [calls(tmp_path, name, "start") for name in "ab"] == [2, 2]


def test_one_that_cannot_be_started_ends_the_run(make: MakeFleet, tmp_path: Path) -> None:
    fleet = make({"a": "start 0 dies"})
    with pytest.raises(RunError, match=r"no vLLM server is left: vLLM server 0 at http://127.0.0.1:\d+ ended while it"):
        update(fleet)
    assert calls(tmp_path, "a", "start") == 3  # once, and two restarts
    with pytest.raises(RunError, match="fake: it cannot start"):
        update(fleet)


def test_one_that_dies_again_and_again_ends_the_run(make: MakeFleet, tmp_path: Path) -> None:
    fleet = make({"a": "generate 0 dies"})
    update(fleet)
    with pytest.raises(RunError, match="has ended 3 times since the last weight update"):
        answer(fleet)


def test_a_refused_request_ends_the_run(make: MakeFleet) -> None:
    fleet = make({"a": "generate 7 refuses", "b": ""})
    update(fleet)
    with pytest.raises(RunError, match=r"refuses /inference/v1/generate \(400\): .*generate refuses"):
        answer(fleet)
    check(answer(fleet))


def test_a_request_that_fails_each_time_ends_the_run(make: MakeFleet) -> None:
    fleet = make({"a": "generate 0 fails"})
    update(fleet)
    with pytest.raises(RunError, match=r"a request failed 5 times, the last time because .*generate fails"):
        answer(fleet)


def test_one_failure_is_tried_again(make: MakeFleet, tmp_path: Path) -> None:
    fleet = make({"a": "generate 3 fails"})
    update(fleet)
    check(answer(fleet))
    assert (calls(tmp_path, "a", "generate"), calls(tmp_path, "a", "start")) == (len(JOBS) + 1, 1)


def test_a_running_server_that_is_lost_and_comes_back(make: MakeFleet, tmp_path: Path) -> None:
    """The run goes on without it; at the next update it has the weights again, though another run's were there."""
    own = Server(0, None, FakeLaunch(tmp_path, "a"))  # type: ignore[arg-type]
    other = make({}, [Server(1, None, FakeLaunch(tmp_path, "b"))])  # type: ignore[arg-type]
    update(other, "other:1")
    fleet = make({}, [own, Server(1, other.servers[0].url, None)], start_timeout_s=2.0)
    update(fleet)
    check(answer(fleet))
    asked = calls(tmp_path, "b", "generate")
    assert asked > 0
    other.servers[0].end()
    check(answer(fleet))
    update(fleet, "run:2")
    check(answer(fleet), "run:2")
    assert calls(tmp_path, "b", "generate") == asked
    back = other.servers[0]
    back.start(tmp_path)
    fleet.servers[1].url = back.url
    other.submit(back.wait(20, lambda: True)).result()
    update(fleet, "run:3")
    check(answer(fleet), "run:3")
    assert calls(tmp_path, "b", "generate") > asked
    own.end()
    back.end()
    own.launch = None
    with pytest.raises(RunError, match=r"no vLLM server is left: vLLM server 0 at .* did not answer within 2 s"):
        answer(fleet)


def test_a_running_server_that_hangs_is_lost(make: MakeFleet, tmp_path: Path) -> None:
    """Nobody here can start it again; its requests go to the other, or the run ends."""
    other = make({"b": "generate 0 hangs"})
    update(other, "other:1")
    running = Server(1, other.servers[0].url, None)
    fleet = make({}, [Server(0, None, FakeLaunch(tmp_path, "a")), running])  # type: ignore[arg-type]
    update(fleet)
    check(answer(fleet))
    alone = make({}, [Server(0, other.servers[0].url, None)])
    update(alone)
    with pytest.raises(RunError, match=r"no vLLM server is left: vLLM server 0 at .* has not moved for 1 s"):
        answer(alone)


def test_weights_pass_through_files(tmp_path: Path) -> None:
    weights = [(f"layer.{i}", torch.randn(3, 5, dtype=torch.bfloat16 if i % 2 else torch.float32)) for i in range(7)]
    files = WeightFiles(tmp_path, bucket_bytes=100)
    files.write(iter(weights), "run:1")
    assert files.bytes == sum(tensor.nbytes for _, tensor in weights)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 and not list(tmp_path.glob("*.partial"))
    found = dict(read_weights(tmp_path, "run:1"))
    assert list(found) == [name for name, _ in weights]
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in weights)
    with pytest.raises(ValueError, match="holds the weights run:1, not run:2"):
        next(read_weights(tmp_path, "run:2"))
    files.write(iter(weights[:2]), "run:2")
    assert list(dict(read_weights(tmp_path, "run:2"))) == ["layer.0", "layer.1"]


def test_a_tied_output_layer_has_a_name_of_its_own() -> None:
    weights = [(EMBEDDING, torch.ones(2)), ("model.norm.weight", torch.zeros(2))]
    assert [name for name, _ in with_output_layer(weights, tied=True)] == [EMBEDDING, OUTPUT, "model.norm.weight"]
    assert [name for name, _ in with_output_layer(weights, tied=False)] == [EMBEDDING, "model.norm.weight"]


def test_the_documented_command_starts_a_server_as_the_trainer_does() -> None:
    """What does not depend on the run is the same."""
    options = engine_options("MODEL", dtype=torch.bfloat16, max_sequences=64, max_tokens=4096, kv_cache_gb=4.0, tp=1)
    launch = Launch(options=options, host="127.0.0.1", python=None, gpus=(), log=Path("log"))
    words = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text().replace("`", " ").split()
    command = launch.command(8000)[2:]
    ours = {"--port", "--host", "--max-num-seqs", "--tensor-parallel-size", "--seed", "--uvicorn-log-level"}
    pairs = [(flag, value) for flag, value in pairwise([*command, "--"]) if flag.startswith("--") and flag not in ours]
    assert len(pairs) > 8
    for flag, value in pairs:
        assert flag in words, flag
        assert value.startswith("--") or words[words.index(flag) + 1].rstrip(",") == value, flag
    assert f"VLLM_SERVER_DEV_MODE={launch.environment(Path('x'))['VLLM_SERVER_DEV_MODE']}" in words
