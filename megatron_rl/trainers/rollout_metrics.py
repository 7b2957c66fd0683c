"""What a rollout batch looks like, under the names that users of verl know."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, pstdev

from torch import Tensor

from megatron_rl.data.samples import Sample
from megatron_rl.rewards.pool import count_failures
from megatron_rl.trainers.evaluate import is_correct
from megatron_rl.types import RolloutGroup


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, largest and smallest, where there are any."""
    if not values:
        return {}
    return {f"{name}/mean": fmean(values), f"{name}/max": max(values), f"{name}/min": min(values)}


def rollout_metrics(groups: Sequence[RolloutGroup], advantages: Tensor | None = None) -> dict[str, float]:
    """Rewards and their parts, failures by kind, lengths; advantages, where answers are compared."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [reward for group in groups for reward in group.rewards]
    judged = [reward for reward in rewards if reward.reason is None]
    lengths = [float(len(rollout.token_ids)) for rollout in rollouts]
    parts = sorted({name for reward in judged for name in reward.parts})
    failures = count_failures(rewards)
    tokens = sum(lengths) + sum(len(group.prompt.token_ids) * len(group.rollouts) for group in groups)
    figures = {
        **summary("critic/score", [reward.value for reward in judged]),
        **summary("critic/advantages", [] if advantages is None else advantages.tolist()),
        **{f"reward/{name}": fmean(r.parts[name] for r in judged if name in r.parts) for name in parts},
        **{f"reward/failed/{kind}": float(count) for kind, count in sorted(failures.items())},
        "reward/failed": float(len(rewards) - len(judged)),
        **summary("response_length", lengths),
        "response_length/clip_ratio": fmean(rollout.finish_reason == "length" for rollout in rollouts),
        **summary("prompt_length", [float(len(group.prompt.token_ids)) for group in groups]),
        "rollout/correct": fmean(map(is_correct, rewards)),
        "rollout/entropy": -fmean(log_prob for rollout in rollouts for log_prob in rollout.log_probs),
        "perf/total_num_tokens": tokens,
    }
    if judged:
        figures["critic/score/std"] = pstdev(reward.value for reward in judged)
    if len({group.prompt.index for group in groups}) > 1:
        figures["rollout/commonest_response"] = _commonest([rollout.text for rollout in rollouts])
    return figures


def _commonest(texts: Sequence[str]) -> float:
    """The share of the commonest text."""
    return Counter(texts).most_common(1)[0][1] / len(texts)


def sample_records(groups: Sequence[RolloutGroup], samples: Sequence[Sample]) -> list[dict[str, float | None]]:
    """What a step's samples were, one record each; the reward is null where there was none."""
    pairs = [(rollout, reward) for group in groups for rollout, reward in zip(group.rollouts, group.rewards)]
    return [
        {
            "id": sample.id,
            "prompt": rollout.prompt_index,
            "sample": rollout.sample_index,
            "prompt_length": sample.prompt_length,
            "response_length": sample.response_length,
            "reward": reward.value if reward.reason is None else None,
        }
        for (rollout, reward), sample in zip(pairs, samples, strict=True)
    ]


def rollout_histograms(groups: Sequence[RolloutGroup], advantages: Tensor | None = None) -> dict[str, list[float]]:
    """What is worth seeing as a distribution."""
    histograms = {
        "response_length": [float(len(rollout.token_ids)) for group in groups for rollout in group.rollouts],
        "critic/score": [r.value for group in groups for r in group.rewards if r.reason is None],
    }
    return histograms if advantages is None else histograms | {"critic/advantages": advantages.tolist()}
