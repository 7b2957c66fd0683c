"""From rewards to advantages: what length and distance cost, and the comparison within the group."""

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from megatron_rl.algorithms import advantages
from megatron_rl.algorithms.kl import kl
from megatron_rl.algorithms.overlong import overlong_penalty
from megatron_rl.config.schema import GrpoConfig, KLPlace
from megatron_rl.data.samples import Sample
from megatron_rl.types import RolloutGroup


def reward_values(groups: Sequence[RolloutGroup]) -> Tensor:
    """One reward per rollout [n] float64, groups one after the other; NaN where it could not be judged."""
    return torch.tensor([reward.value for group in groups for reward in group.rewards], dtype=torch.float64)


def shaped_rewards(
    config: GrpoConfig, groups: Sequence[RolloutGroup], samples: Sequence[Sample]
) -> tuple[Tensor, dict[str, float]]:
    """Rewards [n] float64, less what length and distance to the reference cost where the config says so."""
    algorithm, settings = config.algorithm, config.kl
    rewards = reward_values(groups)
    metrics: dict[str, float] = {}
    if algorithm.overlong_buffer:
        penalty = overlong_penalty(
            torch.tensor([sample.response_length for sample in samples]),
            max_length=config.rollout.max_new_tokens,
            buffer=algorithm.overlong_buffer,
            factor=algorithm.overlong_factor,
        )
        rewards = rewards + penalty
        metrics |= {"reward/overlong": float(penalty.mean()), "rollout/overlong": fmean((penalty < 0).tolist())}
    if settings.where is KLPlace.reward:
        distances = sample_kl(samples, settings.estimator.value)
        rewards = rewards - settings.coeff * torch.stack([distance.sum() for distance in distances])
        means = [float(distance.mean()) for distance in distances if distance.numel()]
        metrics |= {
            "actor/reward_kl_penalty": fmean(means) if means else math.nan,
            "actor/reward_kl_penalty_coeff": settings.coeff,
        }
    return rewards, metrics


def sample_kl(samples: Sequence[Sample], estimator: str) -> list[Tensor]:
    """Per sample, the distance of the policy that drew it to the reference at each loss-bearing token, float64."""
    distances = []
    for sample in samples:
        drawn_from, kept_near = (
            sample.fields[name][sample.loss_mask].double() for name in ("old_log_probs", "ref_log_probs")
        )
        distances.append(kl(drawn_from, kept_near, estimator))
    return distances


def group_advantages(groups: Sequence[RolloutGroup], rewards: Tensor, *, normalize_by_std: bool) -> Tensor:
    """One advantage per rollout [n] float64, groups one after the other."""
    group_ids = torch.tensor([i for i, group in enumerate(groups) for _ in group.rewards])
    return advantages.grpo(rewards, group_ids, normalize_by_std=normalize_by_std)
