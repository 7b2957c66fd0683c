"""The discriminator at work: it scores both sides of pairs, and learns from all pairs of a batch in one update.

The loss couples pairs with each other, so it is computed from the scores of the whole batch, the same on every rank,
and driven back into the model through the slope that it gives each token. That makes it independent of how responses
are packed, cut into micro-batches and spread over ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from megatron_rl.algorithms.discriminator import (
    Adaptive,
    PairLoss,
    PairTerms,
    length_correlation,
    pair_figures,
    pair_loss,
    score_figures,
)
from megatron_rl.algorithms.pooling import counted
from megatron_rl.config.critic import DiscriminatorConfig
from megatron_rl.data.samples import Sample, from_example
from megatron_rl.trainers.update_metrics import results, update_metrics
from megatron_rl.workers.critic import CriticWorker, WeighedValues, pooled


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A response of the policy, and which of the teacher's it is compared with."""

    student: Sample
    teacher: int  # its place in the list of the teacher's responses
    same_text: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Pairs with the pooled scores of both sides; each of the teacher's responses was scored once.

    `values` and `masks` are those of the tokens, for the pairs' students and then for the teachers.
    """

    teachers: list[Sample]
    pairs: list[Pair]
    values: list[Tensor]  # float32 [n]
    masks: list[Tensor]  # bool [n]: the tokens whose values make the score
    teacher_scores: Tensor  # float64, one per response of the teacher
    student_scores: Tensor  # float64, one per pair
    valid: Tensor  # bool [B]: both sides have a token that counts

    @property
    def places(self) -> Tensor:
        """Of each pair's teacher."""
        return torch.tensor([pair.teacher for pair in self.pairs], dtype=torch.int64)

    @property
    def teacher_lengths(self) -> Tensor:
        return torch.tensor([sample.response_length for sample in self.teachers])

    @property
    def student_lengths(self) -> Tensor:
        return torch.tensor([pair.student.response_length for pair in self.pairs])


class Discriminator:
    """A critic whose scores are compared. `max_tokens` bounds a micro-batch; `stop` are the ids that end a response."""

    def __init__(
        self, config: DiscriminatorConfig, critic: CriticWorker, *, stop: tuple[int, ...], max_tokens: int
    ) -> None:
        self.config, self.critic, self.stop, self.max_tokens = config, critic, stop, max_tokens
        self.loss = _pair_loss(config)

    def judge(self, teachers: list[Sample], pairs: list[Pair]) -> Judged:
        """Scores of both sides under the present weights. Sample ids are unique over both. Collective."""
        samples = [*(pair.student for pair in pairs), *teachers]
        of_sample = self.critic.values(samples, self.critic.plan(samples, self.max_tokens))
        values, masks = [of_sample[sample.id] for sample in samples], [self._counted(sample) for sample in samples]
        student_scores, teacher_scores = pooled(values, masks).split([len(pairs), len(teachers)])
        counts = [bool(mask.any()) for mask in masks]
        valid = [mine and counts[len(pairs) + pair.teacher] for mine, pair in zip(counts, pairs)]
        return Judged(
            teachers=teachers,
            pairs=pairs,
            values=values,
            masks=masks,
            teacher_scores=teacher_scores,
            student_scores=student_scores,
            valid=torch.tensor(valid, dtype=torch.bool),
        )

    def _counted(self, sample: Sample) -> Tensor:
        return counted(sample.token_ids[sample.prompt_length :].tolist(), self.config.pooling.value, self.stop)

    def update(self, judged: Judged) -> dict[str, float]:
        """One optimizer step on all valid pairs; `critic/*` as it was before. Collective."""
        timer = self.critic.timer
        with timer("metrics"):
            figures = self._figures(judged)
        if not judged.valid.any():
            return figures
        with timer("pair_loss"):
            terms, sloped = self._pair_loss(judged)
        with timer("plan"):
            plan = self.critic.plan(sloped, self.max_tokens)
        self.critic.forward_backward(sloped, plan, WeighedValues())
        result = self.critic.step()
        return figures | {
            "critic/d_loss": float(terms.loss.detach()),
            "critic/ranking_loss": float(terms.ranking_loss.detach()),
            "critic/temperature": terms.temperature,
            "critic/grad_norm_clipped": min(result.grad_norm, self.critic.clip_grad),
            **results(update_metrics("critic", {}, result)),
        }

    def _pair_loss(self, judged: Judged) -> tuple[PairTerms, list[Sample]]:
        """The loss, and the samples of both sides with its slopes."""
        values = [of_tokens.double().requires_grad_() for of_tokens in judged.values]
        student, teacher = pooled(values, judged.masks).split([len(judged.pairs), len(judged.teachers)])
        terms = pair_loss(*_sides(judged, teacher, student), self.loss)
        slopes = torch.autograd.grad(terms.loss, values)
        samples = [*(pair.student for pair in judged.pairs), *judged.teachers]
        return terms, [sample.with_field("slopes", slope) for sample, slope in zip(samples, slopes, strict=True)]

    def _figures(self, judged: Judged) -> dict[str, float]:
        figures: dict[str, float] = {
            "invalid_pair_ratio": float((~judged.valid).double().mean()),
            "teacher_length": fmean(judged.teacher_lengths.tolist()),
            "student_length": fmean(judged.student_lengths.tolist()),
            "length_corr": length_correlation(judged.student_scores, judged.student_lengths),
        }
        if judged.valid.any():
            teacher, student, *_ = _sides(judged, judged.teacher_scores, judged.student_scores)
            raw = teacher - student
            figures |= pair_figures(self.difference(judged), raw)
            figures |= score_figures("teacher", teacher) | score_figures("student", student)
            same = torch.tensor([pair.same_text for pair in judged.pairs])[judged.valid]
            if same.any():
                figures["identical_text_gap"] = float(raw[same].abs().mean())
        return {f"critic/{name}": value for name, value in figures.items()}

    def difference(self, judged: Judged) -> Tensor:
        """What enters the ranking loss, of the valid pairs."""
        return pair_loss(*_sides(judged, judged.teacher_scores, judged.student_scores), self.loss).diff


def _sides(judged: Judged, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and lengths of the valid pairs, the teacher's first."""
    places, valid = judged.places, judged.valid
    return (
        teacher[places][valid],
        student[valid],
        judged.teacher_lengths[places][valid],
        judged.student_lengths[valid],
    )


def _pair_loss(config: DiscriminatorConfig) -> PairLoss:
    temperature: float | Adaptive = config.temperature
    if config.adaptive_temperature is not None:
        offset, slope, low, high = config.adaptive_temperature
        temperature = Adaptive(offset=offset, slope=slope, low=low, high=high)
    return PairLoss(
        raw_weight=config.raw_weight,
        norm_weight=config.norm_weight,
        debias_length=config.debias_length,
        batch_norm=config.batch_norm,
        temperature=temperature,
        label_smoothing=config.label_smoothing,
        l2=config.l2,
        range_penalty=config.range_penalty,
        range_low=config.range_low,
        range_high=config.range_high,
    )


def make_pairs(
    prompts: Sequence[Sequence[int]],
    teachers: Sequence[Sequence[int]],
    students: Sequence[Sequence[Sequence[int]]],
    same_text: Sequence[Sequence[bool]],
) -> tuple[list[Sample], list[Pair]]:
    """Samples of both sides, from token ids: for each prompt one response of the teacher and some of the policy."""
    count = sum(map(len, students))
    sides = [from_example(count + place, *pair) for place, pair in enumerate(zip(prompts, teachers, strict=True))]
    pairs: list[Pair] = []
    for place, (prompt, responses, same) in enumerate(zip(prompts, students, same_text, strict=True)):
        for response, equal in zip(responses, same, strict=True):
            pairs.append(Pair(student=from_example(len(pairs), prompt, response), teacher=place, same_text=equal))
    return sides, pairs
