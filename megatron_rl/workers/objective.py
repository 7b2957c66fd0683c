"""What a model is trained on: from log-probabilities of the loss-bearing tokens to a scalar and its metrics.

An objective sees flat [N] tensors and weights that sum to one over the global mini-batch. It knows nothing of ranks,
micro-batches or packing; that is why the loss does not depend on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_rl.algorithms import policy_loss
from megatron_rl.algorithms.importance import log_ratio
from megatron_rl.algorithms.kl import kl
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.algorithms.rollout_correction import off_policy_sequence_mask
from megatron_rl.data.collate import MicroBatch
from megatron_rl.metrics.types import Max, Mean, Metrics, Sum
from megatron_rl.models.build import LanguageModel
from megatron_rl.models.main_grad import with_main_grad
from megatron_rl.ops.linear_stats import LinearStats, linear_stats
from megatron_rl.ops.vocab_shard import VocabShard
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.workers.smoothing import Smoother

# isort: split
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTokens:
    """The loss-bearing tokens of a micro-batch before the vocabulary: N final hidden states, and the lm-head.

    `hidden` [N, H] is the same on every tensor-parallel rank, and its gradient is completed behind it; `weight` is this
    rank's shard of the head, whose gradient is added to `main_grad` where that is given.
    """

    hidden: Tensor
    weight: Tensor
    main_grad: Tensor | None
    shard: VocabShard
    chunk: int  # columns of the vocabulary in memory at once
    batch: MicroBatch

    def stats(self, *, temperature: float, entropy: bool) -> LinearStats:
        """Log-probability [N] of the labels, and entropy [N] if asked for."""
        return linear_stats(
            self.hidden,
            self.weight,
            self.batch.labels,
            shard=self.shard,
            temperature=temperature,
            entropy=entropy,
            chunk=self.chunk,
            main_grad=self.main_grad,
        )


def loss_tokens(model: LanguageModel, hidden: Tensor, batch: MicroBatch, mesh: Mesh, *, chunk: int) -> LossTokens:
    """Of the last stage's output, [T, 1, H], or [T / tp, 1, H] under sequence parallelism.

    Either region operator completes the hidden states' gradient, of which each rank computes its vocabulary's part.
    """
    if mesh.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    weight, main_grad = with_main_grad(model.head_weight())
    return LossTokens(
        hidden=hidden[:, 0].index_select(0, batch.loss_positions),
        weight=weight,
        main_grad=main_grad,
        shard=model.shard,
        chunk=chunk,
        batch=batch,
    )


# Losses that couple the tokens of a sequence.
OF_SEQUENCES = ("gspo", "geo_mean")


class Outcome(NamedTuple):
    """A micro-batch's share of the loss, and its metrics."""

    loss: Tensor
    metrics: Metrics


class Objective(Protocol):
    """A loss. `field_names` are the per-token fields it reads from the micro-batch.

    It is called with what the model makes of loss-bearing tokens: LossTokens, or a critic's ValueTokens.
    """

    @property
    def field_names(self) -> tuple[str, ...]: ...

    def __call__(self, tokens: Any) -> Outcome: ...


def token_mean(values: Tensor) -> Mean:
    """The mean over loss-bearing tokens, as a sum and a count."""
    return Mean(float(values.detach().double().sum()), values.numel())


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood:
    """Supervised fine-tuning: -sum_t w_t log pi(y_t). The entropy is measured beside it, and has no gradient."""

    field_names: tuple[str, ...] = ("weights",)
    entropy: bool = True

    def __call__(self, tokens: LossTokens) -> Outcome:
        stats = tokens.stats(temperature=1.0, entropy=self.entropy)
        loss = -(tokens.batch.fields["weights"] * stats.logp).sum()
        metrics: Metrics = {"sft/loss": Sum(float(loss.detach())), "sft/nll": token_mean(-stats.logp)}
        if stats.entropy is not None:
            metrics["actor/entropy"] = token_mean(stats.entropy)
        return Outcome(loss, metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """A policy loss, an entropy bonus, a distance to a reference: sum_t w_t (l_t - c H_t + b KL_t).

    `loss` is a function of `algorithms/policy_loss.py`, and `options` are its keywords. The policy that the update
    starts from is `old_log_probs`, or the current policy itself where a rollout batch is used for one update only
    (`on_policy`).
    """

    loss: str
    options: Mapping[str, float | None]
    entropy_coeff: float = 0.0
    smoother: Smoother | None = None  # of the importance weights of ppo_clip
    corrected: bool = False  # the policy loss is multiplied by the field `rollout_weights`
    opsm_delta: float | None = None
    kl_estimator: str | None = None  # of the distance to the reference; None for none
    kl_gradient: str = "naive"
    kl_coeff: float = 0.0
    temperature: float
    on_policy: bool

    @property
    def field_names(self) -> tuple[str, ...]:
        names = ["weights", "advantages"]
        if not self.on_policy:
            names.append("old_log_probs")
        if self.corrected:
            names.append("rollout_weights")
        if self.kl_estimator is not None:
            names.append("ref_log_probs")
        return tuple(names)

    def _surrogate(self, logp: Tensor, old_logp: Tensor, batch: MicroBatch) -> PolicyLoss:
        function: Any = getattr(policy_loss, self.loss)
        arguments: tuple[Any, ...] = (logp, old_logp, batch.fields["advantages"])
        options: dict[str, Any] = dict(self.options)
        if self.loss in OF_SEQUENCES:
            arguments += (batch.sequence_ids, batch.num_sequences)
        if self.smoother is not None:
            options["ratio"] = self.smoother(log_ratio(logp, old_logp).exp(), batch)
        return function(*arguments, **options)

    def __call__(self, tokens: LossTokens) -> Outcome:
        # The entropy is always measured: its collapse is the first sign of trouble.
        return self.of_stats(tokens.stats(temperature=self.temperature, entropy=True), tokens.batch)

    def of_stats(self, stats: LinearStats, batch: MicroBatch) -> Outcome:
        """The loss from the statistics of the policy's own tokens."""
        logp, entropy = stats.logp, stats.entropy
        assert entropy is not None
        weights = batch.fields["weights"]
        old_logp = logp.detach() if self.on_policy else batch.fields["old_log_probs"]
        terms = self._surrogate(logp, old_logp, batch)
        pg_weights = weights * batch.fields["rollout_weights"] if self.corrected else weights
        metrics: Metrics = {}
        if self.opsm_delta is not None:
            keep = off_policy_sequence_mask(
                logp,
                old_logp,
                batch.fields["advantages"],
                batch.sequence_ids,
                batch.num_sequences,
                delta=self.opsm_delta,
            )
            pg_weights = pg_weights * keep
            metrics["rollout_corr/opsm_masked_fraction"] = token_mean(~keep)
        pg_loss = (pg_weights * terms.loss).sum()
        # The entropy's gradient costs a pass over the vocabulary, so it is not asked for at coefficient zero.
        loss = pg_loss - self.entropy_coeff * (weights * entropy).sum() if self.entropy_coeff else pg_loss
        metrics |= {
            "actor/pg_loss": Sum(float(pg_loss.detach())),
            "actor/entropy": token_mean(entropy),
            "actor/ppo_kl": token_mean(terms.approx_kl),
            "actor/pg_clipfrac": token_mean(terms.clipped),
            "actor/pg_clipfrac_lower": token_mean(terms.clipped_low),
            "actor/ratio_max": Max(float(terms.ratio.max()) if terms.ratio.numel() else -torch.inf),
        }
        if self.kl_estimator is not None:
            distance = kl(
                logp, batch.fields["ref_log_probs"], self.kl_estimator, gradient=self.kl_gradient, old_logp=old_logp
            )
            kl_loss = (weights * distance).sum()
            loss = loss + self.kl_coeff * kl_loss
            metrics |= {"actor/kl_loss": Sum(float(kl_loss.detach())), "actor/kl_coef": Mean(self.kl_coeff, 1)}
        return Outcome(loss, metrics | {"actor/loss": Sum(float(loss.detach()))})
