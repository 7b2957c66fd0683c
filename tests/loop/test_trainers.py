"""Whole runs from the command line, small: they learn, log, stop and continue, and export what they say they did."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


def megatron_rl(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Runs the command as a user would; it starts torchrun by itself."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rl", *arguments],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def comparable(row: dict) -> dict:
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
    """The model after a short supervised run on two tensor-parallel ranks."""
    megatron_rl(
        "train", f"{QUICKSTART}/sft.yaml", "parallel.tp=2", "train.steps=90", "eval.every=0", "eval.limit=200", cwd=place
    )
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
    assert [row["step"] for row in rows] == list(range(91))
    assert rows[0]["val/accuracy"] == 0.0
    assert rows[-1]["sft/loss"] < 0.5 * rows[1]["sft/loss"]
    assert rows[-1]["val/accuracy"] > 0.05
    held_out = place / "runs" / "quickstart" / "data" / "heldout.jsonl"
    assert greedy_accuracy(warm_start / "hf", held_out, 200) == pytest.approx(rows[-1]["val/accuracy"], abs=1e-9)
    assert {path.name for path in (warm_start / "tensorboard").iterdir()}


GRPO_NAMES = """
    actor/entropy actor/grad_norm actor/loss actor/lr actor/pg_clipfrac actor/pg_clipfrac_lower actor/pg_loss
    actor/ppo_kl critic/advantages/max critic/advantages/mean critic/advantages/min critic/score/max critic/score/mean
    critic/score/min perf/time_per_step perf/throughput perf/total_num_tokens prompt_length/mean response_length/clip_ratio
    response_length/max response_length/mean response_length/min reward/failed rollout/correct timing_s/adv timing_s/gen
    timing_s/reward timing_s/step timing_s/sync timing_s/update_actor
""".split()


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2"])
def test_a_continued_grpo_run_is_the_uninterrupted_one(place: Path, warm_start: Path, tmp_path: Path, layout: str) -> None:
    """Stopped after two of four steps and started again: every later figure and every weight is the same, bit for bit."""
    options = (
        "train",
        f"{QUICKSTART}/grpo.yaml",
        layout,
        "train.steps=4",
        "train.batch_size=8",
        "train.updates_per_step=2",
        "rollout.parity_every=2",
        "eval.every=2",
        "eval.limit=20",
        "eval.samples=4",
    )
    megatron_rl(*options, f"run.dir={tmp_path}/whole", cwd=place)
    megatron_rl(*options, f"run.dir={tmp_path}/parts", "run.stop_after=2", cwd=place)
    assert not (tmp_path / "parts" / "hf").exists()
    assert "continues after step 2" in megatron_rl(*options, f"run.dir={tmp_path}/parts", cwd=place)
    whole, parts = steps(tmp_path / "whole"), steps(tmp_path / "parts")
    assert [row["step"] for row in parts] == [0, 1, 2, 3, 4]
    for expected, found in zip(whole, parts, strict=True):
        gaps = {key for key in found if key.startswith("rollout/log_prob_gap")}
        assert {k: v for k, v in comparable(found).items() if k not in gaps} == {
            k: v for k, v in comparable(expected).items() if not k.startswith("rollout/log_prob_gap")
        }
    assert set(GRPO_NAMES) <= set(whole[1])
    assert {"val/accuracy", "val/pass@1", "val/pass@2", "val/pass@4", "rollout/log_prob_gap_max"} <= set(whole[2])
    assert whole[2]["rollout/log_prob_gap_max"] < 1e-4
    a, b = ((tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert a == b


def test_wrong_world_size_and_bad_layouts_are_said_before_training(place: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "megatron_rl", "train", f"{QUICKSTART}/sft.yaml", "parallel.tp=0"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (out.returncode, out.stderr) == (2, "megatron-rl: parallel.tp=0 must be greater than 0\n")
