"""The phases of a step add up to it, for every trainer; the parts of an update to the update."""

import json
from pathlib import Path

import pytest

from megatron_rl.metrics.timing import phases
from tests.dist.pool import Pool
from tests.loop.test_trainers import steps, train
from tests.models import tiny_model, tiny_tokenizer

COMMON = """
model: {path: model}
optim: {lr: 1e-4}
data: {train: train.jsonl, max_prompt_tokens: 12}
"""
ROLLOUTS = """
rollout: {group_size: 4, max_new_tokens: 24}
reward: {name: "judge.py:judge", workers: 1}
train: {steps: 4, batch_size: 8, mini_batches_per_step: 2}
"""
CONFIGS = {
    "sft": "average: {enabled: true}\ntrain: {steps: 4, batch_size: 32}\n",
    "expert_iteration": ROLLOUTS,
    "grpo": f"average: {{enabled: true}}\nkl: {{where: loss}}\nrollout_correction: {{level: token}}\n{ROLLOUTS}",
    "sdpo": f"reprompt: {{feedback: always}}\nteacher: {{every: step}}\n{ROLLOUTS}",
    "ppo": ROLLOUTS,
    "gad": f"discriminator: {{sft_steps: 1, warmup_steps: 1}}\n{ROLLOUTS}",
}
# What an update consists of, at the least, and what some trainers' policies have beside it.
PARTS = {"plan", "forward_backward", "forward_backward/reduce_gradients", "optimizer"}
MORE_PARTS = {"sft": {"average"}, "grpo": {"average", "smoothing"}, "sdpo": {"average", "teacher"}}

JUDGE = '''
from megatron_rl.types import Reward

def judge(prompt, rollout):
    """1 for a first token with an even number."""
    return Reward(value=float(rollout.token_ids[0] % 2 == 0), feedback="w50 w51")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a million parameters that ends most responses, and tasks for all trainers."""
    folder = tmp_path_factory.mktemp("timing")
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    tiny_tokenizer(tiny_model(folder / "model", vocab_size=400, **sizes), 400)
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 12))}))
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": "", "response": " ".join(["w9"] * 24)} for i in range(30, 94)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(JUDGE)
    for trainer, options in CONFIGS.items():
        (folder / f"{trainer}.yaml").write_text(f"trainer: {trainer}\n{COMMON}{options}")
    return folder


def parts(row: dict[str, float], phase: str) -> dict[str, float]:
    within = f"timing_s/{phase}/"
    return {name.removeprefix(within): row[name] for name in row if name.startswith(within)}


@pytest.mark.parametrize("trainer", CONFIGS)
def test_phases_add_up_to_the_step(pool: Pool, folder: Path, trainer: str) -> None:
    """To 98% or more, and never to more than it; so do an update's parts to 95%."""
    pool.run(train, 2, str(folder), f"{trainer}.yaml", ["parallel.dp=2", f"run.dir=runs/{trainer}"])
    rows = steps(folder / "runs" / trainer)[-4:]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(sum(phases(row).values()) <= row["timing_s/step"] for row in rows)
    whole = sum(row["timing_s/step"] for row in rows)
    assert sum(sum(phases(row).values()) for row in rows) >= 0.98 * whole, rows
    assert all(
        {"samples", "metrics"} | ({"gen", "sync"} if trainer != "sft" else set()) <= phases(row).keys() for row in rows
    )
    assert any("parity" in phases(row) for row in rows) == (trainer != "sft")
    for update in ("update_actor", "update_critic"):
        updated = [(row, parts(row, update)) for row in rows if update in phases(row)]
        assert (update == "update_actor" or trainer in ("ppo", "gad")) == bool(updated)
        for _, found in updated:
            assert found.keys() >= PARTS | (MORE_PARTS.get(trainer, set()) if update == "update_actor" else set())
            assert 0 < found["forward_backward/reduce_gradients"] < found["forward_backward"]
        covered = sum(seconds for _, found in updated for name, seconds in found.items() if "/" not in name)
        whole = sum(row[f"timing_s/{update}"] for row, _ in updated)
        assert 0.95 * whole <= covered <= whole, updated
