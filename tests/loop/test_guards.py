"""Whole runs with something broken on purpose: the guard meant for it fires at its step, and none before."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.pool import Pool
from tests.models import tiny_model, tiny_tokenizer

CONFIG = """
trainer: grpo
model: {path: model}
optim: {lr: 1e-5}
data: {train: train.jsonl, max_prompt_tokens: 6}
train: {steps: 1, batch_size: 4}
rollout: {group_size: 4, max_new_tokens: 40, parity_every: 0}
reward: {name: "judge.py:judge", workers: 1}
checkpoint: {keep: 1}
run: {dir: run}
"""

SELF_DISTILLATION = """
distill: {topk: 90}
reprompt: {reprompt_template: "{solution}{feedback}{prompt}", solution_template: "{successful_previous_attempt} "}
"""

JUDGE = '''
import os

def judge(prompt, rollout):
    """1 for a first token with an even number, and much more in a spoilt judgement."""
    return (1e4 if os.path.exists("spoilt") else 1.0) * (rollout.token_ids[0] % 2 == 0)

def constant(prompt, rollout):
    return 0.5
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends a response at every fifth token or so, and a task that it can learn."""
    folder = tmp_path_factory.mktemp("guarded")
    tiny_tokenizer(tiny_model(folder / "model"), 99)
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 22))}))
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": ""} for i in range(30, 60)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(JUDGE)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "sdpo.yaml").write_text(CONFIG.replace("grpo", "sdpo") + SELF_DISTILLATION)
    return folder


AGAIN = 1  # calls of `generate` beside one a step: prompts that the parity probe asks again at the second


def of_rank(rank: int) -> bool:
    import torch.distributed as dist

    return dist.get_rank() == rank


def after(patch: pytest.MonkeyPatch, owner: Any, name: str, first: int, change: Callable[..., Any]) -> None:
    """From its `first` call on, what the method returns goes through `change(self, result)`."""
    original, calls = getattr(owner, name), []

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        calls.append(1)
        return change(self, result) if len(calls) >= first else result

    patch.setattr(owner, name, changed)


def with_rollouts(groups: list, **changes: Any) -> list:
    """Every rollout with other fields."""
    return [replace(g, rollouts=tuple(replace(r, **changes) for r in g.rollouts)) for g in groups]


def nothing(patch: pytest.MonkeyPatch) -> None:
    """A healthy run."""


def babbling_engine(patch: pytest.MonkeyPatch) -> None:
    """From step 12 on every prompt gets one text, which does not end and of which the engine is certain."""
    from megatron_rl.rollout.hf_engine import HFEngine

    same = {"token_ids": (51,) * 40, "text": "w51", "log_probs": (0.0,) * 40, "log_kept_mass": (0.0,) * 40}
    after(
        patch, HFEngine, "generate", 12 + AGAIN, lambda _, groups: with_rollouts(groups, **same, finish_reason="length")
    )


def lying_engine(patch: pytest.MonkeyPatch) -> None:
    """From step 6 on responses are cut before their end and said to have stopped; log-probabilities are made up."""
    from megatron_rl.rollout.hf_engine import HFEngine

    lies = {"token_ids": (51, 50), "log_probs": (-20.0, -20.0), "log_kept_mass": (0.0, 0.0), "finish_reason": "stop"}
    after(patch, HFEngine, "generate", 6 + AGAIN, lambda _, groups: with_rollouts(groups, **lies))


def spoilt_judgement(patch: pytest.MonkeyPatch) -> None:
    """At step 12 rewards are ten thousand times what they were."""
    from megatron_rl.rollout.hf_engine import HFEngine

    def spoil(_: Any, groups: list) -> list:
        Path("spoilt").touch()
        return groups

    after(patch, HFEngine, "generate", 12 + AGAIN, spoil)


def hot_updates(patch: pytest.MonkeyPatch) -> None:
    """From step 6 on the learning rate is far above what it was."""
    from megatron_rl.workers.model_worker import ModelWorker

    def heat(worker: Any, metrics: Any) -> Any:
        for group in worker.optimizer.param_groups:
            group["lr"] = 0.03
        return metrics

    after(patch, ModelWorker, "forward_backward", 6, heat)


def sick_rank(patch: pytest.MonkeyPatch) -> None:
    """From step 3 on one rank has a NaN among its gradients."""
    from megatron_rl.workers.model_worker import ModelWorker

    def poison(worker: Any, metrics: Any) -> Any:
        if of_rank(1):
            next(worker.models[0].parameters()).main_grad.view(-1)[0] = math.nan
        return metrics

    after(patch, ModelWorker, "forward_backward", 3, poison)


def wrong_samples(patch: pytest.MonkeyPatch) -> None:
    """Loss masks begin a token early, and the last token of every sample is another."""
    from megatron_rl.data.samples import Sample
    from megatron_rl.trainers import rollouts

    def sample(number: int, prompt: tuple, response: tuple) -> Sample:
        tokens = torch.tensor([*prompt, *response[:-1], 1])
        mask = torch.ones(len(response) + 1, dtype=torch.bool)
        return Sample(id=number, token_ids=tokens, prompt_length=len(prompt) - 1, loss_mask=mask, fields={})

    patch.setattr(rollouts, "from_example", sample)


def rounding_engine(patch: pytest.MonkeyPatch) -> None:
    """The engine of one rank keeps a tensor in bfloat16."""
    from megatron_rl.rollout.hf_engine import HFEngine

    def round_one(engine: Any, _: None) -> None:
        if of_rank(1):
            weight = engine.model.lm_head.weight.data
            weight.copy_(weight.bfloat16())

    after(patch, HFEngine, "load_weights", 2, round_one)


def other_log_probs(patch: pytest.MonkeyPatch) -> None:
    """Old log-probabilities are one nat too low, and the distance to the reference has the wrong sign."""
    from megatron_rl.workers import objective
    from megatron_rl.workers.sharded_model import ShardedModel

    after(patch, ShardedModel, "log_probs", 1, lambda _, found: {key: value - 1 for key, value in found.items()})
    right = objective.kl
    patch.setattr(objective, "kl", lambda *args, **kwargs: -right(*args, **kwargs))


def same_prompt(patch: pytest.MonkeyPatch) -> None:
    """The teacher reads what the student reads."""
    from megatron_rl.trainers import sdpo

    patch.setattr(sdpo, "_after", lambda prompt_ids, sample: sample)


def strange_teacher(patch: pytest.MonkeyPatch) -> None:
    """From step 3 on the teacher is certain of something else."""
    from megatron_rl.workers.teacher import Teacher

    def spoil(_: Any, found: Any) -> Any:
        targets, other = found
        return replace(targets, hidden={key: -30 * value for key, value in targets.hidden.items()}), other

    after(patch, Teacher, "targets", 3, spoil)


def broken_run(cwd: str, config: str, plant: str, overrides: list[str]) -> tuple[str, list]:
    """Why the run ended early, if it did; and every figure that depends on no clock, as this rank's guards got it."""
    from megatron_rl.config.load import load_config
    from megatron_rl.rollout.sync import WeightSyncError
    from megatron_rl.trainers.guards import GuardError, Guards
    from megatron_rl.trainers.run import run

    os.chdir(cwd)
    seen: list = []
    call = Guards.__call__

    def listen(self: Any, step: int, figures: dict, samples: Any) -> None:
        timeless = {key: value for key, value in figures.items() if not key.startswith(("timing_s/", "perf/"))}
        seen.append((step, repr(timeless)))
        call(self, step, figures, samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guards, "__call__", listen)
        globals()[plant](patch)
        try:
            run(load_config(config, overrides))
        except (GuardError, WeightSyncError) as error:
            return f"{type(error).__name__}: {error}", seen
    return "", seen


def broken(
    pool: Pool,
    folder: Path,
    plant: Callable,
    layout: str,
    steps: int,
    *options: str,
    name: str = "",
    config: str = "config.yaml",
) -> tuple[str, dict[str, int], Path]:
    """Why it ended, the first step of each rule's alarms, and the run directory. All ranks agree on everything."""
    directory = folder / "runs" / (name or plant.__name__)
    overrides = [f"parallel.{layout}=2", f"train.steps={steps}", f"run.dir={directory}", *options]
    (error, seen), (other, also_seen) = pool.run(broken_run, 2, str(folder), config, plant.__name__, overrides)
    assert error == other and seen == also_seen
    return error, first_alarms(directory), directory


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def first_alarms(directory: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in lines(directory / "alarms.jsonl"):
        found.setdefault(row["rule"], row["step"])
    return found


UNCHECKED = "rollout.parity_tolerance=100"  # the fault would be found as a difference of log-probabilities


def test_a_babbling_engine(pool: Pool, folder: Path) -> None:
    """Eleven healthy steps raise nothing. What lasts three steps, or moves a mean of ten, is said then."""
    error, alarms, _ = broken(pool, folder, babbling_engine, "dp", 17)
    assert error == ""
    at_once = ("same_response", "truncated", "length_runaway", "constant_reward", "silent_groups")
    assert alarms == dict.fromkeys((*at_once, "entropy_collapse", "entropy_low"), 14) | dict.fromkeys(
        ("reward_fall", "zero_reward", "constant_length"), 16
    )


def test_a_lying_engine(pool: Pool, folder: Path) -> None:
    error, alarms, directory = broken(pool, folder, lying_engine, "tp", 7)
    assert error == ""
    assert alarms == {"finish_mismatch": 6, "entropy_jump": 6, "entropy_high": 7, "entropy_explosion": 7}
    row = lines(directory / "alarms.jsonl")[0]
    assert row["message"].startswith("step 6: finish_mismatch: audit/finish_mismatch is 16, above 0. Likely cause: the")
    assert (row["figure"], row["value"], row["threshold"], row["action"]) == ("audit/finish_mismatch", 16, 0, "warn")


def test_a_gradient_spike_shows_its_samples(pool: Pool, folder: Path) -> None:
    (folder / "spoilt").unlink(missing_ok=True)
    error, alarms, directory = broken(pool, folder, spoilt_judgement, "pp", 12, "algorithm.name=dr_grpo")
    (folder / "spoilt").unlink()
    assert error == "" and alarms == {"grad_spike": 12}
    (alarm,) = lines(directory / "alarms.jsonl")
    rows = lines(directory / "metrics.jsonl")
    assert alarm["value"] == rows[-1]["actor/grad_norm"] > 1000 * max(row["actor/grad_norm"] for row in rows[:-1])
    samples = json.loads((directory / alarm["samples"]).read_text())
    assert [sample["id"] for sample in samples] == list(range(16))
    assert [sample["sample"] for sample in samples] == [0, 1, 2, 3] * 4
    assert {sample["reward"] for sample in samples} == {0.0, 1e4}
    mean = sum(sample["response_length"] for sample in samples) / 16
    assert mean == pytest.approx(rows[-1]["response_length/mean"])


def test_updates_that_are_too_hot(pool: Pool, folder: Path) -> None:
    """With a rate as high as this, a decay as strong leaves little of the weights."""
    options = ["optim.weight_decay=30", "rollout.temperature=0.2", "optim.lr=1e-7"]
    error, alarms, directory = broken(pool, folder, hot_updates, "dp", 8, *options)
    assert error == "" and alarms == {"entropy_jump": 7, "entropy_explosion": 8}
    assert {row["figure"] for row in lines(directory / "alarms.jsonl")} == {"actor/entropy", "rollout/entropy"}


def test_a_rank_with_gradients_that_are_not_finite(pool: Pool, folder: Path) -> None:
    """Updates are left out and counted; after three in a row every rank stops, and nothing is saved."""
    error, alarms, directory = broken(pool, folder, sick_rank, "tp", 8, "checkpoint.every=1")
    assert error.startswith("GuardError: step 5: skipped_in_a_row: actor/skipped is 1, above 0 on 3 steps in a row.")
    assert alarms == {"skipped_update": 3, "skipped_in_a_row": 5}
    rows = lines(directory / "metrics.jsonl")
    assert [row["actor/skipped"] for row in rows] == [0, 0, 1, 1, 1]
    assert [row["actor/grad_norm"] is None for row in rows] == [False, False, True, True, True]
    assert all(row["actor/entropy"] is not None for row in rows)  # the weights are what they were
    assert (directory / "checkpoints" / "latest").read_text() == "step_00000004\n"
    assert len(json.loads((directory / "samples_00000003.json").read_text())) == 16


def test_samples_that_are_not_the_rollouts(pool: Pool, folder: Path) -> None:
    error, alarms, _ = broken(pool, folder, wrong_samples, "tp", 3, UNCHECKED)
    assert error.startswith("GuardError: step 1: prompt_loss: audit/prompt_loss is 16, above 0. Likely cause: the loss")
    assert "; step 1: token_mismatch: audit/token_mismatch is 16, above 0." in error
    assert alarms == {"prompt_loss": 1, "token_mismatch": 1}


def test_an_engine_that_rounds(pool: Pool, folder: Path) -> None:
    error, _, directory = broken(pool, folder, rounding_engine, "pp", 3)
    assert error.startswith("WeightSyncError: after the sync of policy version 1 1 of 39 tensors in the engine are not")
    assert "lm_head.weight. Likely cause: the engine dropped, permuted or rounded what it was sent." in error
    (row,) = lines(directory / "metrics.jsonl")
    assert row["sync/wrong_tensors"] == 0


def test_distances_below_zero(pool: Pool, folder: Path) -> None:
    options = ["kl.where=loss", "train.epochs_per_step=2", UNCHECKED]
    error, alarms, directory = broken(pool, folder, other_log_probs, "dp", 1, *options)
    assert error == "" and alarms == {"negative_kl": 1, "negative_ppo_kl": 1}
    values = {row["figure"]: row["value"] for row in lines(directory / "alarms.jsonl")}
    assert values["actor/ppo_kl"] == pytest.approx(-1, abs=0.05)
    assert values["actor/kl_loss"] == pytest.approx(-math.exp(-1), abs=0.05)  # k3 of a nat, with the other sign


@pytest.fixture(scope="module")
def padded_with_eos(folder: Path) -> str:
    """The model with a tokenizer that pads with what ends a response."""
    model = folder / "padded"
    shutil.copytree(folder / "model", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>"}))
    return f"model.path={model}"


def test_a_constant_reward_and_a_continued_run(pool: Pool, folder: Path, padded_with_eos: str) -> None:
    """A run that is stopped, or killed after its checkpoint, goes on to raise the alarms of the uninterrupted one."""
    options = [padded_with_eos, "reward.name=judge.py:constant"]
    error, alarms, whole = broken(pool, folder, nothing, "tp", 4, *options, name="whole")
    assert error == "" and alarms == {"pad_is_eos": 1, "silent_groups": 3, "constant_reward": 3}
    broken(pool, folder, nothing, "tp", 4, *options, "run.stop_after=2", name="parts")
    with (folder / "runs" / "parts" / "alarms.jsonl").open("a") as alarms_of_a_lost_step:
        alarms_of_a_lost_step.write('{"step": 3, "rule": "lost"}\n')
    _, _, parts = broken(pool, folder, nothing, "tp", 4, *options, name="parts")
    assert lines(parts / "alarms.jsonl") == lines(whole / "alarms.jsonl")


def test_rules_can_be_switched_off_and_made_to_stop(pool: Pool, folder: Path, padded_with_eos: str) -> None:
    options = [padded_with_eos, "reward.name=judge.py:constant", "guards.ignore=[pad_is_eos,weight_checksum]"]
    options += ["guards.stop=[silent_groups]", "guards.limits.constant_reward=-1"]
    error, alarms, directory = broken(pool, folder, nothing, "dp", 4, *options, name="chosen")
    assert error.startswith("GuardError: step 3: silent_groups: rollout/silent_groups is 1, above 0.95")
    assert alarms == {"silent_groups": 3}
    assert "sync/wrong_tensors" not in lines(directory / "metrics.jsonl")[0]


@pytest.mark.parametrize(
    ("plant", "layout", "options", "expected"),
    [
        (nothing, "tp", [], {}),
        pytest.param(same_prompt, "dp", ["teacher.mode=live"], {"teacher_is_student": 3}, marks=pytest.mark.full),
        pytest.param(strange_teacher, "tp", [], {"teacher_is_lost": 5}, marks=pytest.mark.full),
        (
            nothing,
            "pp",
            ["reward.name=judge.py:constant"],
            {"no_targets": 3, "constant_reward": 3, "unearned_reward": 5},
        ),
        (nothing, "dp", ["distill.topk=2"], {"topk_mass_low": 3}),
    ],
    ids=["healthy", "same_prompt", "strange_teacher", "no_success", "short_list"],
)
def test_self_distillation(
    pool: Pool, folder: Path, plant: Callable, layout: str, options: list[str], expected: dict[str, int]
) -> None:
    name = f"sdpo_{plant.__name__}_{layout}"
    error, alarms, _ = broken(pool, folder, plant, layout, 5, *options, name=name, config="sdpo.yaml")
    assert error == "" and alarms == expected


def test_a_student_that_leaves_its_list(pool: Pool, folder: Path) -> None:
    options = ["optim.weight_decay=30", "rollout.temperature=0.2", "optim.lr=1e-7", "distill.topk=20"]
    options.append("guards.ignore=[teacher_is_lost]")  # a random model makes noise of its context
    error, alarms, _ = broken(pool, folder, hot_updates, "dp", 9, *options, name="sdpo_hot", config="sdpo.yaml")
    assert error == ""
    assert alarms == {"entropy_jump": 7, "entropy_explosion": 8, "topk_mass_fall": 9, "topk_mass_low": 9}
