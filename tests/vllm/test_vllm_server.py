"""vLLM servers: the trainer's log-probabilities through updates, answers in flight, deaths of servers and trainers."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import torch

from tests.dist.pool import Pool
from tests.dist.test_engine import PROMPTS, sampling
from tests.dist.test_worker import make_worker, update
from tests.loop.test_trainers import steps, train
from tests.models import tiny_model, tiny_tokenizer
from tests.vllm.test_vllm_engine import CONFIG, SIZES, prompts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

SHARED = Path("/dev/shm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model, its data and config."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_tokenizer(tiny_model(folder / "model", "llama", tied=True, **SIZES), 99)
    rows = [{"prompt": " ".join(f"w{5 + (i * j) % 90}" for j in range(180)), "answer": ""} for i in range(1, 20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text("def judge(prompt, rollout):\n    return float(rollout.token_ids[0] % 2)\n")
    (folder / "config.yaml").write_text(CONFIG.replace("engine: vllm,", "engine: vllm_server,"))
    return folder


def launch(model: Path, log: Path) -> Any:
    from megatron_rl.rollout.vllm.options import engine_options
    from megatron_rl.rollout.vllm.server import Launch

    options = engine_options(model, dtype=torch.float32, max_sequences=64, max_tokens=512, kv_cache_gb=0.1, tp=1)
    return Launch(options=options, host="127.0.0.1", python=None, gpus=(), log=log)


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server that somebody else started, to which runs connect."""
    place = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    how = launch(folder / "model", place / "log")
    with (place / "log").open("w") as log:
        server = subprocess.Popen(
            how.command(port),
            env=how.environment(place) | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=log,
            stderr=log,
        )
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


def make_engine(model: str, servers: list, **options: Any) -> Any:
    from transformers import AutoConfig

    from megatron_rl.data.tokenizer import load_tokenizer
    from megatron_rl.rollout.vllm.served import ServedEngine

    defaults = {
        "dtype": torch.float32,
        "stop": (2, 3),
        "tied": AutoConfig.from_pretrained(model).tie_word_embeddings,
        "max_sequences": 64,
        "servers": servers,
        "exchange": None,
        "start_timeout_s": 300.0,
        "timeout_s": 60.0,
        "restarts": 2,
    }
    return ServedEngine(load_tokenizer(model), **(defaults | options))


def followed(
    model: str, servers: list, layout: dict, updates: int, broadcast: bool = False
) -> tuple[list[float], list, list]:
    """The largest gap to the trainer after each update; the greedy answers of vLLM and of transformers at the end."""
    from megatron_rl.data.samples import from_example
    from megatron_rl.data.tokenizer import load_tokenizer
    from megatron_rl.rollout.hf_engine import HFEngine
    from megatron_rl.rollout.sync import parity_gap, push

    worker = make_worker(model, layout)
    engine = make_engine(model, servers, broadcast=broadcast)
    gaps = []
    for number in range(1 + updates):
        if number:
            update(worker)
        assert push(worker.named_hf_weights, engine, worker.version) == {"sync/wrong_tensors": 0.0}
        rollouts = [r for group in engine.generate(prompts(), sampling()) for r in group.rollouts]
        assert {(rollout.policy_version, rollout.later_versions) for rollout in rollouts} == {(worker.version, ())}
        samples = [from_example(i, PROMPTS[r.prompt_index], r.token_ids) for i, r in enumerate(rollouts)]
        gaps.append(parity_gap(rollouts, worker.log_probs(samples, worker.plan(samples, 4096), 0.8))[0])
    other = HFEngine(model, load_tokenizer(model), dtype=torch.float32, stop=(2, 3), pad=0, max_sequences=64)
    push(worker.named_hf_weights, other, worker.version)
    greedy = [e.generate(prompts(), sampling(temperature=0.0, group_size=1)) for e in (engine, other)]
    engine.close()
    return gaps, *greedy


@pytest.mark.parametrize(
    ("layout", "broadcast"), [({"tp": 2}, False), ({"pp": 2}, False), ({"pp": 2}, True)], ids=["tp2", "pp2", "gloo"]
)
def test_log_probs_are_the_trainers_through_ten_updates(
    pool: Pool, folder: Path, url: str, layout: dict, broadcast: bool
) -> None:
    """One running server, for one trainer after another; greedy answers are those of transformers."""
    for gaps, mine, theirs in pool.run(followed, 2, str(folder / "model"), [url], layout, 10, broadcast):
        assert len(gaps) == 11 and max(gaps) < 1e-4, gaps
        for group, expected in zip(mine, theirs, strict=True):
            assert [r.token_ids for r in group.rollouts] == [r.token_ids for r in expected.rollouts]
            assert [r.text for r in group.rollouts] == [r.text for r in expected.rollouts]


def unreached(model: str, url: str) -> str:
    """What is said where a server breaks off as weights are sent to it."""
    from megatron_rl.rollout.vllm.server import Server, ServerError
    from megatron_rl.types import RunError

    engine = make_engine(model, [url], broadcast=True, timeout_s=3.0)

    async def broken(self: Any, *arguments: Any) -> Any:
        raise ServerError("it broke off")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "take", broken)
        try:
            engine.load_weights(weights_of(model, 1.0), 0)
        except RunError as error:
            return str(error)
        finally:
            engine.close()
    return ""


def test_a_broadcast_that_breaks_off_ends_the_run(pool: Pool, folder: Path, url: str) -> None:
    """On every rank, with one message."""
    said = pool.run(unreached, 2, str(folder / "model"), url)
    assert said == ["the weights did not reach the servers, and none keeps them: it broke off"] * 2


def weights_of(model: str, scale: float) -> list:
    from transformers import AutoModelForCausalLM

    tensors = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    return [(name, tensor * scale) for name, tensor in tensors.items() if name != "lm_head.weight"]


def in_flight(model: str, url: str) -> tuple[list, list]:
    """Long answers during which weights change; and what the new weights alone would say."""
    engine = make_engine(model, [url], stop=())
    engine.load_weights(weights_of(model, 1.0), 0)
    fleet = engine.fleet
    found: list = []
    long = sampling(max_new_tokens=440, group_size=1)
    asker = Thread(target=lambda: found.extend(engine.generate(prompts(), long)))
    before = fleet.submit(fleet.servers[0].tokens(5)).result()
    asker.start()
    while fleet.submit(fleet.servers[0].tokens(5)).result() < before + 5 * 100:
        time.sleep(0.01)
    # What the trainer does once the answers are there; a server takes it at any time.
    engine.files.write(weights_of(model, 1.05), engine._label(1))
    fleet.submit(fleet.update(engine._label(1))).result()
    asker.join()
    engine.version = 1
    again = engine.generate(prompts(), sampling(group_size=1))
    engine.close()
    return found, again


def test_answers_in_flight_survive_an_update(pool: Pool, folder: Path, url: str) -> None:
    """And say which policy drew which token; each token's log-probability is that policy's."""
    from transformers import AutoModelForCausalLM

    ((found, again),) = pool.run(in_flight, 1, str(folder / "model"), url)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for group in found:
        (rollout,) = group.rollouts
        ((first, later),) = rollout.later_versions
        assert len(rollout.token_ids) == 440 and rollout.policy_version == 0 and later == 1 and 0 < first < 440
        log_probs = {}
        for version, scale in ((0, 1.0), (1, 1.05)):
            scaled = {name: tensor * scale for name, tensor in model.named_parameters()}
            with torch.no_grad():
                ids = torch.tensor([[*group.prompt.token_ids, *rollout.token_ids]])
                logits = torch.func.functional_call(model, scaled, (ids,)).logits[0] / 0.8
            log_probs[version] = logits.log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        # Keys and values were dropped with the old weights, so that the new policy saw the old one's tokens only.
        start = len(group.prompt.token_ids) - 1
        drawn = torch.tensor(rollout.log_probs)
        old, new = (log_probs[version][start:] for version in (0, 1))
        assert (drawn[:first] - old[:first]).abs().max() < 1e-4
        assert (drawn[first:] - new[first:]).abs().max() < 1e-4
        assert (drawn[first:] - old[first:]).abs().max() > 1e-2
    assert {rollout.policy_version for group in again for rollout in group.rollouts} == {1}


@pytest.mark.parametrize(
    ("trap", "message"),
    [
        ("output layer", "ParityError: the engine's log-probabilities differ from the trainer's by up to"),
        ("cached prefix", "ParityError: the engine's log-probabilities differ from the trainer's by up to"),
    ],
)
def test_every_trap_is_found(pool: Pool, folder: Path, tmp_path: Path, url: str, trap: str, message: str) -> None:
    options = [f"run.dir={tmp_path}/run", f"rollout.vllm.server.urls=[{url}]"]
    (said,) = pool.run(planted, 1, str(folder), "config.yaml", options, trap)
    assert message in said, said
    assert len(steps(tmp_path / "run")) == (1 if trap == "cached prefix" else 0)


def planted(cwd: str, config: str, overrides: list[str], trap: str) -> str:
    """What a run says whose server is left to itself."""
    from megatron_rl.rollout.vllm.server import Server

    with pytest.MonkeyPatch.context() as patch:
        ask, take = Server._ask, Server.take

        async def keep(self: Any, verb: str, path: str, seconds: Any, body: Any = None) -> Any:
            if path.startswith("/reset"):
                return {"success": True}
            return await ask(self, verb, path.replace("mode=keep", "mode=keep&clear_cache=false"), seconds, body)

        async def untied(self: Any, method: str, arguments: list[str], label: str, seconds: float) -> Any:
            return await take(self, method, ["own", *arguments[1:]], label, seconds)

        patch.setattr(Server, *(("take", untied) if trap == "output layer" else ("_ask", keep)))
        try:
            train(cwd, config, overrides)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def leftovers() -> tuple[set[str], set[int]]:
    """Folders and segments in shared memory, and servers."""
    servers = {
        p.pid for p in psutil.process_iter(["cmdline"]) if "vllm.entrypoints" in " ".join(p.info["cmdline"] or [])
    }
    return {path.name for path in SHARED.iterdir()}, servers


def killed(cwd: str, config: str, overrides: list[str]) -> int:
    """A run whose server is killed as it answers step 2, and as it takes the weights for step 3. The starts."""
    from megatron_rl.rollout.vllm.server import Server

    starts: list[int] = []
    asked: list[int] = []

    def kill(server: Any) -> None:
        """The process that speaks HTTP; the engine's is its child."""
        below = psutil.Process(server.keeper.pid).children(recursive=True)
        next(child for child in below if "vllm.entrypoints" in " ".join(child.cmdline()[:4])).kill()

    with pytest.MonkeyPatch.context() as patch:
        start, generate, ask = Server.start, Server.generate, Server._ask

        def counted(self: Any, folder: Path) -> None:
            starts.append(self.number)
            start(self, folder)

        async def answering(self: Any, *arguments: Any) -> Any:
            asked.append(self.number)
            if len(asked) == 6:  # 4 are those of step 1
                kill(self)
            return await generate(self, *arguments)

        async def asking(self: Any, verb: str, path: str, seconds: Any, body: Any = None) -> Any:
            if path == "/collective_rpc" and body["args"][2].endswith(":2") and len(starts) == 2:
                kill(self)
            return await ask(self, verb, path, seconds, body)

        patch.setattr(Server, "start", counted)
        patch.setattr(Server, "generate", answering)
        patch.setattr(Server, "_ask", asking)
        train(cwd, config, overrides)
    return len(starts)


def test_a_killed_server_costs_nothing_but_time(pool: Pool, folder: Path, tmp_path: Path, url: str) -> None:
    """It is started again; every figure is that of a run which nothing disturbed."""
    options = [f"run.dir={tmp_path}/calm", f"rollout.vllm.server.urls=[{url}]"]
    pool.run(train, 1, str(folder), "config.yaml", options)
    before = leftovers()  # that server's own segments among them
    assert pool.run(killed, 1, str(folder), "config.yaml", [f"run.dir={tmp_path}/killed"]) == [3]
    figures = ("step", "critic/score/mean", "actor/loss", "actor/grad_norm", "perf/total_num_tokens")
    for row, wanted in zip(steps(tmp_path / "killed"), steps(tmp_path / "calm"), strict=True):
        assert [row[key] for key in figures] == pytest.approx([wanted[key] for key in figures], rel=1e-4, abs=1e-6)
        assert row["rollout/log_prob_gap_max"] < 1e-4
    assert leftovers() == before


@pytest.mark.full
def test_two_servers_share_the_work(pool: Pool, folder: Path, tmp_path: Path) -> None:
    """On two ranks, with servers of two processes each."""
    before = leftovers()
    options = ["parallel.dp=2", f"run.dir={tmp_path}/run", "rollout.vllm.server.count=2", "rollout.vllm.tp=2"]
    pool.run(train, 2, str(folder), "config.yaml", [*options, "rollout.max_sequences=4"])
    rows = steps(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["rollout/log_prob_gap_max"] < 1e-4 and row["sync/wrong_tensors"] == 0
    assert leftovers() == before


def test_a_server_that_cannot_start_ends_the_run_with_one_message(pool: Pool, folder: Path, tmp_path: Path) -> None:
    options = [f"run.dir={tmp_path}/run", "rollout.vllm.server.restarts=1", "rollout.vllm.server.python=/bin/false"]
    said = pool.run(ending, 2, str(folder), "config.yaml", ["parallel.dp=2", *options])
    assert said[0] == said[1]
    assert said[0].startswith("RunError: no vLLM server is left: vLLM server 0 at http://127.0.0.1:")
    assert "ended while it started" in said[0]


def ending(cwd: str, config: str, overrides: list[str]) -> str:
    try:
        train(cwd, config, overrides)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_nothing_outlives_a_killed_trainer(folder: Path, tmp_path: Path) -> None:
    before = leftovers()
    command = [sys.executable, "-m", "megatron_rl", "train", "config.yaml", f"run.dir={tmp_path}/run"]
    root = str(Path(__file__).parents[2])
    trainer = subprocess.Popen(
        [*command, "train.steps=1000"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": root},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 300
    while not ((tmp_path / "run" / "metrics.jsonl").exists() and steps(tmp_path / "run")):
        assert trainer.poll() is None and time.monotonic() < end
        time.sleep(0.5)
    assert leftovers() != before
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    while leftovers() != before and time.monotonic() < end:
        time.sleep(0.2)
    assert leftovers() == before


def test_one_step_ahead(pool: Pool, folder: Path, tmp_path: Path, url: str) -> None:
    """Rollouts are of the policy one update before, and weighed; a run that is continued has those that were drawn."""
    ahead = ["rollout.vllm.server.ahead=true", "rollout_correction.level=token", "optim.lr=1e-3"]
    options = [f"rollout.vllm.server.urls=[{url}]", "train.steps=4", "rollout.parity_every=1", *ahead]
    pool.run(train, 2, str(folder), "config.yaml", [*options, "parallel.tp=2", f"run.dir={tmp_path}/whole"])
    rows = steps(tmp_path / "whole")
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1, 1]
    assert max(row["rollout/log_prob_gap_max"] for row in rows) < 1e-4
    assert "timing_s/gen_ahead" not in rows[0] and min(row["timing_s/gen_ahead"] for row in rows[1:]) > 0
    assert rows[0]["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1, abs=1e-6)
    assert all(row["rollout_corr/rollout_is_eff_sample_size"] < 1 - 1e-5 for row in rows[1:])
    for stop in (["run.stop_after=2"], []):
        pool.run(train, 2, str(folder), "config.yaml", [*options, "parallel.tp=2", f"run.dir={tmp_path}/cut", *stop])
    figures = ("step", "critic/score/mean", "actor/loss", "actor/grad_norm", "rollout/staleness")
    for row, wanted in zip(steps(tmp_path / "cut"), rows, strict=True):
        assert [row[key] for key in figures] == pytest.approx([wanted[key] for key in figures], rel=1e-5, abs=1e-7)
