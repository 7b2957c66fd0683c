"""Whole runs of a mixture of experts: learning does not see the layout; a continued run is the uninterrupted one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.pool import Pool
from tests.loop.test_trainers import QUICKSTART, comparable, greedy_accuracy, place, steps, train  # noqa: F401

# Of a model that knows nothing no answer is right, but some begin with a digit.
REWARD = """
from megatron_rl.types import Prompt, Reward, Rollout

def digit(prompt: Prompt, rollout: Rollout) -> Reward:
    return Reward(value=float(rollout.text[:1].isdigit()))
"""
EXPERT_PARALLEL = ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2"]


@pytest.fixture(scope="module")
def mixture(place: Path) -> Path:  # noqa: F811
    """A Qwen3 of eight experts, two to a token, with the quickstart's tokenizer."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    base, directory = place / "runs" / "quickstart" / "base", place / "mixture"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


def test_experts_learn_the_same_wherever_they_lie(pool: Pool, place: Path, mixture: Path, tmp_path: Path) -> None:  # noqa: F811
    """Fine-tuned on one rank, and with its experts on two: the same losses, and a model that transformers reads."""
    options = [f"model.path={mixture}", "train.steps=12", "optim.eps=1e-5", "eval.every=0", "eval.limit=40"]
    runs = {}
    for name, world, layout in (("one", 1, []), ("two", 2, EXPERT_PARALLEL)):
        overrides = [*options, *layout, f"run.dir={tmp_path}/{name}"]
        pool.run(train, world, str(place), f"{QUICKSTART}/sft.yaml", overrides)
        runs[name] = steps(tmp_path / name)
    losses = {name: [row["sft/loss"] for row in rows[1:]] for name, rows in runs.items()}
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4) and losses["one"][-1] < 0.9 * losses["one"][0]
    one, two = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in runs)
    start = load_file(mixture / "model.safetensors")
    assert start.keys() == one.keys() == two.keys()
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() < 1e-4 < (start[name] - weight).abs().max(), name
    held_out = place / "runs" / "quickstart" / "data" / "heldout.jsonl"
    found = greedy_accuracy(tmp_path / "two" / "hf", held_out, 40)
    assert found == pytest.approx(runs["two"][-1]["val/accuracy"], abs=1e-9)


def test_a_continued_run_is_the_uninterrupted_one(pool: Pool, place: Path, mixture: Path, tmp_path: Path) -> None:  # noqa: F811
    """GRPO with a reference, the engine asked for parity at every step; bit for bit."""
    options = [f"model.path={mixture}", *EXPERT_PARALLEL, "kl.where=loss", "train.steps=3", "train.batch_size=8"]
    (tmp_path / "digit.py").write_text(REWARD)
    options += [
        f"reward.name={tmp_path}/digit.py:digit",
        "rollout.parity_every=1",
        "eval.every=0",
        "eval.limit=4",
        "average.enabled=true",
    ]
    config = f"{QUICKSTART}/grpo.yaml"
    pool.run(train, 2, str(place), config, [*options, f"run.dir={tmp_path}/whole"])
    pool.run(train, 2, str(place), config, [*options, f"run.dir={tmp_path}/parts", "run.stop_after=1"])
    pool.run(train, 2, str(place), config, [*options, f"run.dir={tmp_path}/parts"])
    whole, parts = steps(tmp_path / "whole"), steps(tmp_path / "parts")
    assert [comparable(row) for row in parts] == [comparable(row) for row in whole]
    assert max(row["rollout/log_prob_gap_max"] for row in whole[1:]) < 1e-4
    assert all(row["actor/grad_norm"] > 0 for row in whole[1:])
    for folder in ("hf", "hf_average"):
        a, b = ((tmp_path / name / folder / "model.safetensors").read_bytes() for name in ("whole", "parts"))
        assert a == b
