"""Rewards of responses, and what each is worth against the others of its group."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import grpo

RewardFunction = Callable[[str, str], Mapping[str, float]]  # of a response and its ground truth; has the key "reward"


def compute_group_normalized_rewards(
    reward_fn: RewardFunction,
    rollout_responses: Sequence[str],
    repeated_ground_truths: Sequence[str],
    group_size: int,
    advantage_eps: float,
    normalize_by_std: bool,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Advantages [B], raw rewards [B], and figures for the log.

    The answers to one prompt lie together, `group_size` of them, and the ground truth is repeated for each. With the
    mean and the unbiased standard deviation of the group,

        A_i = (r_i - mean) / (std + advantage_eps)    or, without `normalize_by_std`,    A_i = r_i - mean

    Statistics are in float64, by the trainers' own function. So equal rewards have advantages of exactly 0, and so has
    a group of one, whose standard deviation does not exist; a reward of NaN is in no statistic, and its advantage is 0.

    The figures are the rewards' `mean`, `std`, `min` and `max`, the share of groups whose rewards do not differ
    (`silent_groups`), and the mean of every other number that `reward_fn` returns, under its name.
    """
    count = len(rollout_responses)
    if count != len(repeated_ground_truths):
        raise ValueError(
            f"there are {count} rollout_responses and {len(repeated_ground_truths)} repeated_ground_truths: "
            "repeat the ground truth of a prompt for each of its responses"
        )
    if group_size < 1 or count == 0 or count % group_size:
        raise ValueError(f"{count} rollout_responses do not make whole groups of group_size={group_size}")
    scores = [reward_fn(response, truth) for response, truth in zip(rollout_responses, repeated_ground_truths)]
    for row, score in enumerate(scores):
        if not isinstance(score, Mapping) or "reward" not in score:
            raise ValueError(f'reward_fn gave {score!r} for response {row}: return a dict with the key "reward"')
    raw_rewards = torch.tensor([float(score["reward"]) for score in scores])
    groups = torch.arange(count) // group_size
    advantages = grpo(raw_rewards, groups, normalize_by_std=normalize_by_std, eps=advantage_eps)
    return advantages.to(raw_rewards.dtype), raw_rewards, _figures(raw_rewards, group_size, scores)


def _figures(rewards: Tensor, group_size: int, scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    groups = rewards.view(-1, group_size)
    others: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.items():
            if name != "reward" and isinstance(value, int | float):
                others.setdefault(name, []).append(value)
    return {
        **{name: fmean(values) for name, values in others.items()},
        "mean": float(rewards.mean()),
        "std": float(rewards.std(correction=0)),
        "min": float(rewards.min()),
        "max": float(rewards.max()),
        "silent_groups": float((groups.amin(1) == groups.amax(1)).float().mean()),
    }
