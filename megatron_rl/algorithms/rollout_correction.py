"""Correction of rollouts that were not drawn from the policy which the update starts from.

The engine that samples and the trainer that learns disagree about the same weights, or the engine has older ones. With

    d_t = old_logp_t - rollout_logp_t    ("log_ratio")

importance weights change how much a token's loss counts (they multiply it after the clip), and masks leave out what is
too far off. All of it is computed once per rollout batch, on the whole batch and before any update; nothing here has a
gradient. Tensors are flat [N] over the tokens that bear loss, `sequence_ids` [N] int64 are below `num_sequences`, and
all tokens of a sequence must be present. A sequence without tokens counts nowhere. Sums and means are in float64.

The figures have verl's names and definitions, but for its empty sequences, which count as weight 0 and perplexity 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0
_MIN_NORM = 1e-8
_PREFIX = "rollout_corr"

Level = Literal["token", "sequence"]


# Importance weights


def importance_weights(
    log_ratio: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    level: Level,
    high: float,
    low: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """Weights [N] from w = exp(clamp(d_t, -20, 20)), or from w = exp(clamp(sum_{t in i} d_t, -20, 20)) by sequence.

        min(w, high)                         without `low`: truncated importance sampling (TIS), Yao et al., "Your
                                             Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025
        w if low <= w <= high, otherwise 0   with `low`: IcePop (Ling Team, arXiv 2510.18855)

    A token's weight is biased and of low variance, a sequence's is unbiased but for the cut (Liu et al., "When Speed
    Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch", 2025). `normalize` then divides
    by the mean over tokens, or over sequences that have any; not where that is below 1e-8.
    """
    weights = _cut(_ratio(log_ratio, sequence_ids, num_sequences, level), high, low)
    if normalize:
        weights = weights / _norm(weights, sequence_ids, num_sequences, level)
    return weights.to(log_ratio.dtype)


def _ratio(log_ratio: Tensor, sequence_ids: Tensor, num_sequences: int, level: Level) -> Tensor:
    assert level in ("token", "sequence"), level
    difference = log_ratio.detach().double()
    if level == "sequence":
        difference = _sequence_sum(difference, sequence_ids, num_sequences)[sequence_ids]
    return _bounded(difference).exp()


def _cut(ratio: Tensor, high: float, low: float | None) -> Tensor:
    if low is None:
        assert high > 0, high
        return ratio.clamp(max=high)
    assert 0 < low <= high, (low, high)
    return ratio.where((ratio >= low) & (ratio <= high), 0.0)


def _norm(weights: Tensor, sequence_ids: Tensor, num_sequences: int, level: Level) -> float:
    if weights.numel() == 0:
        return 1.0
    if level == "sequence":
        weights = _sequence_mean(weights, sequence_ids, num_sequences)[_present(sequence_ids, num_sequences)]
    mean = _mean(weights)
    return mean if mean > _MIN_NORM else 1.0


# Rejection


@dataclass(frozen=True, slots=True)
class Criterion:
    """What a token or a sequence must pass to be kept: a statistic of x = clamp(d_t, -20, 20), within bounds.

        k1 = -x               log(low) <= k1 <= log(high); without `low` it is 1 / high
        k2 = x^2 / 2          k2 <= high
        k3 = exp(x) - 1 - x   k3 <= high

    per token, or as the sum, mean or maximum (k2 and k3 only) over the tokens of a sequence. These are the estimators
    of KL(rollout || old) of Schulman (2020). The bounds of k1 are on the ratio rollout / old, the inverse of the
    importance weight, as they are in verl.
    """

    level: Literal["token", "seq_sum", "seq_mean", "seq_max"]
    statistic: Literal["k1", "k2", "k3"]
    high: float
    low: float | None = None

    def __post_init__(self) -> None:
        assert self.low is None or (self.statistic == "k1" and self.low > 0), self
        # k1 is signed, so its maximum would miss the outliers of one side.
        assert (self.level, self.statistic) != ("seq_max", "k1"), self
        low, high = self.bounds
        assert self.high > 0 and low <= high, self

    @property
    def name(self) -> str:
        return f"{self.level}_{self.statistic}"

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest value that pass."""
        if self.statistic == "k1":
            return math.log(self.low if self.low is not None else 1 / self.high), math.log(self.high)
        return 0.0, self.high


def rejection_mask(
    log_ratio: Tensor, sequence_ids: Tensor, num_sequences: int, criteria: Sequence[Criterion]
) -> Tensor:
    """Which tokens pass every criterion, bool [N]; by sequence, all tokens of one pass or none (Liu et al., 2025).

    What it leaves out is to leave the loss mask, and with it the denominators, before weights are given to tokens.
    """
    keep = torch.ones_like(log_ratio, dtype=torch.bool)
    for criterion in criteria:
        keep &= _passes(_statistic(log_ratio, sequence_ids, num_sequences, criterion), criterion)
    return keep


def _statistic(log_ratio: Tensor, sequence_ids: Tensor, num_sequences: int, criterion: Criterion) -> Tensor:
    """The criterion's statistic for every token [N]; one of a sequence is repeated for its tokens."""
    values = _k(_bounded(log_ratio.detach().double()), criterion.statistic)
    if criterion.level == "token":
        return values
    if criterion.level == "seq_max":
        # No k2 or k3 is negative, so the zeros to start from do not win.
        by_sequence = values.new_zeros(num_sequences).scatter_reduce_(0, sequence_ids, values, "amax")
    elif criterion.level == "seq_mean":
        by_sequence = _sequence_mean(values, sequence_ids, num_sequences)
    else:
        assert criterion.level == "seq_sum", criterion
        by_sequence = _sequence_sum(values, sequence_ids, num_sequences)
    return by_sequence[sequence_ids]


def _k(difference: Tensor, statistic: str) -> Tensor:
    if statistic == "k1":
        return -difference
    if statistic == "k2":
        return difference.square() / 2
    assert statistic == "k3", statistic
    return torch.expm1(difference) - difference


def _passes(values: Tensor, criterion: Criterion) -> Tensor:
    low, high = criterion.bounds
    return (values >= low) & (values <= high)


def off_policy_sequence_mask(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, sequence_ids: Tensor, num_sequences: int, *, delta: float
) -> Tensor:
    """Which tokens are kept, bool [N]: not those with A < 0 in a sequence whose mean_t (old_logp_t - logp_t) > delta.

    The off-policy sequence masking (OPSM) of DeepSeek-V3.2 (arXiv 2512.02556): bad answers that the policy has moved
    away from teach nothing. `logp` is of the policy that is trained, so this one mask belongs to a micro-batch, and
    multiplies its losses; denominators stay.
    """
    drift = _sequence_mean((old_logp - logp).detach(), sequence_ids, num_sequences)[sequence_ids]
    return ~((advantages < 0) & (drift > delta))


# Figures


def importance_metrics(
    log_ratio: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    level: Level,
    high: float,
    low: float | None = None,
    normalize: bool = False,
) -> dict[str, float]:
    """`rollout_corr/rollout_is_*` of the weights that the same arguments give, before they are normalised.

    The effective sample size is mean(w)^2 / mean(w^2), a fraction of the tokens. `ratio_fraction_high` and `_low` are
    of the ratios before the cut, out of [1 / high, high] without `low`; so are max and min by sequence. No tokens, no
    figures.
    """
    if log_ratio.numel() == 0:
        return {}
    present = _present(sequence_ids, num_sequences)
    floor = 1 / high if low is None else low
    ratio = _ratio(log_ratio, sequence_ids, num_sequences, level)
    weights = _cut(ratio, high, low)
    by_sequence = _sequence_mean(weights, sequence_ids, num_sequences)[present]
    ratio_by_sequence = _sequence_mean(ratio, sequence_ids, num_sequences)[present]
    units, extremes = ratio, weights
    if level == "sequence":
        # Not bounded from below, to show how far off the worst sequence is.
        total = _sequence_sum(log_ratio, sequence_ids, num_sequences)[present]
        units, extremes = ratio_by_sequence, total.clamp(max=_MAX_LOG_RATIO).exp()
    square = _mean(weights.square())
    figures = {
        "mean": _mean(weights),
        "max": extremes.max().item(),
        "min": extremes.min().item(),
        "std": weights.std(correction=0).item(),
        "eff_sample_size": _mean(weights) ** 2 / square if square > 0 else 0.0,
        "ratio_fraction_high": _mean(units > high),
        "ratio_fraction_low": _mean(units < floor),
        **_over_sequences(by_sequence, ideal=1.0),
        "seq_fraction_high": _mean(ratio_by_sequence > high),
        "seq_fraction_low": _mean(ratio_by_sequence < floor),
    }
    if low is not None:
        figures["oob_ratio"] = _mean((ratio < low) | (ratio > high))
    if normalize:
        figures["batch_norm_factor"] = _norm(weights, sequence_ids, num_sequences, level)
    return _named(figures, "rollout_is_")


def rejection_metrics(
    log_ratio: Tensor, sequence_ids: Tensor, num_sequences: int, criteria: Sequence[Criterion]
) -> dict[str, float]:
    """`rollout_corr/rollout_rs_*`: what is rejected, by all criteria and by each, and each one's statistic.

    A sequence is rejected where any of its tokens is. The standard deviation is of the statistic clamped to the bounds.
    No tokens, no figures.
    """
    if log_ratio.numel() == 0:
        return {}
    keep = rejection_mask(log_ratio, sequence_ids, num_sequences, criteria)
    figures = _named(_rejected(keep, sequence_ids, num_sequences), "rollout_rs_")
    for criterion in criteria:
        values = _statistic(log_ratio, sequence_ids, num_sequences, criterion)
        own = _criterion_figures(values, sequence_ids, num_sequences, criterion)
        figures |= _named(own, f"rollout_rs_{criterion.name}_")
    return figures


def _criterion_figures(
    values: Tensor, sequence_ids: Tensor, num_sequences: int, criterion: Criterion
) -> dict[str, float]:
    low, high = criterion.bounds
    by_sequence = _sequence_mean(values, sequence_ids, num_sequences)[_present(sequence_ids, num_sequences)]
    units = values if criterion.level == "token" else by_sequence
    figures = {
        "mean": _mean(values),
        "max": values.max().item(),
        "min": values.min().item(),
        "std": values.clamp(low, high).std(correction=0).item(),
        "fraction_high": _mean(units > high),
        "fraction_low": _mean(units < low),
        **_over_sequences(by_sequence, ideal=0.0),
        "seq_fraction_high": _mean(by_sequence > high),
        "seq_fraction_low": _mean(by_sequence < low),
    }
    return figures | _rejected(_passes(values, criterion), sequence_ids, num_sequences)


def _rejected(keep: Tensor, sequence_ids: Tensor, num_sequences: int) -> dict[str, float]:
    by_sequence = _sequence_sum(~keep, sequence_ids, num_sequences)[_present(sequence_ids, num_sequences)]
    return {"masked_fraction": _mean(~keep), "seq_masked_fraction": _mean(by_sequence > 0)}


def off_policy_metrics(
    old_logp: Tensor, rollout_logp: Tensor, sequence_ids: Tensor, num_sequences: int
) -> dict[str, float]:
    """`rollout_corr/*`: how far the policy that the update starts from is from the one that drew the rollouts.

        kl, k3_kl      mean_t(-d), mean_t(exp(d) - 1 - d): estimates of KL(rollout || old)
        *_ppl          mean_i exp(-mean_t logp); *_log_ppl without the exponential; ppl_ratio: training / rollout
        log_ppl_diff   mean_i of mean_t(-d), with its absolute value and extremes
        chi2_*         mean exp(2 d) - 1, over tokens; over sequences with the sum over t for d

    Exponents are at most 20 (40 for chi2). No tokens, no figures.
    """
    if old_logp.numel() == 0:
        return {}
    present = _present(sequence_ids, num_sequences)
    difference = old_logp.detach().double() - rollout_logp.detach().double()
    total = _sequence_sum(difference, sequence_ids, num_sequences)[present]
    gap = -_sequence_mean(difference, sequence_ids, num_sequences)[present]
    training, rollout = (
        -_sequence_mean(logp.detach(), sequence_ids, num_sequences)[present] for logp in (old_logp, rollout_logp)
    )
    figures = {
        "training_ppl": _mean(training.clamp(max=_MAX_LOG_RATIO).exp()),
        "training_log_ppl": _mean(training),
        "rollout_ppl": _mean(rollout.clamp(max=_MAX_LOG_RATIO).exp()),
        "rollout_log_ppl": _mean(rollout),
        "kl": -_mean(difference),
        "k3_kl": _mean(_k(difference.clamp(max=_MAX_LOG_RATIO), "k3")),
        "log_ppl_diff": _mean(gap),
        "log_ppl_abs_diff": _mean(gap.abs()),
        "log_ppl_diff_max": gap.max().item(),
        "log_ppl_diff_min": gap.min().item(),
        "ppl_ratio": _mean(gap.clamp(max=_MAX_LOG_RATIO).exp()),
        "chi2_token": _mean(torch.expm1(2 * _bounded(difference))),
        "chi2_seq": _mean(torch.expm1(2 * _bounded(total))),
    }
    return _named(figures, "")


def _over_sequences(values: Tensor, *, ideal: float) -> dict[str, float]:
    return {
        "seq_mean": _mean(values),
        "seq_std": values.std().item() if values.numel() > 1 else 0.0,
        "seq_max": values.max().item(),
        "seq_min": values.min().item(),
        "seq_max_deviation": (values - ideal).abs().max().item(),
    }


def _named(figures: dict[str, float], prefix: str) -> dict[str, float]:
    return {f"{_PREFIX}/{prefix}{name}": value for name, value in figures.items()}


# Sums and means


def _bounded(difference: Tensor) -> Tensor:
    return difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _sequence_sum(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """[num_sequences] float64; 0 for a sequence without tokens."""
    total = torch.zeros(num_sequences, dtype=torch.float64, device=values.device)
    return total.index_add_(0, sequence_ids, values.double())


def _sequence_mean(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """[num_sequences] float64; 0 for a sequence without tokens."""
    count = torch.bincount(sequence_ids, minlength=num_sequences).clamp(min=1)
    return _sequence_sum(values, sequence_ids, num_sequences) / count


def _present(sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Which sequences have tokens, bool [num_sequences]."""
    return torch.bincount(sequence_ids, minlength=num_sequences) > 0
