"""The loss of a discriminator that tells a teacher's responses from the policy's, on the scores of pairs.

Generative adversarial distillation (Ye et al., arXiv 2511.10643): with T_i the score of the teacher's response to the
prompt of the policy's i-th response, and S_i the latter's,

    max_G min_D  mean_i -log sigmoid(T_i - S_i)        (Bradley and Terry, 1952)

and S_i is the policy's reward. Tensors are [B] float64 over the pairs of a whole batch: statistics of the batch are
part of the loss, and its gradient goes through them. Lengths are in response tokens, the one that ends it included.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-8
HARD = 0.1  # a pair is hard where its scores are no further apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """A temperature clamp(offset + slope mean|d|, low, high), without gradient."""

    offset: float
    slope: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLoss:
    """How pairs of scores are judged; the defaults are the paper's."""

    raw_weight: float = 1.0
    norm_weight: float = 0.0
    debias_length: bool = False
    batch_norm: bool = False
    temperature: float | Adaptive = 1.0
    label_smoothing: float = 0.0
    l2: float = 0.0  # times the mean of T^2 + S^2
    range_penalty: float = 0.0  # times the mean squared distance of the scores to [range_low, range_high]
    range_low: float = 0.0
    range_high: float = 0.0


class PairTerms(NamedTuple):
    """Of a batch of pairs; `loss` and `ranking_loss` are scalars."""

    loss: Tensor
    ranking_loss: Tensor
    diff: Tensor  # [B], what enters the ranking loss, before the temperature
    temperature: float


def mixed(scores: Tensor, lengths: Tensor, *, raw_weight: float, norm_weight: float) -> Tensor:
    """raw_weight S + norm_weight S / n.

    Under a mean over tokens the second term divides by the length twice: it is small, and adds a dependence on the
    length where it was meant to remove one.
    """
    return raw_weight * scores + norm_weight * scores / lengths


def length_slope(scores: Tensor, lengths: Tensor, sides: Tensor) -> Tensor:
    """The least-squares slope of the scores on the lengths, with a mean of its own for each side [N] int64.

    sum_c cov_c / sum_c var_c over the sides c. Fitted across both sides at once it would take what tells them apart for
    an effect of the length. 0 where lengths do not vary.
    """
    x, y = _centred(lengths.double(), sides), _centred(scores, sides)
    spread = x.square().sum()
    return (x * y).sum() / spread if spread > 0 else spread


def _centred(values: Tensor, sides: Tensor) -> Tensor:
    for side in sides.unique():
        own = sides == side
        values = torch.where(own, values - values[own].mean(), values)
    return values


def without_length(teacher: Tensor, student: Tensor, teacher_lengths: Tensor, student_lengths: Tensor) -> list[Tensor]:
    """Both sides' scores less what their length explains: S - b (n - mean n), b the common slope.

    A score that is a function b n + c of the length comes out constant, on both sides alike: it tells no pair apart,
    earns no reward, and its gradient is 0.
    """
    scores, lengths = torch.cat([teacher, student]), torch.cat([teacher_lengths, student_lengths]).double()
    sides = torch.tensor([0, 1]).repeat_interleave(torch.tensor([len(teacher), len(student)]))
    rest = scores - length_slope(scores, lengths, sides) * (lengths - lengths.mean())
    return list(rest.split([len(teacher), len(student)]))


def batch_normalised(teacher: Tensor, student: Tensor) -> list[Tensor]:
    """Both sides as one sample with mean 0 and variance 1: (x - mean) / (std + 1e-8), std with N - 1."""
    scores = torch.cat([teacher, student])
    scores = (scores - scores.mean()) / (scores.std(correction=1) + EPSILON)
    return list(scores.split([len(teacher), len(student)]))


def temperature(diff: Tensor, setting: float | Adaptive) -> float:
    """Fixed, or by the mean distance of the pairs."""
    if isinstance(setting, Adaptive):
        wanted = setting.offset + setting.slope * float(diff.detach().abs().mean())
        return min(max(wanted, setting.low), setting.high)
    return setting


def ranking_loss(diff: Tensor, temperature: float, label_smoothing: float = 0.0) -> Tensor:
    """mean of (1 - e) l(d / T) + e l(-d / T), with l(x) = -log sigmoid(x)."""
    x = diff / temperature
    return -((1 - label_smoothing) * F.logsigmoid(x) + label_smoothing * F.logsigmoid(-x)).mean()


def pair_loss(
    teacher: Tensor, student: Tensor, teacher_lengths: Tensor, student_lengths: Tensor, options: PairLoss
) -> PairTerms:
    """The loss of pairs of pooled scores; differentiable in both sides.

    Scores are mixed, then freed of their length, then normalised. The penalties are on the pooled scores themselves.
    """
    weights = {"raw_weight": options.raw_weight, "norm_weight": options.norm_weight}
    t, s = mixed(teacher, teacher_lengths, **weights), mixed(student, student_lengths, **weights)
    if options.debias_length:
        t, s = without_length(t, s, teacher_lengths, student_lengths)
    if options.batch_norm:
        t, s = batch_normalised(t, s)
    diff = t - s
    used = temperature(diff, options.temperature)
    ranking = ranking_loss(diff, used, options.label_smoothing)
    loss = ranking + options.l2 * (teacher.square() + student.square()).mean()
    if options.range_penalty:
        outside = [
            (options.range_low - x).relu().square() + (x - options.range_high).relu().square()
            for x in (teacher, student)
        ]
        loss = loss + options.range_penalty * (outside[0] + outside[1]).mean()
    return PairTerms(loss, ranking, diff, used)


def rewards(scores: Tensor, lengths: Tensor, options: PairLoss) -> Tensor:
    """The rewards [B] of the policy's responses: their scores, mixed, and freed of the length within the batch.

    Neither temperature nor normalisation: advantages are relative to the group anyway.
    """
    scores = mixed(scores, lengths, raw_weight=options.raw_weight, norm_weight=options.norm_weight)
    if not options.debias_length:
        return scores
    slope = length_slope(scores, lengths, torch.zeros(len(scores), dtype=torch.int64))
    return scores - slope * (lengths - lengths.double().mean())


def length_correlation(scores: Tensor, lengths: Tensor) -> float:
    """Pearson's, of scores and lengths [B]; 0 where either does not vary."""
    x, y = lengths.double(), scores.double()
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return 0.0
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def pair_figures(diff: Tensor, raw: Tensor) -> dict[str, float]:
    """Of pairs: the differences [B] that enter the loss, and those of the pooled scores. A tie is no success."""
    return {
        "d_acc": float((diff > 0).double().mean()),
        "d_acc_soft": float(raw.sigmoid().mean()),
        "score_diff": float(diff.mean()),
        "raw_score_diff": float(raw.mean()),
        "hard_sample_ratio": float((diff.abs() < HARD).double().mean()),
    }


def score_figures(side: str, scores: Tensor) -> dict[str, float]:
    """`{side}_value_*` of pooled scores [B]; the deviation is unbiased, and 0 for one."""
    std = float(scores.std(correction=1)) if len(scores) > 1 else 0.0
    figures = {"mean": float(scores.mean()), "std": std, "min": float(scores.min()), "max": float(scores.max())}
    return {f"{side}_value_{name}": value for name, value in figures.items()}
