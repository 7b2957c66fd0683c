"""Self-distillation: the student's tokens against a teacher that reads them after another prompt.

The teacher's pass comes first and leaves its final hidden states at the response's tokens; here both lm-heads are
applied to them chunk by chunk. A target is found by its sample, so that the two passes may be packed in different ways.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.distill import Tail, buckets, divergence, off_policy, sampled_token
from megatron_rl.data.collate import MicroBatch
from megatron_rl.metrics.types import Metrics, Sum
from megatron_rl.ops.divergence import Head, Pair, full_divergence, mixed_head, pair_figures, paired_stats
from megatron_rl.ops.linear_stats import LinearStats
from megatron_rl.workers.objective import LossTokens, Outcome, token_mean

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
    """The loss of SDPO (Hübotter et al., arXiv 2601.20802): sum_t w_t r_t D_t.

    D_t is the divergence of algorithms/distill.py between student and teacher at a token, over the `topk` most likely
    ids of the `support` and their tail, or over the whole vocabulary; with `sampled` the policy gradient on the drawn
    token instead. r_t is the clipped importance weight, and that of the rollout correction. The teacher is `targets`,
    or its mixture with `other`: (1 - mix) z_targets + mix z_other.
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
    temperature: float
    on_policy: bool

    @property
    def field_names(self) -> tuple[str, ...]:
        names = ["weights"]
        if not self.on_policy:
            names.append("old_log_probs")
        if self.corrected:
            names.append("rollout_weights")
        return tuple(names)

    def __call__(self, tokens: LossTokens) -> Outcome:
        batch, weights = tokens.batch, tokens.batch.fields["weights"]
        values, logp, pair = self._divergence(tokens)
        old_logp = logp.detach() if self.on_policy else batch.fields["old_log_probs"]
        rollout_weights = batch.fields["rollout_weights"] if self.corrected else None
        terms = off_policy(values, logp, old_logp, is_clip=self.is_clip, rollout_weights=rollout_weights)
        loss = (weights * terms.loss).sum()
        metrics = self._metrics(float(loss.detach()), values, terms.clipped, pair)
        if not self.on_policy:
            metrics["actor/ppo_kl"] = token_mean(old_logp - logp)
        return Outcome(loss, metrics)

    def _divergence(self, tokens: LossTokens) -> tuple[Tensor, Tensor, Pair]:
        """D_t [N], the student's log-probability of the drawn token [N], and what both heads say."""
        batch, shard = tokens.batch, tokens.shard
        student = Head(tokens.hidden, tokens.weight, self.temperature)
        teacher = self.targets.head(batch, tokens.hidden, self.temperature)
        if self.other is not None:
            teacher = mixed_head(teacher, self.other.head(batch, tokens.hidden, self.temperature), self.mix)
        if self.support == "full" and not self.sampled:
            full = full_divergence(
                student, teacher, batch.labels, alpha=self.alpha, k=self.topk, shard=shard, chunk=tokens.chunk
            )
            return full.loss, full.pair.student.logp, full.pair
        support: Literal["student", "teacher"] = "teacher" if self.support == "teacher" else "student"
        pair = paired_stats(
            student, teacher, batch.labels, support=support, k=self.topk, shard=shard, chunk=tokens.chunk
        )
        if self.sampled:
            return sampled_token(pair.student.logp, pair.teacher.logp), pair.student.logp, pair
        guide = self._buckets(pair.teacher)
        return divergence(self._buckets(pair.student), guide, self.alpha), pair.student.logp, pair

    def _buckets(self, stats: LinearStats) -> Tensor:
        assert stats.topk_logp is not None and stats.tail_logp is not None
        return buckets(stats.topk_logp, stats.tail_logp, self.tail)

    @staticmethod
    def _metrics(loss: float, values: Tensor, clipped: Tensor, pair: Pair) -> Metrics:
        figures = pair_figures(pair)
        metrics: Metrics = {
            "actor/loss": Sum(loss),
            "actor/distill_loss": Sum(loss),
            "actor/entropy": token_mean(figures.student_entropy),
            "self_distillation/divergence": token_mean(values),
            "self_distillation/is_clipped": token_mean(clipped),
            "self_distillation/teacher_entropy": token_mean(figures.teacher_entropy),
            "self_distillation/topk_overlap": token_mean(figures.overlap),
            "self_distillation/agreement": token_mean(figures.agreement),
            "self_distillation/sampled_token_gap": token_mean(figures.gap),
        }
        if figures.student_mass is not None and figures.teacher_mass is not None:
            metrics["self_distillation/student_topk_mass"] = token_mean(figures.student_mass)
            metrics["self_distillation/teacher_topk_mass"] = token_mean(figures.teacher_mass)
        return metrics
