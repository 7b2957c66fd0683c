"""From rewards to advantages: what length and distance cost, and the comparison within the group."""

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from megatron_rl.algorithms import advantages
from megatron_rl.algorithms.kl import kl
from megatron_rl.algorithms.overlong import overlong_penalty
from megatron_rl.config.schema import Advantage, AlgorithmConfig, KLConfig, KLPlace, PolicyConfig, PolicyGradientConfig
from megatron_rl.data.samples import Sample
from megatron_rl.types import RolloutGroup


def reward_values(groups: Sequence[RolloutGroup]) -> Tensor:
    """One reward per rollout [n] float64, groups one after the other; NaN where it could not be judged."""
    return torch.tensor([reward.value for group in groups for reward in group.rewards], dtype=torch.float64)


def outcome_rewards(
    config: PolicyConfig, groups: Sequence[RolloutGroup], samples: Sequence[Sample]
) -> tuple[Tensor, dict[str, float]]:
    """Rewards [n] float64, less what length costs where the config says so."""
    algorithm = config.algorithm
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
    return rewards, metrics


def shaped_rewards(
    config: PolicyConfig, groups: Sequence[RolloutGroup], samples: Sequence[Sample]
) -> tuple[Tensor, dict[str, float]]:
    """Rewards [n] float64, less what length and distance to the reference cost where the config says so."""
    rewards, metrics = outcome_rewards(config, groups, samples)
    if isinstance(config, PolicyGradientConfig) and config.kl.where is KLPlace.reward:
        penalties, figures = kl_penalties(config.kl, samples)
        return rewards - torch.stack([penalty.sum() for penalty in penalties]), metrics | figures
    return rewards, metrics


def token_rewards(
    config: PolicyGradientConfig, groups: Sequence[RolloutGroup], samples: Sequence[Sample]
) -> tuple[Tensor, dict[str, float]]:
    """Rewards of the loss-bearing tokens of all samples [N] float64: the outcome's at the last token of each.

    Where the config says so, each token loses what its own distance to the reference costs.
    """
    rewards, metrics = outcome_rewards(config, groups, samples)
    values = at_last_tokens(rewards, torch.tensor([int(sample.loss_mask.sum()) for sample in samples]))
    if config.kl.where is KLPlace.reward:
        penalties, figures = kl_penalties(config.kl, samples)
        return values - torch.cat(penalties), metrics | figures
    return values, metrics


def at_last_tokens(rewards: Tensor, lengths: Tensor) -> Tensor:
    """[N] float64, zero but at the last of the `lengths` [n] tokens of each sequence; one without tokens has none."""
    values = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    held = lengths > 0
    values[lengths.cumsum(0)[held] - 1] = rewards[held]
    return values


def kl_penalties(settings: KLConfig, samples: Sequence[Sample]) -> tuple[list[Tensor], dict[str, float]]:
    """Per sample, what the distance to the reference costs at each loss-bearing token, float64."""
    distances = sample_kl(samples, settings.estimator.value)
    means = [float(distance.mean()) for distance in distances if distance.numel()]
    return [settings.coeff * distance for distance in distances], {
        "actor/reward_kl_penalty": fmean(means) if means else math.nan,
        "actor/reward_kl_penalty_coeff": settings.coeff,
    }


def sample_kl(samples: Sequence[Sample], estimator: str) -> list[Tensor]:
    """Per sample, the distance of the policy that drew it to the reference at each loss-bearing token, float64."""
    distances = []
    for sample in samples:
        drawn_from, kept_near = (
            sample.fields[name][sample.loss_mask].double() for name in ("old_log_probs", "ref_log_probs")
        )
        distances.append(kl(drawn_from, kept_near, estimator))
    return distances


def with_advantages(
    config: AlgorithmConfig,
    groups: Sequence[RolloutGroup],
    samples: Sequence[Sample],
    rewards: Tensor,
    greedy: Tensor | None,
) -> tuple[list[Sample], Tensor]:
    """The samples with the field `advantages`, and all of these [n] or [N] for the logs.

    `rewards` [n] are one per rollout, groups one after the other; so are those of the `greedy` answers, for ReMax.
    """
    ids = torch.tensor([i for i, group in enumerate(groups) for _ in group.rewards])
    lengths = torch.tensor([int(sample.loss_mask.sum()) for sample in samples])
    match config.advantage:
        case Advantage.reinforce_plus_plus | Advantage.reinforce_plus_plus_baseline:
            values = _token_advantages(config, rewards, ids, lengths)
            parts = values.split(lengths.tolist())
            return [s.with_loss_field("advantages", part) for s, part in zip(samples, parts, strict=True)], values
        case Advantage.grpo:
            values = advantages.grpo(rewards, ids, normalize_by_std=bool(config.normalize_by_std))
        case Advantage.pass_at_k:
            values = advantages.pass_at_k(rewards, ids, normalize_by_std=bool(config.normalize_by_std))
        case Advantage.rloo:
            values = advantages.rloo(rewards, ids)
        case Advantage.opo:
            values = advantages.opo(rewards, ids, lengths)
        case Advantage.gpg:
            values = advantages.gpg(rewards, ids)
        case _:
            assert config.advantage is Advantage.remax and greedy is not None, config.advantage
            values = advantages.remax(rewards, greedy)
    return [s.with_constant("advantages", value) for s, value in zip(samples, values.tolist(), strict=True)], values


def _token_advantages(config: AlgorithmConfig, rewards: Tensor, group_ids: Tensor, lengths: Tensor) -> Tensor:
    """[N] over the loss-bearing tokens of all samples, whitened over all of them."""
    sequence_ids = torch.arange(len(lengths)).repeat_interleave(lengths)
    if config.advantage is Advantage.reinforce_plus_plus_baseline:
        return advantages.reinforce_plus_plus_baseline(rewards, group_ids, sequence_ids)
    return advantages.reinforce_plus_plus(at_last_tokens(rewards, lengths), sequence_ids, gamma=config.discount)
