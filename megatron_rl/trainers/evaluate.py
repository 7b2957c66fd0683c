"""Held-out problems: greedy accuracy, what answers are worth in classes, and pass@k from several draws."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

from megatron_rl.rollout.engine import Sampling
from megatron_rl.trainers.parts import Parts, score
from megatron_rl.types import Prompt, Reward, RolloutGroup
from megatron_rl.workers.sharded_model import ShardedModel

# The second entry of a random stream's key, so that training steps and evaluations never share numbers.
TRAINING, EVALUATION, PROBE = 0, 1, 2

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


def estimates_at_k(correct: Sequence[int], draws: int, k: int) -> list[float]:
    """1 - C(n - c, k) / C(n, k) of each problem: unbiased from n draws, c of them right (Chen et al., 2021)."""
    return [1.0 - comb(draws - c, k) / comb(draws, k) for c in correct]


def pass_at_k(correct: Sequence[int], draws: int, k: int) -> float:
    """The mean of the estimates over problems."""
    return fmean(estimates_at_k(correct, draws, k))


def counted_draws(draws: int) -> list[int]:
    """Each k of which pass@k is told: powers of two, and all draws."""
    return sorted({2**power for power in range(draws.bit_length()) if 2**power <= draws} | {draws})


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """What counts of a greedy answer."""

    reward: Reward
    tokens: int
    truncated: bool


def held_out_figures(name: str, greedy: Sequence[Greedy], correct: Sequence[int], draws: int) -> dict[str, float]:
    """The figures of an evaluation, as `name`/*. `correct` counts the right ones of each problem's `draws`."""
    rewards = [answer.reward for answer in greedy]
    return {
        f"{name}/accuracy": sum(map(is_correct, rewards)) / len(rewards),
        **{f"{name}/{kind}": share for kind, share in class_shares(rewards).items()},
        f"{name}/response_length": sum(answer.tokens for answer in greedy) / len(greedy),
        f"{name}/truncated": sum(answer.truncated for answer in greedy) / len(greedy),
        f"{name}/reward_failed": float(sum(reward.reason is not None for reward in rewards)),
        **{f"{name}/pass@{k}": pass_at_k(correct, draws, k) for k in (counted_draws(draws) if draws else [])},
    }


class Evaluator:
    """Answers the held-out prompts with a model's current weights."""

    def __init__(self, parts: Parts, prompts: Sequence[Prompt]) -> None:
        self.parts = parts
        self.prompts = list(prompts)[: parts.config.eval.limit]

    def answer(
        self, step: int, first: int = 0, end: int | None = None
    ) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
        """The greedy answers to the prompts from `first` to before `end`, and the drawn ones if any are asked for."""
        config, prompts = self.parts.config, self.prompts[first:end]

        def answers(draws: int, temperature: float) -> list[RolloutGroup]:
            sampling = Sampling(
                group_size=draws,
                max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
                temperature=temperature,
                top_p=config.rollout.top_p,
                top_k=config.rollout.top_k,
                stop=tuple(config.rollout.stop),
                seed=config.eval.seed,
                stream=(EVALUATION, step),
                first=first,
            )
            return score(self.parts.pool, self.parts.generate(prompts, sampling))

        greedy = answers(1, 0.0)
        return greedy, answers(config.eval.samples, config.rollout.temperature) if config.eval.samples else []

    def __call__(
        self, step: int, model: ShardedModel, *, name: str = "val", version: int | None = None
    ) -> tuple[dict[str, float], list[RolloutGroup]]:
        """`val/*`, and the greedy answers. `version` numbers the weights where the model's own does not. Collective."""
        self.parts.push(model, version)
        groups, drawn = self.answer(step)
        greedy = [
            Greedy(reward=reward, tokens=len(rollout.token_ids), truncated=rollout.finish_reason == "length")
            for group in groups
            for rollout, reward in zip(group.rollouts, group.rewards)
        ]
        correct = [sum(map(is_correct, group.rewards)) for group in drawn]
        return held_out_figures(name, greedy, correct, self.parts.config.eval.samples), groups
