"""Held-out problems: greedy accuracy, and pass@k from several draws."""

from collections.abc import Sequence
from math import comb

from megatron_rl.config.rules import Config
from megatron_rl.rollout.engine import Sampling
from megatron_rl.rollout.sync import push
from megatron_rl.trainers.parts import Parts, score
from megatron_rl.types import Prompt, Reward, RolloutGroup

# The second entry of a random stream's key, so that training steps and evaluations never share numbers.
TRAINING, EVALUATION = 0, 1


def is_correct(reward: Reward) -> bool:
    """Full marks in the part called "accuracy", or in the whole where there is no such part. Failures are wrong."""
    return reward.reason is None and reward.parts.get("accuracy", reward.value) >= 1.0


def pass_at_k(correct: Sequence[int], draws: int, k: int) -> float:
    """Mean of 1 - C(n - c, k) / C(n, k) over problems: unbiased from n draws, c of them right (Chen et al., 2021)."""
    return sum(1.0 - comb(draws - c, k) / comb(draws, k) for c in correct) / len(correct)


class Evaluator:
    """Answers the held-out prompts with the actor's current weights."""

    def __init__(self, parts: Parts, prompts: Sequence[Prompt]) -> None:
        self.parts, self.engine, self.pool = parts, parts.engine, parts.pool
        self.prompts = list(prompts)[: parts.config.eval.limit]

    def _answer(self, config: Config, step: int, *, draws: int, temperature: float) -> list[RolloutGroup]:
        sampling = Sampling(
            group_size=draws,
            max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
            temperature=temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            seed=config.train.seed,
            stream=(EVALUATION, step),
        )
        return score(self.pool, self.engine.generate(self.prompts, sampling))

    def __call__(self, step: int) -> tuple[dict[str, float], list[RolloutGroup]]:
        """`val/*`, and the greedy answers. Collective."""
        config, actor = self.parts.config, self.parts.actor
        push(actor.named_hf_weights, self.engine, actor.version)
        greedy = self._answer(config, step, draws=1, temperature=0.0)
        rollouts = [group.rollouts[0] for group in greedy]
        rewards = [group.rewards[0] for group in greedy]
        metrics = {
            "val/accuracy": sum(map(is_correct, rewards)) / len(rewards),
            "val/response_length": sum(len(rollout.token_ids) for rollout in rollouts) / len(rollouts),
            "val/truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
            "val/reward_failed": float(sum(reward.reason is not None for reward in rewards)),
        }
        if draws := config.eval.samples:
            drawn = self._answer(config, step, draws=draws, temperature=config.rollout.temperature)
            correct = [sum(map(is_correct, group.rewards)) for group in drawn]
            for k in sorted({2**power for power in range(draws.bit_length()) if 2**power <= draws} | {draws}):
                metrics[f"val/pass@{k}"] = pass_at_k(correct, draws, k)
        return metrics, greedy
