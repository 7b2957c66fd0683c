"""Whole runs of expert iteration, small: they learn, stop and continue, keep the best weights, and survive nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.pool import Pool
from tests.loop.test_trainers import comparable, steps, train, train_aloud
from tests.models import tiny_model, tiny_tokenizer

CONFIG = """
trainer: expert_iteration
model: {path: model}
optim: {lr: 6e-3, schedule: linear}
data: {train: train.jsonl, val: train.jsonl, max_prompt_tokens: 6}
train: {steps: 4, batch_size: 8, mini_batches_per_step: 2, epochs_per_step: 2}
rollout: {group_size: 4, max_new_tokens: 12, parity_every: 2}
reward: {name: "judge.py:judge", workers: 1}
expert: {min_tokens: 2}
eval: {every: 1, limit: 6}
checkpoint: {best: val/accuracy}
run: {dir: run}
"""

JUDGE = '''
def judge(prompt, rollout):
    """1 for a first token with an even number."""
    return float(rollout.token_ids[0] % 2 == 0)

def harsh(prompt, rollout):
    return 0.0
'''

FIGURES = """
    expert/kept expert/kept_fraction expert/solved_prompts expert/duplicates expert/updates sft/loss sft/nll
    actor/entropy actor/grad_norm actor/lr critic/score/mean rollout/correct rollout/entropy response_length/clip_ratio
    sync/wrong_tensors audit/token_mismatch perf/throughput timing_s/gen timing_s/reward timing_s/update_actor
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends a response at every fifth token or so, and a task that it can learn."""
    folder = tmp_path_factory.mktemp("expert")
    tiny_tokenizer(tiny_model(folder / "model"), 99)
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 22))}))
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": ""} for i in range(30, 60)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(JUDGE)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("tp", ["rollout.stop=[w7]"]),
        pytest.param("pp", ["expert.keep=top", "expert.top_k=2"], marks=pytest.mark.full),
        pytest.param(
            "dp",
            ["average.enabled=true", "train.aggregation=seq-mean-token-sum-norm", "train.normalizer=12.5"],
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_continued_run_is_the_uninterrupted_one(
    pool: Pool, folder: Path, tmp_path: Path, layout: str, options: list[str]
) -> None:
    """Every figure and weight bit for bit, those of the best evaluation too; in another directory besides."""
    options = [f"parallel.{layout}=2", *options]
    pool.run(train, 2, str(folder), "config.yaml", [*options, f"run.dir={tmp_path}/whole"])
    pool.run(train, 2, str(folder), "config.yaml", [*options, f"run.dir={tmp_path}/parts", "run.stop_after=2"])
    elsewhere = [f"run.dir={tmp_path}/other", f"checkpoint.load={tmp_path}/parts"]
    pool.run(train, 2, str(folder), "config.yaml", [*options, *elsewhere])
    whole, parts, other = (steps(tmp_path / name) for name in ("whole", "parts", "other"))
    assert [comparable(row) for row in parts + other] == [comparable(row) for row in whole]
    assert set(FIGURES.split()) <= set(whole[1])
    for row in whole[1:]:
        assert 0 < row["expert/kept"] <= 32 and row["expert/kept_fraction"] == row["expert/kept"] / 32
        assert row["expert/updates"] == 4 and row["actor/skipped"] == 0
        assert row["audit/token_mismatch"] == row["audit/finish_mismatch"] == 0
        assert row["expert/kept"] + row["expert/duplicates"] <= 32 * row["rollout/correct"] or "top" in str(options)
    assert whole[4]["val/accuracy"] > whole[0]["val/accuracy"]
    assert whole[2]["rollout/log_prob_gap_max"] < 1e-4 and "rollout/log_prob_gap_max" not in whole[3]
    best = max(whole, key=lambda row: row["val/accuracy"])  # the first of equals
    expected = {"step": best["step"], "figure": "val/accuracy", "value": best["val/accuracy"]}
    folders = ["hf", "hf_best", *(["hf_average"] if "average.enabled=true" in options else [])]
    for name in ("whole", "other"):
        assert json.loads((tmp_path / name / "best.json").read_text()) == expected
        assert sorted(path.name for path in (tmp_path / name).glob("hf*")) == sorted(folders)
    for weights in folders:
        a, b = ((tmp_path / name / weights / "model.safetensors").read_bytes() for name in ("whole", "other"))
        assert a == b
    final, kept = (load_file(tmp_path / "whole" / name / "model.safetensors") for name in ("hf", "hf_best"))
    assert all(torch.equal(final[name], kept[name]) for name in final) == (best["step"] == 4)


def test_where_nothing_is_kept_nothing_moves(pool: Pool, folder: Path, tmp_path: Path) -> None:
    """And it is said. The rate stays where it is, for the schedule counts updates."""
    options = ["parallel.dp=2", "reward.name=judge.py:harsh", "eval.every=0", f"run.dir={tmp_path}"]
    said = pool.run(train_aloud, 2, str(folder), "config.yaml", options)[0]
    assert "step 4/4  reward 0" in said
    rows = steps(tmp_path)
    for row in rows[1:]:
        assert row["expert/kept"] == row["expert/kept_fraction"] == row["expert/solved_prompts"] == 0
        assert row["expert/updates"] == 0 and "sft/loss" not in row and "actor/skipped" not in row
    alarms = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert {row["rule"]: row["step"] for row in alarms} == {"constant_reward": 3, "nothing_kept": 3}
    before, after = load_file(folder / "model" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)
    # What was there before the first step is the best, and stays it.
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 0, "figure": "val/accuracy", "value": 0.0}


def train_and_refuse(cwd: str, config: str, overrides: list[str]) -> str:
    with pytest.raises(ValueError) as caught:
        train(cwd, config, overrides)
    return str(caught.value)


def test_a_best_that_is_no_figure_is_refused_at_the_first_evaluation(pool: Pool, folder: Path, tmp_path: Path) -> None:
    options = ["checkpoint.best=val/acc", f"run.dir={tmp_path}"]
    (said,) = pool.run(train_and_refuse, 1, str(folder), "config.yaml", options)
    assert said.startswith("checkpoint.best='val/acc' is no figure of this run's evaluations: val/accuracy, ")
