"""Held-out problems: greedy accuracy, and pass@k from several draws."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from math import comb
from pathlib import Path

import torch.distributed as dist

from megatron_rl.checkpoint.store import read_state
from megatron_rl.config.rules import Config, ConfigError
from megatron_rl.metrics.progress import progress
from megatron_rl.parallel.mesh import create_mesh, destroy_mesh
from megatron_rl.parallel.watchdog import watch
from megatron_rl.rollout.engine import Sampling
from megatron_rl.trainers.average import averaged_role
from megatron_rl.trainers.data import held_out_prompts
from megatron_rl.trainers.parts import Parts, score
from megatron_rl.trainers.resume import latest_checkpoint
from megatron_rl.types import Prompt, Reward, RolloutGroup
from megatron_rl.workers.sharded_model import ShardedModel

# The second entry of a random stream's key, so that training steps and evaluations never share numbers.
TRAINING, EVALUATION = 0, 1

# Format and answer right; the format alone; neither.
CLASSES = ("correct", "format_only", "format_wrong")


def is_correct(reward: Reward) -> bool:
    """Full marks in the part called "accuracy", or in the whole where there is no such part. Failures are wrong."""
    return reward.reason is None and reward.parts.get("accuracy", reward.value) >= 1.0


def answer_class(reward: Reward) -> str:
    """One of `CLASSES`, by full marks in the parts "accuracy" (or the value) and "format" (or none, which is right).

    A right answer in a wrong form counts as `format_wrong`, and so does a response that could not be judged.
    """
    if reward.reason is not None or reward.parts.get("format", 1.0) < 1.0:
        return "format_wrong"
    return "correct" if is_correct(reward) else "format_only"


def class_shares(rewards: Sequence[Reward]) -> dict[str, float]:
    """The share of each class; they add up to 1."""
    counts = Counter(map(answer_class, rewards))
    return {name: counts[name] / len(rewards) for name in CLASSES}


def pass_at_k(correct: Sequence[int], draws: int, k: int) -> float:
    """Mean of 1 - C(n - c, k) / C(n, k) over problems: unbiased from n draws, c of them right (Chen et al., 2021)."""
    return sum(1.0 - comb(draws - c, k) / comb(draws, k) for c in correct) / len(correct)


class Evaluator:
    """Answers the held-out prompts with a model's current weights."""

    def __init__(self, parts: Parts, prompts: Sequence[Prompt]) -> None:
        self.parts = parts
        self.prompts = list(prompts)[: parts.config.eval.limit]

    def _answer(self, config: Config, step: int, *, draws: int, temperature: float) -> list[RolloutGroup]:
        sampling = Sampling(
            group_size=draws,
            max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
            temperature=temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop=tuple(config.rollout.stop),
            seed=config.eval.seed,
            stream=(EVALUATION, step),
        )
        return score(self.parts.pool, self.parts.engine.generate(self.prompts, sampling))

    def __call__(
        self, step: int, model: ShardedModel, *, name: str = "val", version: int | None = None
    ) -> tuple[dict[str, float], list[RolloutGroup]]:
        """`val/*`, and the greedy answers. `version` numbers the weights where the model's own does not. Collective."""
        config = self.parts.config
        self.parts.push(model, version)
        greedy = self._answer(config, step, draws=1, temperature=0.0)
        rollouts = [group.rollouts[0] for group in greedy]
        rewards = [group.rewards[0] for group in greedy]
        metrics = {
            f"{name}/accuracy": sum(map(is_correct, rewards)) / len(rewards),
            **{f"{name}/{kind}": share for kind, share in class_shares(rewards).items()},
            f"{name}/response_length": sum(len(rollout.token_ids) for rollout in rollouts) / len(rollouts),
            f"{name}/truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
            f"{name}/reward_failed": float(sum(reward.reason is not None for reward in rewards)),
        }
        if draws := config.eval.samples:
            drawn = self._answer(config, step, draws=draws, temperature=config.rollout.temperature)
            correct = [sum(map(is_correct, group.rewards)) for group in drawn]
            for k in sorted({2**power for power in range(draws.bit_length()) if 2**power <= draws} | {draws}):
                metrics[f"{name}/pass@{k}"] = pass_at_k(correct, draws, k)
        return metrics, greedy


def evaluate(config: Config) -> None:
    """Answers the held-out problems once, with the run's latest checkpoint or what it would start from. Collective.

    Where the checkpoint has an average of the weights, that answers too.
    """
    mesh = create_mesh(**asdict(config.parallel), seed=config.train.seed)
    try:
        with watch(config.run.hang_timeout_s), closing(Parts(config)) as parts:
            model = ShardedModel(config.model, mesh)
            checkpoint = latest_checkpoint(config)
            if checkpoint is not None:
                model.load_checkpoint(checkpoint)
            held_out = held_out_prompts(config, parts.tokenizer)
            if held_out is None:
                raise ConfigError("eval needs held-out problems: set data.val")
            step = int(read_state(checkpoint)["step"]) if checkpoint is not None else 0
            evaluator = Evaluator(parts, held_out.all())
            with progress.phase("testing"):
                metrics, answers = evaluator(step, model)
            if checkpoint is not None and (role := averaged_role(checkpoint)) is not None:
                model.load_checkpoint(checkpoint, role)
                with progress.phase("testing"):
                    metrics |= evaluator(step, model, name="val_average", version=model.version + 1)[0]
            if dist.get_rank() == 0:
                _report(Path(config.run.dir), str(checkpoint or config.model.weights), step, metrics, answers)
    finally:
        destroy_mesh()


def _report(run_dir: Path, weights: str, step: int, metrics: dict[str, float], answers: Sequence[RolloutGroup]) -> None:
    """Prints the figures, and writes them with every greedy answer."""
    rows = [
        {
            "prompt": group.prompt.text,
            "response": group.rollouts[0].text,
            "reward": group.rewards[0].value if group.rewards[0].reason is None else None,
            "reason": group.rewards[0].reason,
        }
        for group in answers
    ]
    path = run_dir / f"eval_{step:08d}.json"
    run_dir.mkdir(parents=True, exist_ok=True)
    report = {"weights": weights, "step": step, "metrics": metrics, "answers": rows}
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"{len(rows)} held-out problems, weights {weights}")
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"  {name:<{width}} {value:.4g}")
    print(f"answers in {path}", flush=True)
