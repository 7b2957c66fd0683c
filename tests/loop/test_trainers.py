"""Whole runs, small: they learn, log, stop and continue, survive bad rewards, and export what they say they did."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.pool import Pool

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """`megatron-rl` as a user calls it; it starts torchrun by itself."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_rl", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def train(cwd: str, config: str, overrides: list[str]) -> None:
    """The same run inside a worker that already has its imports behind it."""
    from megatron_rl.config.load import load_config
    from megatron_rl.trainers.run import run

    os.chdir(cwd)
    run(load_config(config, overrides))


def evaluate_run(cwd: str, config: str, overrides: list[str]) -> None:
    """`megatron-rl eval` inside a worker."""
    from megatron_rl.trainers.evaluation_config import evaluation_config
    from megatron_rl.trainers.evaluation_run import evaluate

    os.chdir(cwd)
    evaluate(evaluation_config(config, overrides=overrides).config)


def train_and_fail(cwd: str, config: str, overrides: list[str]) -> str:
    from megatron_rl.rollout.sync import ParityError

    with pytest.raises(ParityError) as caught:
        train(cwd, config, overrides)
    return str(caught.value)


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def comparable(row: dict) -> dict:
    """What must not depend on time."""
    return {key: value for key, value in row.items() if not key.startswith(("timing_s/", "perf/")) and key != "time"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quickstart's model, tokenizer and data."""
    sys.path.insert(0, str(QUICKSTART))
    import task

    folder = tmp_path_factory.mktemp("quickstart")
    base = folder / "runs" / "quickstart" / "base"
    base.mkdir(parents=True)
    task.make_tokenizer(base)
    task.make_model(base, 1)
    task.make_data(folder / "runs" / "quickstart" / "data", 1)
    return folder


@pytest.fixture(scope="module")
def warm_start(place: Path) -> Path:
    """The model after a short supervised run on two tensor-parallel ranks, from the command line."""
    overrides = ["parallel.tp=2", "train.steps=45", "eval.every=0", "eval.limit=200"]
    done = command("train", f"{QUICKSTART}/sft.yaml", *overrides, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    said = {line[:14].strip(): line[15:] for line in done.stdout.splitlines()}
    assert said["megatron_rl"].endswith("trainer sft; starts") and "megatron-core 0.16" in said["versions"]
    assert said["layout"] == "tp=2 pp=1 vpp=1 dp=1; 2 process(es)"
    assert said["model"] == "299,136 parameters, float32, runs/quickstart/base (pretrained)"
    # 4 bytes for each weight and its gradient, 8 for Adam; half of most tensors on either rank.
    assert said["memory"].startswith("weights, gradients and optimizer 0.002 GiB on this rank")
    assert done.stdout.splitlines()[-1].startswith("step 45/45  accuracy 0.")
    return place / "runs" / "quickstart" / "sft"


def greedy_accuracy(model: Path, data: Path, limit: int) -> float:
    """Held-out accuracy in plain transformers, one problem at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    rows = [json.loads(line) for line in data.read_text().splitlines()][:limit]
    right = 0
    for row in rows:
        ids = torch.tensor([tokenizer.encode(row["prompt"], add_special_tokens=False)])
        output = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
        right += tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == row["answer"]
    return right / len(rows)


def test_sft_learns_and_its_export_is_what_was_evaluated(place: Path, warm_start: Path) -> None:
    rows = steps(warm_start)
    assert [row["step"] for row in rows] == list(range(46))
    assert rows[0]["val/accuracy"] == 0.0
    assert rows[-1]["sft/loss"] < 0.5 * rows[1]["sft/loss"]
    assert rows[-1]["val/accuracy"] > 0.05
    held_out = place / "runs" / "quickstart" / "data" / "heldout.jsonl"
    assert greedy_accuracy(warm_start / "hf", held_out, 200) == pytest.approx(rows[-1]["val/accuracy"], abs=1e-9)
    assert list((warm_start / "tensorboard").iterdir())


GRPO_NAMES = """
    actor/entropy actor/grad_norm actor/loss actor/lr actor/pg_clipfrac actor/pg_clipfrac_lower actor/pg_loss
    actor/ppo_kl critic/advantages/max critic/advantages/mean critic/advantages/min critic/score/max
    critic/score/mean critic/score/min perf/time_per_step perf/throughput perf/total_num_tokens
    prompt_length/mean response_length/clip_ratio response_length/max response_length/mean
    response_length/min reward/failed rollout/correct timing_s/adv timing_s/gen timing_s/reward
    timing_s/step timing_s/sync timing_s/update_actor
"""

OPTION_NAMES = {
    "kl.where=loss": "actor/kl_loss actor/kl_coef timing_s/ref",
    "kl.where=reward": "actor/reward_kl_penalty actor/reward_kl_penalty_coeff timing_s/ref",
}


@pytest.mark.parametrize(
    ("layout", "option"),
    [
        ("parallel.tp=2", "kl.where=loss"),
        pytest.param("parallel.pp=2", "kl.where=reward", marks=pytest.mark.full),
        pytest.param("parallel.dp=2", "average.enabled=true", marks=pytest.mark.full),
    ],
)
def test_a_continued_grpo_run_is_the_uninterrupted_one(
    pool: Pool, place: Path, warm_start: Path, tmp_path: Path, layout: str, option: str
) -> None:
    """Stopped after two of four steps and started again: every later figure and weight is the same, bit for bit.

    So is what the checkpoint answers under another layout.
    """
    config = f"{QUICKSTART}/grpo.yaml"
    options = [
        layout,
        option,
        "train.epochs_per_step=2" if layout == "parallel.dp=2" else "train.epochs_per_step=1",
        "train.steps=4",
        "train.batch_size=8",
        "train.mini_batches_per_step=2",
        "rollout.parity_every=1",
        "eval.every=2",
        "eval.limit=20",
        "eval.samples=4",
    ]
    pool.run(train, 2, str(place), config, [*options, f"run.dir={tmp_path}/whole"])
    pool.run(train, 2, str(place), config, [*options, f"run.dir={tmp_path}/parts", "run.stop_after=2"])
    assert not (tmp_path / "parts" / "hf").exists()
    pool.run(train, 2, str(place), config, [*options, f"run.dir={tmp_path}/parts"])
    whole, parts = steps(tmp_path / "whole"), steps(tmp_path / "parts")
    assert [row["step"] for row in parts] == [0, 1, 2, 3, 4]
    for expected, found in zip(whole, parts, strict=True):
        assert comparable(found) == comparable(expected)
    assert set(GRPO_NAMES.split()) <= set(whole[1])
    assert {"val/accuracy", "val/pass@1", "val/pass@2", "val/pass@4"} <= set(whole[2])
    assert whole[2]["val/pass@1"] <= whole[2]["val/pass@2"] <= whole[2]["val/pass@4"]
    # Step 3 answers after an evaluation, which may have left an average in the engine.
    assert max(row["rollout/log_prob_gap_max"] for row in whole[2:]) < 1e-4
    assert set(OPTION_NAMES.get(option, "").split()) <= set(whole[1])
    assert whole[1]["actor/ratio_max"] > 1 and whole[4]["actor/lr"] < whole[1]["actor/lr"]
    assert (tmp_path / "whole" / "learning_curve.png").stat().st_size > 10_000
    assert not (tmp_path / "whole" / "alarms.jsonl").exists() and not (warm_start / "alarms.jsonl").exists()
    # An evaluation may ask with other options than the run was trained with.
    pool.run(evaluate_run, 1, str(place), config, [*options[1:], "eval.chunk=7", f"run.dir={tmp_path}/whole"])
    summary = json.loads((tmp_path / "whole" / "eval" / "step_00000004-heldout" / "summary.json").read_text())
    assert summary["weights"].endswith("step_00000004") and summary["val"]["problems"] == 20
    figures = summary["val"]["figures"] | summary.get("val_average", {}).get("figures", {})
    assert figures == {key: whole[4][key] for key in whole[4] if key.startswith(("val/", "val_average/"))}
    averaged = option == "average.enabled=true"
    for folder in ("hf", "hf_average") if averaged else ("hf",):
        a, b = ((tmp_path / name / folder / "model.safetensors").read_bytes() for name in ("whole", "parts"))
        assert a == b
    assert ("val_average/pass@4" in whole[2]) == (tmp_path / "whole" / "hf_average").is_dir() == averaged
    if averaged:
        check_average(place, tmp_path / "whole")
    if layout == "parallel.pp=2":
        # An average that begins in the middle begins with the weights there, and hardly moves at this rate.
        later = ["average.enabled=true", "average.rate=1e-9", "run.allow_changes=true", "train.steps=5"]
        later += [f"checkpoint.load={tmp_path}/whole", f"run.dir={tmp_path}/later"]
        pool.run(train, 2, str(place), config, [*options, *later])
        folders = (warm_start / "hf", tmp_path / "whole" / "hf", tmp_path / "later" / "hf_average")
        first, there, average = (load_file(folder / "model.safetensors") for folder in folders)
        for name, value in there.items():
            assert (average[name] - value).abs().max() < 1e-6 < (first[name] - value).abs().max(), name


def check_average(place: Path, run: Path) -> None:
    """It begins as the weights, goes its own way, and what was evaluated and saved is what was exported."""
    from megatron_rl.checkpoint.store import read_state

    rows = steps(run)
    for name in ("accuracy", "response_length", "truncated", "pass@1", "pass@4"):
        assert rows[0][f"val_average/{name}"] == rows[0][f"val/{name}"]
    weights, average = (load_file(run / folder / "model.safetensors") for folder in ("hf", "hf_average"))
    assert weights.keys() == average.keys()
    assert all(not torch.equal(weights[name], average[name]) for name in weights)
    held_out = place / "runs" / "quickstart" / "data" / "heldout.jsonl"
    found = greedy_accuracy(run / "hf_average", held_out, 20)
    assert found == pytest.approx(rows[-1]["val_average/accuracy"], abs=1e-9)
    assert set(read_state(run / "checkpoints" / "step_00000004")["models"]) == {"actor", "average"}


def train_aloud(cwd: str, config: str, overrides: list[str]) -> str:
    """What the run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(cwd, config, overrides)
    return said.getvalue()


def test_a_continued_sft_run_in_another_place_is_the_uninterrupted_one(pool: Pool, place: Path, tmp_path: Path) -> None:
    """With checkpoints written in the background; options that are others now are listed."""
    config = f"{QUICKSTART}/sft.yaml"
    options = ["parallel.dp=2", "train.steps=4", "train.batch_size=8", "eval.every=0", "eval.limit=2"]
    options += ["checkpoint.every=1", "checkpoint.background=true"]
    pool.run(train, 2, str(place), config, [*options, f"run.dir={tmp_path}/whole"])
    pool.run(train, 2, str(place), config, [*options, f"run.dir={tmp_path}/parts", "run.stop_after=2"])
    elsewhere = [*options, f"run.dir={tmp_path}/other", f"checkpoint.load={tmp_path}/parts", "log.histograms_every=3"]
    said = pool.run(train_aloud, 2, str(place), config, elsewhere)[0].splitlines()
    assert "changed        log.histograms_every: 10 -> 3" in said
    assert said[0].endswith("trainer sft; continues after step 2")
    whole, other = steps(tmp_path / "whole"), steps(tmp_path / "other")
    assert [comparable(row) for row in other] == [comparable(row) for row in whole[3:]]
    a, b = ((tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "other"))
    assert a == b
    for name, kept in (("whole", (3, 4)), ("parts", (1, 2)), ("other", (3, 4))):
        found = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
        assert found == ["latest", *(f"step_{step:08d}" for step in kept)], name


def test_layouts_take_the_same_steps(pool: Pool, place: Path, warm_start: Path, tmp_path: Path) -> None:
    """One seed, three layouts: the same rollouts, rewards and, to rounding, the same first updates."""
    found = {}
    for layout in ("tp", "pp", "dp"):
        options = [f"parallel.{layout}=2", "train.steps=2", "train.batch_size=16", "eval.limit=1"]
        options += ["train.mini_batches_per_step=2", "ema.axis=token"]
        pool.run(train, 2, str(place), f"{QUICKSTART}/grpo.yaml", [*options, f"run.dir={tmp_path}/{layout}"])
        found[layout] = steps(tmp_path / layout)
    for layout in ("pp", "dp"):
        for row, expected in zip(found[layout][1:], found["tp"][1:], strict=True):
            assert row["critic/score/mean"] == expected["critic/score/mean"]
            assert row["actor/grad_norm"] == pytest.approx(expected["actor/grad_norm"], rel=1e-3)
            assert row["actor/entropy"] == pytest.approx(expected["actor/entropy"], rel=1e-4)
            smoothed = {name: value for name, value in expected.items() if name.startswith("ema/")}
            # Ratios and small differences of variances magnify rounding.
            assert len(smoothed) == 26
            for name, value in smoothed.items():
                assert row[name] == pytest.approx(value, rel=2e-2, abs=1e-5), name


REWARDS = '''
import os, time

def moody(prompt, rollout):
    """Judges one response; others hang, raise, crash, or are not a number."""
    fate = (prompt.index + rollout.sample_index) % 5
    if fate == 1:
        time.sleep(60)
    if fate == 2:
        raise RuntimeError("no mood")
    if fate == 3:
        return float("nan")
    return float(len(rollout.token_ids) % 2)
'''


def test_bad_rewards_cost_their_samples_only(pool: Pool, place: Path, warm_start: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(REWARDS)
    options = [
        "parallel.tp=2",
        "train.steps=2",
        "train.batch_size=2",
        "rollout.group_size=5",
        "eval.limit=1",
        f"reward.name={tmp_path}/judge.py:moody",
        "reward.deadline_s=0.5",
        "algorithm.name=gspo",
        "model.dtype=bfloat16",
        f"run.dir={tmp_path}/run",
    ]
    pool.run(train, 2, str(place), f"{QUICKSTART}/grpo.yaml", options)
    for row in steps(tmp_path / "run")[1:]:
        assert row["reward/failed"] == 6
        assert row["reward/failed/timeout"] == row["reward/failed/error"] == row["reward/failed/not_finite"] == 2
        assert row["actor/skipped"] == 0 and row["actor/grad_norm"] >= 0


def test_a_run_whose_engine_disagrees_stops_and_says_why(
    pool: Pool, place: Path, warm_start: Path, tmp_path: Path
) -> None:
    options = ["train.batch_size=2", "rollout.parity_tolerance=1e-12", "eval.limit=1", f"run.dir={tmp_path}/run"]
    for said in pool.run(train_and_fail, 2, str(place), f"{QUICKSTART}/grpo.yaml", ["parallel.dp=2", *options]):
        assert said.startswith("the engine's log-probabilities differ from the trainer's by up to")
    assert [row["step"] for row in steps(tmp_path / "run")] == [0]


def test_reasoning_gym_with_a_chat_template(pool: Pool, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    from tests.models import ascii_tokenizer, tiny_model

    model = tiny_model(tmp_path / "model", "qwen2", tied=True, vocab_size=ascii_tokenizer(tmp_path / "model"))
    (tmp_path / "task.yaml").write_text(
        f"""
trainer: grpo
model: {{path: {model}}}
data:
  train: reasoning-gym:chain_sum
  task: {{size: 50, seed: 1, max_terms: 2, max_digits: 1}}
  val: reasoning-gym:chain_sum
  val_task: {{size: 4, seed: 2, max_terms: 2, max_digits: 1}}
  max_prompt_tokens: 120
reward: {{name: reasoning, workers: 1}}
rollout: {{group_size: 2, max_new_tokens: 4}}
train: {{steps: 2, batch_size: 4, max_tokens_per_micro_batch: 256}}
eval: {{samples: 2}}
run: {{dir: run}}
"""
    )
    pool.run(train, 2, str(tmp_path), "task.yaml", ["parallel.pp=2"])
    rows = steps(tmp_path / "run")
    assert rows[1]["prompt_length/max"] > 40 and rows[1]["reward/failed"] == 0
    assert "val/pass@2" in rows[2]
