"""Group-relative policy optimisation: answer, judge, compare within the group, update."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms import advantages
from megatron_rl.algorithms.kl import kl
from megatron_rl.algorithms.overlong import overlong_penalty
from megatron_rl.config.schema import (
    AlgorithmConfig,
    CorrectionLevel,
    EmaAxis,
    GrpoConfig,
    KLPlace,
    Loss,
    RolloutCorrectionConfig,
)
from megatron_rl.data.samples import Sample, from_example, weighed
from megatron_rl.data.sources import PromptSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import Max, Mean, Metrics, StepLog, Sum, merge
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.rollout.sync import check_parity, parity_gap, push
from megatron_rl.trainers.correction import correct, with_rollout_log_probs
from megatron_rl.trainers.data import train_prompts
from megatron_rl.trainers.parts import Parts
from megatron_rl.trainers.rollout_metrics import rollout_histograms, rollout_metrics
from megatron_rl.trainers.rollouts import rollout_batch
from megatron_rl.types import RolloutGroup
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.objective import PolicyGradient
from megatron_rl.workers.sharded_model import ShardedModel
from megatron_rl.workers.smoothing import Record, Smoother


class GrpoTrainer:
    """One rollout batch; `epochs_per_step` times its mini-batches, one update each."""

    def __init__(
        self,
        config: GrpoConfig,
        actor: ModelWorker,
        reference: ShardedModel | None,
        parts: Parts,
        source: PromptSource,
    ) -> None:
        self.config, self.actor, self.reference, self.parts, self.source = config, actor, reference, parts, source
        self.objective = policy_objective(config)
        correction = config.rollout_correction
        self.needs_old = not correction.bypass and (
            not self.objective.on_policy or config.kl.where is KLPlace.reward or is_corrected(correction)
        )
        self.probed = False

    def step(self, step: int, timer: Timer) -> StepLog:
        config, actor = self.config, self.actor
        with timer("sync"):
            push(actor.named_hf_weights, self.parts.engine, actor.version)
        groups, metrics = rollout_batch(config, self.parts, self.source, step, timer)
        samples = to_samples(groups, drop_truncated=bool(config.algorithm.drop_truncated))
        samples, figures = self._with_policies(groups, samples, step, timer)
        metrics |= figures
        with timer("adv"):
            rewards, figures = self._shaped(groups, samples)
            metrics |= figures
            values = group_advantages(groups, rewards, normalize_by_std=bool(config.algorithm.normalize_by_std))
            samples = [sample.with_constant("advantages", value) for sample, value in zip(samples, values.tolist())]
        metrics |= rollout_metrics(groups, values)
        with timer("update_actor"):
            figures, records = self._update(samples)
        histograms = rollout_histograms(groups, values)
        if records:
            raw, smoothed, _ = (torch.cat(parts).tolist() for parts in zip(*records))
            histograms |= {"ema/raw_weights": raw, "ema/smoothed_weights": smoothed}
        return StepLog(metrics | figures, histograms)

    def _with_policies(
        self, groups: Sequence[RolloutGroup], samples: list[Sample], step: int, timer: Timer
    ) -> tuple[list[Sample], dict[str, float]]:
        """Log-probabilities of the policies that the loss compares with, and the correction between them."""
        config, temperature = self.config, self.config.rollout.temperature
        metrics: dict[str, float] = {}
        probe = self._is_probe(step)
        if probe or self.needs_old:
            with timer("old_log_prob"):
                log_probs = self.actor.log_probs(samples, self._plan(samples), temperature)
            samples = [sample.with_loss_field("old_log_probs", log_probs[sample.id]) for sample in samples]
            if probe:
                metrics |= self._check_parity(groups, log_probs)
        if self.reference is not None:
            with timer("ref"):
                log_probs = self.reference.log_probs(samples, self._plan(samples), temperature)
            samples = [sample.with_loss_field("ref_log_probs", log_probs[sample.id]) for sample in samples]
        if is_corrected(config.rollout_correction):
            samples = with_rollout_log_probs(samples, groups)
            if config.rollout_correction.bypass:
                samples = [sample.with_field("old_log_probs", sample.fields["rollout_log_probs"]) for sample in samples]
            samples, figures = correct(samples, config.rollout_correction)
            metrics |= figures
        return samples, metrics

    def _shaped(self, groups: Sequence[RolloutGroup], samples: Sequence[Sample]) -> tuple[Tensor, dict[str, float]]:
        """Rewards [n], less what length and distance to the reference cost where the config says so."""
        algorithm, settings = self.config.algorithm, self.config.kl
        rewards = reward_values(groups)
        metrics: dict[str, float] = {}
        if algorithm.overlong_buffer:
            lengths = torch.tensor([sample.response_length for sample in samples])
            penalty = overlong_penalty(
                lengths,
                max_length=self.config.rollout.max_new_tokens,
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

    def _update(self, samples: Sequence[Sample]) -> tuple[dict[str, float], list[Record]]:
        """Mini-batches of whole groups, in order. A loss is logged as its mean over the updates."""
        train, smoother = self.config.train, self.objective.smoother
        size = len(samples) // train.mini_batches_per_step
        total: Metrics = {}
        records: list[Record] = []
        smoothing: dict[str, list[float]] = {}
        if smoother is not None:
            smoother.forget()
        for epoch in range(train.epochs_per_step):
            for start in range(0, len(samples), size):
                if smoother is not None:
                    smoother.begin()
                    smoother.visit = epoch
                per_update = self._update_once(samples[start : start + size])
                if smoother is not None:
                    records = self.actor.gather(smoother.records)
                    states = sum(self.actor.gather([len(smoother.averages)]))
                    for name, value in smoother.metrics(records, states).items():
                        smoothing.setdefault(name, []).append(value)
                total = merge(total, per_update) if total else per_update
        figures = {name: value.result() for name, value in total.items()}
        return figures | {name: fmean(values) for name, values in smoothing.items()}, records

    def _update_once(self, samples: Sequence[Sample]) -> Metrics:
        mini_batch = weighed(
            samples, str(self.config.algorithm.aggregation), horizon=self.config.rollout.max_new_tokens
        )
        stats = self.actor.forward_backward(mini_batch, self._plan(mini_batch), self.objective)
        update = self.actor.step()
        return {name: Mean(v.value, 1) if isinstance(v, Sum) else v for name, v in stats.items()} | {
            "actor/grad_norm": Max(update.grad_norm),
            "actor/lr": Mean(update.lr, 1),
            "actor/skipped": Sum(float(not update.applied)),
        }

    def _plan(self, samples: Sequence[Sample]) -> Any:
        return self.actor.plan(samples, self.config.train.max_tokens_per_micro_batch)

    def _is_probe(self, step: int) -> bool:
        """After the first weight update of this process, and every so many steps."""
        every = self.config.rollout.parity_every
        due = not self.probed or (every > 0 and step % every == 0)
        self.probed = True
        return due

    def _check_parity(self, groups: Sequence[RolloutGroup], log_probs: dict[int, Tensor]) -> dict[str, float]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        largest, mean = parity_gap(rollouts, log_probs)
        tolerance = self.config.rollout.parity_tolerance
        assert tolerance is not None
        check_parity(largest, mean, tolerance, self.actor.version)
        return {"rollout/log_prob_gap_max": largest, "rollout/log_prob_gap_mean": mean}

    def state(self) -> dict[str, Any]:
        return {"source": self.source.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])


def reward_values(groups: Sequence[RolloutGroup]) -> Tensor:
    """One reward per rollout [n] float64, groups one after the other; NaN where it could not be judged."""
    return torch.tensor([reward.value for group in groups for reward in group.rewards], dtype=torch.float64)


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


def is_corrected(config: RolloutCorrectionConfig) -> bool:
    """Whether anything compares the engine's policy with the one that the update starts from."""
    return config.level is not CorrectionLevel.none or bool(config.reject) or config.bypass


def to_samples(groups: Sequence[RolloutGroup], *, drop_truncated: bool = False) -> list[Sample]:
    """Rollouts in order, numbered from 0. A response that could not be judged bears no loss.

    Nor does one that was cut off at the limit with `drop_truncated` (DAPO's overlong filtering); its reward still
    counts in its group.
    """
    pairs = [(group, i) for group in groups for i in range(len(group.rollouts))]
    samples = []
    for number, (group, i) in enumerate(pairs):
        sample = from_example(number, group.prompt.token_ids, group.rollouts[i].token_ids)
        dropped = drop_truncated and group.rollouts[i].finish_reason == "length"
        samples.append(sample.without_loss() if dropped or group.rewards[i].reason is not None else sample)
    return samples


def loss_options(algorithm: AlgorithmConfig) -> dict[str, float | None]:
    """What the policy loss takes of the config."""
    clip = {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high}
    match algorithm.loss:
        case Loss.ppo_clip:
            return clip | {"dual_clip": algorithm.dual_clip or None}
        case Loss.gspo | Loss.geo_mean | Loss.cispo:
            return clip
        case Loss.dppo_tv | Loss.dppo_kl:
            return clip | {"max_ratio": algorithm.max_ratio}
        case Loss.sapo:
            return {
                "temperature_positive": algorithm.temperature_positive,
                "temperature_negative": algorithm.temperature_negative,
            }
        case Loss.dro:
            return {"beta": algorithm.pull}
        case _:
            return {}


def policy_objective(config: GrpoConfig) -> PolicyGradient:
    """The named algorithm with its options filled in."""
    algorithm, ema, correction = config.algorithm, config.ema, config.rollout_correction
    assert algorithm.loss is not None and ema.gradient is not None
    on_policy = updates_per_step(config) == 1 and not correction.bypass
    smoother = None
    if algorithm.loss is Loss.ppo_clip and (ema.axis is not EmaAxis.none or not on_policy):
        smoother = Smoother(axis=ema.axis.value, beta=ema.beta, init=ema.init.value, gradient=ema.gradient.value)
    return PolicyGradient(
        loss=algorithm.loss.value,
        options=loss_options(algorithm),
        entropy_coeff=algorithm.entropy_coeff,
        smoother=smoother,
        kl_estimator=config.kl.estimator.value if config.kl.where is KLPlace.loss else None,
        kl_gradient=config.kl.gradient.value,
        kl_coeff=config.kl.coeff,
        corrected=correction.level is not CorrectionLevel.none,
        opsm_delta=correction.opsm_delta,
        temperature=config.rollout.temperature,
        on_policy=on_policy,
    )


def updates_per_step(config: GrpoConfig) -> int:
    """Optimizer steps that one rollout batch is used for."""
    return config.train.mini_batches_per_step * config.train.epochs_per_step


def build(config: GrpoConfig, mesh: Mesh) -> GrpoTrainer:
    """The trainer on this rank. The reference is the model that training starts from, also when it is continued."""
    parts = Parts(config)
    actor = ModelWorker(config.model, config.optim, mesh, total_steps=config.train.steps * updates_per_step(config))
    reference = ShardedModel(config.model, mesh) if config.kl.where is not KLPlace.none else None
    return GrpoTrainer(config, actor, reference, parts, train_prompts(config, parts.tokenizer))
