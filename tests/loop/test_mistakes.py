"""Bad input ends in one line that names it, before any process is started, and never in a library's traceback."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.cli import main
from tests.models import tiny_model, tiny_tokenizer

CONFIG = """
trainer: grpo
model: {path: model}
data: {train: train.jsonl, max_prompt_tokens: 6}
train: {steps: 2, batch_size: 2}
rollout: {group_size: 2, max_new_tokens: 4}
run: {dir: run}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    tiny_tokenizer(tiny_model(folder / "model"), 99)
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": "w5"} for i in range(5, 15)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture, *overrides: str) -> str:
    """The one line of a failing `check`."""
    assert main(["check", "config.yaml", *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("megatron-rl: ")
    return captured.err.removeprefix("megatron-rl: ").strip()


def test_check_shows_what_it_found(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "config.yaml", "parallel.tp=2", "parallel.pp=2"]) == 0
    out = capsys.readouterr().out
    assert ["parallel.tp", "2", "override", "'parallel.tp=2'"] in [line.split() for line in out.splitlines()]
    assert "layout       tp=2 pp=2 vpp=1 dp=1: 4 process(es)" in out
    assert "10 rows to train on, 0 held out" in out
    # Four sequences of at most 2 + 4 tokens, on two stages.
    assert "first update 2 micro-batch(es) per rank, 12 to 12 tokens of at most 8192" in out
    assert not (folder / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Named it is refused; left to choose, the other answers, and `check` shows that it was chosen."""
    assert "rollout.engine=vllm needs the package vllm" in said(capsys, "rollout.engine=vllm")
    assert "rollout.engine=vllm_server needs the package vllm" in said(capsys, "rollout.engine=vllm_server")
    server = "rollout.vllm.server"
    assert main(["check", "config.yaml", "rollout.engine=vllm_server", f"{server}.urls=[http://localhost:8000]"]) == 0
    capsys.readouterr()
    assert main(["check", "config.yaml", "rollout.engine=auto"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rollout.engine ")]
    assert line.split()[1:] == ["hf", "derived"]


def test_what_will_disappoint_is_said(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", "config.yaml", "ema.axis=step", "ema.beta=0.3"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[2] for line in lines] == ["ema.beta=0.3", "ema.axis=step"]
    assert main(["check", "config.yaml", "ema.axis=token"]) == 0
    assert capsys.readouterr().err == ""


def edit_config(folder: Path, of: str = "model", **changes: object) -> None:
    path = folder / of / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_eos(folder: Path) -> None:
    path = folder / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("eos_token")
    path.write_text(json.dumps(settings))
    (folder / "model" / "special_tokens_map.json").unlink(missing_ok=True)


def lost_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


CASES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "data missing": (remove("train.jsonl"), [], ["train.jsonl"]),
    "data empty": (write("train.jsonl", ""), [], ["train.jsonl", "no rows"]),
    "data malformed": (write("train.jsonl", '{"prompt": "w5"}\n{"prompt": \n'), [], ["train.jsonl", "line 2"]),
    "data without key": (write("train.jsonl", '{"question": "w5"}\n'), [], ["line 1", "'prompt'", "question"]),
    "prompt too long": (lambda folder: None, ["data.max_prompt_tokens=1"], ["2 tokens", "data.max_prompt_tokens"]),
    "model without config": (remove("model/config.json"), [], ["model.path='model'", "config.json"]),
    "model without weights": (remove("model/model.safetensors"), [], ["model.path='model'", "safetensors"]),
    "model without a shard": (lost_shard, [], ["model-00002-of-00002.safetensors", "not there"]),
    "another family": (lambda f: edit_config(f, model_type="gpt2"), [], ["model_type='gpt2'", "llama"]),
    "another shape": (lambda f: edit_config(f, num_hidden_layers=5), [], ["lacks model.layers.4"]),
    "tp and heads": (lambda folder: None, ["parallel.tp=3"], ["parallel.tp=3", "8 attention heads"]),
    "tp and kv heads": (lambda folder: None, ["parallel.tp=8"], ["parallel.tp=8", "4 key/value heads"]),
    "stages and layers": (lambda folder: None, ["parallel.pp=5"], ["parallel.pp=5", "4 layers"]),
    "tokenizer without eos": (no_eos, [], ["eos_token"]),
    "tokenizer too large": (lambda f: tiny_tokenizer(f / "model", 120), [], ["120 tokens", "99"]),
    "unknown reward": (lambda folder: None, ["reward.name=exakt"], ["'exakt'", "'exact'"]),
    "reward that cannot be imported": (write("bad.py", "1 / 0\n"), ["reward.name=bad.py:f"], ["ZeroDivisionError"]),
    "reward option": (lambda folder: None, ["reward.options={tolerance: 1}"], ["tolerance"]),
    "micro-batch too small": (
        lambda folder: None,
        ["train.max_tokens_per_micro_batch=5"],
        ["6 tokens", "max_tokens"],
    ),
    "unknown guard": (
        lambda f: None,
        ["guards.ignore=[grad_spikes]"],
        ["guards.ignore", "'grad_spikes'", "'grad_spike'"],
    ),
    "limit with an option of its own": (
        lambda folder: None,
        ["guards.limits={parity: 0.1}"],
        ["guards.limits.parity=0.1", "rollout.parity_tolerance"],
    ),
    "no skipped steps": (lambda folder: None, ["guards.max_skipped_steps=0"], ["guards.max_skipped_steps=0"]),
    "task without size": (lambda folder: None, ["data.train=reasoning-gym:chain_sum"], ["data.task.size"]),
    "task whose verifier runs text": (
        lambda folder: None,
        [
            "data.train=reasoning-gym:puzzle24",
            "data.task.size=2",
            "reward.name=reasoning",
            "data.max_prompt_tokens=999",
        ],
        ["'puzzle24'", "reward.options.evaluate=true"],
    ),
    "vLLM with a truncated distribution": (
        lambda folder: None,
        ["rollout.engine=vllm", "rollout.top_p=0.9"],
        ["rollout.top_p=0.9", "rollout.engine=hf"],
    ),
    "servers on another host without a shared folder": (
        lambda folder: None,
        ["rollout.engine=vllm_server", "rollout.vllm.server.urls=[http://127.0.0.1:1, http://node7:8000]"],
        ["http://node7:8000", "rollout.vllm.server.exchange"],
    ),
    "a server's address that is none": (
        lambda folder: None,
        ["rollout.engine=vllm_server", "rollout.vllm.server.urls=[localhost:8000]"],
        ["'localhost:8000'", "http://host:8000"],
    ),
    "a shared folder that is not there": (
        lambda folder: None,
        ["rollout.engine=vllm_server", "rollout.vllm.server.exchange=nowhere"],
        ["rollout.vllm.server.exchange='nowhere'", "create it"],
    ),
    "an interpreter that is not there": (
        lambda folder: None,
        ["rollout.engine=vllm_server", "rollout.vllm.server.python=/no/python"],
        ["rollout.vllm.server.python='/no/python'", "an interpreter that has vLLM"],
    ),
    "drawing ahead in the trainer's processes": (
        lambda folder: None,
        ["rollout.engine=hf", "rollout.vllm.server.ahead=true"],
        ["rollout.vllm.server.ahead=true", "rollout.engine=vllm_server"],
    ),
    "drawing ahead without weights": (
        lambda folder: None,
        ["rollout.engine=vllm_server", "rollout.vllm.server.ahead=true"],
        ["rollout.vllm.server.ahead=true", "rollout_correction.level=token"],
    ),
    "groups larger than what a server takes": (
        lambda folder: None,
        ["rollout.engine=vllm_server", "rollout.group_size=4", "rollout.max_sequences=2"],
        ["rollout.group_size=4", "rollout.max_sequences=2"],
    ),
    "too few GPUs for the servers": (
        lambda folder: None,
        ["rollout.engine=vllm_server", "rollout.vllm.server.gpus=[0, 1]", "rollout.vllm.tp=4"],
        ["rollout.vllm.server.gpus=[0, 1]", "need 4"],
    ),
    "such a task in a combined reward": (
        lambda folder: None,
        [
            "data.train=reasoning-gym:puzzle24",
            "data.task.size=2",
            "reward.name=combined",
            "reward.options.rewards=[{name: length, weight: 0.1}, {name: reasoning}]",
            "data.max_prompt_tokens=999",
        ],
        ["'puzzle24'", "evaluate=true"],
    ),
    "weights that are nowhere": (
        lambda folder: None,
        ["model.weights=runs/none"],
        ["model.weights='runs/none'", "'pretrained'", "'random'"],
    ),
    "media": (
        write("train.jsonl", '{"prompt": "w5", "images": []}\n{"prompt": "w6", "images": ["a.png"]}\n'),
        [],
        ["line 2", "'images'", "only text"],
    ),
    "unknown template": (lambda folder: None, ["data.template=r1zero"], ["data.template='r1zero'", "'r1_zero'"]),
    "unknown key": (lambda folder: None, ["optim.learning=1"], ["unknown key 'optim.learning'", "'optim."]),
    "key of another trainer": (
        lambda folder: None,
        ["data.response_key=answer"],
        ["unknown key 'data.response_key'", "belongs to trainer 'sft'"],
    ),
    "unknown task": (
        lambda folder: None,
        ["data.train=reasoning-gym:chain_some", "data.task.size=5"],
        ["chain_some", "chain_sum"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    spoil, overrides, words = CASES[case]
    spoil(folder)
    line = said(capsys, *overrides)
    for word in words:
        assert word in line, line


def critic_of_its_own(folder: Path) -> None:
    """The policy's body and tokenizer once more, in the directory `critic`; the config becomes PPO's."""
    shutil.copytree(folder / "model", folder / "critic")
    (folder / "config.yaml").write_text(CONFIG.replace("trainer: grpo", "trainer: ppo"))


CRITICS: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "nowhere": (lambda f: None, ["critic.path=none"], ["critic.path='none'", "config.json"]),
    "another vocabulary": (
        lambda f: tiny_tokenizer(f / "critic", 90),
        ["critic.path=critic"],
        ["critic.path='critic' has another vocabulary (90 tokens)", "model.path='model' (99)", "policy's tokenizer"],
    ),
    "without weights": (remove("critic/model.safetensors"), ["critic.path=critic"], ["'critic'", "safetensors"]),
    "heads": (
        lambda f: edit_config(f, of="critic", num_key_value_heads=1),
        ["critic.path=critic", "parallel.tp=2"],
        ["critic.path='critic': parallel.tp=2 does not divide the model's 1 key/value heads"],
    ),
    "no such run": (lambda f: None, ["critic.weights=runs/none"], ["critic.weights='runs/none' is neither"]),
}


@pytest.mark.parametrize("case", CRITICS)
def test_mistakes_about_a_critic(folder: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    critic_of_its_own(folder)
    spoil, overrides, words = CRITICS[case]
    assert main(["check", "config.yaml", "critic.path=critic"]) == 0
    capsys.readouterr()
    spoil(folder)
    line = said(capsys, *overrides)
    for word in words:
        assert word in line, line


def saved_run(folder: Path, **changes: object) -> None:
    """A run directory with the checkpoint of a model like the config's, but for `changes`."""
    from megatron_rl.checkpoint.manifest import files_of, measure, write_manifest
    from megatron_rl.config.load import load_config
    from megatron_rl.models.hf_config import load_shape
    from megatron_rl.trainers.resume import origin

    checkpoint = folder / "run" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text("step_00000002\n")
    identity = load_shape(folder / "model").identity() | changes
    state = {"step": 2, "models": {"actor": identity}, **origin(load_config("config.yaml"))}
    (checkpoint / "state.json").write_text(json.dumps(state | {"trainer": changes.get("trainer", "grpo")}))
    write_manifest(checkpoint, measure(checkpoint, files_of(checkpoint)))


SAVED: dict[str, tuple[dict, list[str], list[str]]] = {
    "another model": ({"hidden_size": 128}, [], ["of another model", "hidden_size is 128 there and 64"]),
    "other rotary frequencies": ({"inv_freq": "0"}, ["model.weights=run"], ["of another model", "inv_freq"]),
    "another trainer": ({"trainer": "sft"}, [], ["step_00000002 is of trainer 'sft', not 'grpo'", "run.resume=false"]),
}


@pytest.mark.parametrize("case", SAVED)
def test_checkpoints_that_do_not_fit(folder: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    changes, overrides, words = SAVED[case]
    saved_run(folder, **changes)
    line = said(capsys, *overrides)
    for word in words:
        assert word in line, line


def test_a_run_that_fits_is_accepted(folder: Path, capsys: pytest.CaptureFixture) -> None:
    saved_run(folder)
    assert main(["check", "config.yaml", "model.weights=run"]) == 0
    assert main(["check", "config.yaml", "model.weights=random"]) == 0
    assert "parameters in model" in capsys.readouterr().out


EVALUATIONS = {
    "no problems": (["config.yaml"], ["eval needs held-out problems: name them after MODEL, or set data.val"]),
    "no model": (["nothing"], ["MODEL='nothing' is no Hugging Face directory"]),
    "option of training": (["model", "train.jsonl", "train.steps=2"], ["for trainer 'eval'; it belongs to"]),
    "no such option": (["model", "train.jsonl", "eval.limits=2"], ["did you mean 'eval.limit'"]),
    "no such data": (["model", "val.jsonl"], ["there is no file 'val.jsonl'"]),
    "shots without a file": (["model", "train.jsonl", "eval.shots=2"], ["eval.shots=2", "eval.shots_from=None"]),
    "too few shots": (
        ["model", "train.jsonl", "eval.shots=11", "eval.shots_from=train.jsonl"],
        ["eval.shots=11", "has: 10"],
    ),
    "shots without responses": (
        ["model", "train.jsonl", "eval.shots=1", "eval.shots_from=train.jsonl"],
        ["train.jsonl line 1 has no text 'response'", "eval.shots_response_key"],
    ),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_mistakes_about_an_evaluation(folder: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    arguments, words = EVALUATIONS[case]
    assert main(["eval", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("megatron-rl: ") and line.count("\n") == 1
    for word in words:
        assert word in line, line


def test_an_evaluation_has_a_config_of_its_own(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """It can be checked like any other; and what can be a model gives the right one."""
    from megatron_rl.trainers.evaluation_config import evaluation_config

    own = "trainer: eval\nmodel: {path: model}\ndata: {val: train.jsonl}\nrun: {dir: measured}\neval: {limit: 3}\n"
    (folder / "eval.yaml").write_text(own)
    assert main(["check", "eval.yaml", "rollout.max_new_tokens=4"]) == 0
    assert "data         3 problems, with answers up to 6 tokens" in capsys.readouterr().out
    assert main(["train", "eval.yaml"]) == 2
    assert "trainer=eval trains nothing" in capsys.readouterr().err
    saved_run(folder)
    checkpoint = "run/checkpoints/step_00000002"
    for model, weights, place in (
        ("model", "pretrained", "runs/eval/model-train"),
        ("config.yaml", checkpoint, "run/eval/step_00000002-train"),
        ("run", checkpoint, "run/eval/step_00000002-train"),
        (checkpoint, checkpoint, "run/eval/step_00000002-train"),
        ("eval.yaml", "pretrained", "measured"),
    ):
        (folder / "run" / "config.yaml").write_text(CONFIG)
        config = evaluation_config(model, "train.jsonl", ["eval.shots=0", "parallel.dp=2"]).config
        assert (config.model.path, config.model.weights, config.run.dir) == ("model", weights, place), model
        assert config.rollout.max_new_tokens == (4 if "run" in weights else 512) and config.parallel.dp == 2
    assert evaluation_config("model", "train.jsonl", ["run.dir=mine"]).config.run.dir == "mine"


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_prompts_can_be_cut(folder: Path, capsys: pytest.CaptureFixture, side: str) -> None:
    assert main(["check", "config.yaml", "data.max_prompt_tokens=1", f"data.truncation_side={side}"]) == 0
    assert "20 to 20 tokens" in capsys.readouterr().out
