"""Self-distillation: the student's tokens against a teacher that reads them after another prompt.

The teacher's pass comes first and leaves its final hidden states at the response's tokens; here both lm-heads are
applied to them chunk by chunk. A target is found by its sample, so that the two passes may be packed in different ways.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.distill import Tail, buckets, divergence, entropy_weights, off_policy, sampled_token
from megatron_rl.data.collate import MicroBatch
from megatron_rl.metrics.types import Metrics, Sum
from megatron_rl.ops.divergence import Head, Pair, full_divergence, mixed_head, pair_figures, paired_stats
from megatron_rl.ops.linear_stats import LinearStats
from megatron_rl.workers.objective import LossTokens, Outcome, PolicyGradient, token_mean

Support = Literal["student", "teacher", "full"]


@dataclass(frozen=True, slots=True)
class Targets:
    """A model's final hidden states [n, H] by sample id, and its lm-head on this rank."""

    hidden: Mapping[int, Tensor]
    weight: Callable[[], Tensor]

    def head(self, batch: MicroBatch, like: Tensor, temperature: float) -> Head:
        """For the micro-batch's tokens, in their order."""
        rows = [self.hidden[sample_id] for sample_id in batch.sample_ids]
        return Head(torch.cat([like.new_empty(0, like.shape[1]), *rows]), self.weight().detach(), temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """The loss of SDPO (Hübotter et al., arXiv 2601.20802): sum_t w_t r_t D_t, w_t being the field `distill_weights`.

    D_t is the divergence of algorithms/distill.py between student and teacher at a token, over the `topk` most likely
    ids of the `support` and their tail, or over the whole vocabulary; with `sampled` the policy gradient on the drawn
    token instead. r_t is the clipped importance weight, and that of the rollout correction. The teacher is `targets`,
    or its mixture with `other`: (1 - mix) z_targets + mix z_other. With `entropy_weighting` a token counts
    exp(-entropy_weighting H_t) as well, H_t the teacher's entropy. A token that weighs 0 has no part in the means of
    `self_distillation/*`.

    With a `policy` loss P over the same tokens the loss is (1 - weight) P + weight sum_t w_t r_t D_t.
    """

    targets: Targets
    other: Targets | None = None
    mix: float = 0.0
    support: Support
    topk: int  # at most the vocabulary's size
    alpha: float
    tail: Tail
    sampled: bool
    is_clip: float | None
    corrected: bool  # the field `rollout_weights` is one more factor
    entropy_weighting: float = 0.0
    weight: float = 1.0
    policy: PolicyGradient | None = None
    temperature: float
    on_policy: bool

    @property
    def field_names(self) -> tuple[str, ...]:
        names = ["distill_weights"]
        if not self.on_policy:
            names.append("old_log_probs")
        if self.corrected:
            names.append("rollout_weights")
        return tuple(dict.fromkeys([*names, *(self.policy.field_names if self.policy is not None else ())]))

    def __call__(self, tokens: LossTokens) -> Outcome:
        batch, weights = tokens.batch, tokens.batch.fields["distill_weights"]
        values, pair = self._divergence(tokens)
        logp, bears_loss = pair.student.logp, weights > 0
        old_logp = logp.detach() if self.on_policy else batch.fields["old_log_probs"]
        rollout_weights = batch.fields["rollout_weights"] if self.corrected else None
        terms = off_policy(values, logp, old_logp, is_clip=self.is_clip, rollout_weights=rollout_weights)
        metrics = self._metrics(values, terms.clipped, pair, bears_loss)
        if self.entropy_weighting:
            assert pair.teacher.entropy is not None
            certainty = entropy_weights(pair.teacher.entropy, self.entropy_weighting)
            weights = weights * certainty
            metrics["self_distillation/entropy_weight"] = token_mean(certainty[bears_loss])
        loss = distill_loss = (weights * terms.loss).sum()
        metrics["actor/distill_loss"] = Sum(float(distill_loss.detach()))
        if self.policy is not None:
            policy_loss, policy_metrics = self.policy.of_stats(pair.student, batch)
            loss = (1 - self.weight) * policy_loss + self.weight * distill_loss
            metrics |= policy_metrics
        elif not self.on_policy:
            metrics["actor/ppo_kl"] = token_mean(old_logp - logp)
        return Outcome(loss, metrics | {"actor/loss": Sum(float(loss.detach()))})

    def _divergence(self, tokens: LossTokens) -> tuple[Tensor, Pair]:
        """D_t [N], and what both heads say."""
        batch, shard = tokens.batch, tokens.shard
        student = Head(tokens.hidden, tokens.weight, self.temperature, tokens.main_grad)
        teacher = self.targets.head(batch, tokens.hidden, self.temperature)
        if self.other is not None:
            teacher = mixed_head(teacher, self.other.head(batch, tokens.hidden, self.temperature), self.mix)
        if self.support == "full" and not self.sampled:
            full = full_divergence(
                student, teacher, batch.labels, alpha=self.alpha, k=self.topk, shard=shard, chunk=tokens.chunk
            )
            return full.loss, full.pair
        support: Literal["student", "teacher"] = "teacher" if self.support == "teacher" else "student"
        pair = paired_stats(
            student, teacher, batch.labels, support=support, k=self.topk, shard=shard, chunk=tokens.chunk
        )
        if self.sampled:
            return sampled_token(pair.student.logp, pair.teacher.logp), pair
        guide = self._buckets(pair.teacher)
        return divergence(self._buckets(pair.student), guide, self.alpha), pair

    def _buckets(self, stats: LinearStats) -> Tensor:
        assert stats.topk_logp is not None and stats.tail_logp is not None
        return buckets(stats.topk_logp, stats.tail_logp, self.tail)

    @staticmethod
    def _metrics(values: Tensor, clipped: Tensor, pair: Pair, bears_loss: Tensor) -> Metrics:
        figures = pair_figures(pair)
        measured: dict[str, Tensor | None] = {
            "divergence": values,
            "is_clipped": clipped,
            "teacher_entropy": figures.teacher_entropy,
            "topk_overlap": figures.overlap,
            "agreement": figures.agreement,
            "sampled_token_gap": figures.gap,
            "sampled_token_distance": figures.gap.abs(),
            "student_topk_mass": figures.student_mass,
            "teacher_topk_mass": figures.teacher_mass,
        }
        metrics: Metrics = {
            f"self_distillation/{name}": token_mean(value[bears_loss])
            for name, value in measured.items()
            if value is not None
        }
        return metrics | {"actor/entropy": token_mean(figures.student_entropy)}
