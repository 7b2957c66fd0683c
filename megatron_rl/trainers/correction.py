"""Rollout correction in the trainer: samples in, samples with importance weights and narrower loss masks out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_rl.algorithms import rollout_correction
from megatron_rl.algorithms.rollout_correction import Criterion
from megatron_rl.config.schema import CorrectionLevel, RolloutCorrectionConfig
from megatron_rl.data.samples import Sample
from megatron_rl.types import RolloutGroup

WEIGHTS = "rollout_weights"


def is_corrected(config: RolloutCorrectionConfig) -> bool:
    """Whether anything compares the engine's policy with the one that the update starts from."""
    return config.level is not CorrectionLevel.none or bool(config.reject) or config.bypass


def with_rollout_log_probs(samples: Sequence[Sample], groups: Sequence[RolloutGroup]) -> list[Sample]:
    """The engine's log-probabilities under the whole softmax, as the field `rollout_log_probs`."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return [
        sample.with_field("rollout_log_probs", torch.tensor(rollout.log_probs) + torch.tensor(rollout.log_kept_mass))
        for sample, rollout in zip(samples, rollouts, strict=True)
    ]


def correct(samples: Sequence[Sample], config: RolloutCorrectionConfig) -> tuple[list[Sample], dict[str, float]]:
    """Rejects tokens, weighs the rest, and says what was done, over the whole rollout batch."""
    old, drawn, ids = _flat(samples)
    figures = rollout_correction.off_policy_metrics(old, drawn, ids, len(samples))
    criteria = read_criteria(config.reject)
    keep = rollout_correction.rejection_mask(old - drawn, ids, len(samples), criteria)
    if criteria:
        figures |= rollout_correction.rejection_metrics(old - drawn, ids, len(samples), criteria)
    if config.level is CorrectionLevel.none:
        weights = torch.ones_like(old)
    else:
        options: dict[str, Any] = {
            "level": config.level.value,
            "high": config.high,
            "low": config.low,
            "normalize": config.normalize,
        }
        weights = rollout_correction.importance_weights(old - drawn, ids, len(samples), **options)
        figures |= rollout_correction.importance_metrics(old - drawn, ids, len(samples), **options)
    corrected = []
    for number, sample in enumerate(samples):
        sample = sample.with_loss_field(WEIGHTS, weights[ids == number])
        mask = sample.loss_mask.clone()
        mask[sample.loss_mask] = keep[ids == number]
        corrected.append(replace(sample, loss_mask=mask))
    return corrected, figures


def _flat(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Old and rollout log-probabilities [N] of all loss-bearing tokens, and their samples' places [N]."""
    old, drawn = (
        torch.cat([sample.fields[name][sample.loss_mask].double() for sample in samples])
        for name in ("old_log_probs", "rollout_log_probs")
    )
    counts = torch.tensor([int(sample.loss_mask.sum()) for sample in samples])
    return old, drawn, torch.arange(len(samples)).repeat_interleave(counts)


def read_criteria(reject: dict[str, Any]) -> list[Criterion]:
    """From `{seq_mean_k3: 0.1, token_k1: [0.5, 2]}`; ValueError names what cannot be."""
    criteria = []
    for name, bound in reject.items():
        name = str(name)  # YAML's keys may be numbers
        level, _, statistic = name.rpartition("_")
        levels, statistics = (get_args(Criterion.__annotations__[key]) for key in ("level", "statistic"))
        low, high = bound if isinstance(bound, list) and len(bound) == 2 else (None, bound)
        fits = level in levels and statistic in statistics and (level, statistic) != ("seq_max", "k1")
        if not fits:
            raise ValueError(
                f"rollout_correction.reject has {name!r}; write a level ({', '.join(levels)}) and a statistic "
                f"({', '.join(statistics)}), such as seq_mean_k3; seq_max_k1 is none"
            )
        bounds = [high] if low is None else [high, low]
        numbers = all(type(value) in (int, float) and 0 < value < 2**63 for value in bounds)
        if (
            not numbers
            or (low is not None and (statistic != "k1" or low > high))
            or (low is None and statistic == "k1" and high < 1)
        ):
            raise ValueError(
                f"rollout_correction.reject.{name}={bound!r} must be a number above 0 (for k1 at least 1), "
                "or for k1 [low, high] ratios"
            )
        criteria.append(Criterion(level, statistic, *map(float, bounds)))  # type: ignore[arg-type]
    return criteria
