"""Self-distillation policy optimisation: answer, judge, let the teacher read with more in its prompt, follow it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from megatron_rl.algorithms.distill import pass_rate_weights
from megatron_rl.checkpoint.store import Role
from megatron_rl.config.schema import SdpoConfig
from megatron_rl.config.sdpo import DistillLoss, SuccessWeighting, TeacherMode
from megatron_rl.data.reprompt import RepromptOptions, teacher_contexts
from megatron_rl.data.samples import Sample, weighed, weighed_targets
from megatron_rl.data.sources import PromptSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import Metrics, StepLog, Sum, merge
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.trainers.audit import audit_padding, audit_rollouts
from megatron_rl.trainers.correction import is_corrected
from megatron_rl.trainers.data import prompt_encoder, train_prompts
from megatron_rl.trainers.objectives import is_on_policy, policy_gradient, updates_per_step
from megatron_rl.trainers.parts import Parts
from megatron_rl.trainers.policies import Policies
from megatron_rl.trainers.rollout_metrics import rollout_histograms, rollout_metrics, sample_records
from megatron_rl.trainers.rollouts import RolloutBatches, greedy_rewards, to_samples
from megatron_rl.trainers.shaping import reward_values, shaped_rewards, with_advantages
from megatron_rl.trainers.update_metrics import results, update_metrics
from megatron_rl.types import RolloutGroup
from megatron_rl.workers.critic import CriticWorker
from megatron_rl.workers.distillation import Distillation, Targets
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.teacher import Teacher

# What is known of advantages; without a policy loss there are none.
OF_ADVANTAGES = ("critic/advantages", "rollout/silent_groups")


class Pair(NamedTuple):
    """A sample, what its teacher reads, and what its distillation counts; None where it has no target.

    For such a one the teacher reads the sample itself, where it is asked at all.
    """

    sample: Sample
    read: Sample
    factor: float | None


class SdpoTrainer:
    """One rollout batch; `epochs_per_step` times its mini-batches, the teacher's pass before the student's update.

    Where it `blends`, responses without a target count in the policy loss; otherwise they are left out.
    """

    critic: CriticWorker | None = None

    def __init__(
        self, config: SdpoConfig, actor: ModelWorker, teacher: Teacher, parts: Parts, source: PromptSource
    ) -> None:
        self.config, self.actor, self.teacher, self.parts = config, actor, teacher, parts
        self.batches = RolloutBatches(config, actor, parts, source)
        self.average = teacher.average
        self.blends = config.distill.weight < 1
        self.on_policy = is_on_policy(config)
        needs_old = not self.on_policy and (self.blends or config.distill.is_clip is not None)
        self.policies = Policies(config, actor, None, parts, needs_old=needs_old)
        self.options = reprompt_options(config)
        self.encoder = prompt_encoder(config.data, parts.tokenizer)

    def step(self, step: int, timer: Timer) -> StepLog:
        config, parts = self.config, self.parts
        groups, figures = self.batches(step, timer)
        greedy = greedy_rewards(config, parts, groups, timer)
        with timer("samples"):
            samples = to_samples(groups, drop_truncated=bool(config.algorithm.drop_truncated))
            figures |= audit_rollouts(groups, samples, parts.stop, config.rollout.stop)
            figures |= audit_padding(parts.tokenizer, parts.stop)
        samples, policy_figures = self.policies.compare(groups, samples, step, timer)
        with timer("adv"):
            rewards, reward_figures = shaped_rewards(config, groups, samples)
            samples, values = with_advantages(config.algorithm, groups, samples, rewards, greedy)
        with timer("reprompt"):
            pairs, context_figures = self._pairs(groups, samples, step)
        with timer("update_actor"):
            update_figures = self._update(pairs)
        with timer("metrics"):
            figures |= rollout_metrics(groups, values) | policy_figures | reward_figures
            figures |= context_figures | update_figures
            histograms = rollout_histograms(groups, values)
            if not self.blends:
                figures = {name: value for name, value in figures.items() if not name.startswith(OF_ADVANTAGES)}
                histograms = {name: value for name, value in histograms.items() if not name.startswith(OF_ADVANTAGES)}
            return StepLog(figures, histograms, sample_records(groups, samples))

    def _pairs(
        self, groups: Sequence[RolloutGroup], samples: Sequence[Sample], step: int
    ) -> tuple[list[Pair], dict[str, float]]:
        """Each sample with its teacher's; one without a teacher or without loss-bearing tokens has no target."""
        key = self.config.data.prompt_key

        def encode(value: Any) -> tuple[int, ...]:
            return self.encoder.encode(value)[1]

        values = [group.prompt.row[key] for group in groups]
        contexts, metrics = teacher_contexts(
            groups, values, encode, self.options, seed=self.config.train.seed, step=step
        )
        read = [None if context is None else context.token_ids for group in contexts for context in group]
        held = [ids is not None and bool(sample.loss_mask.any()) for ids, sample in zip(read, samples, strict=True)]
        pairs = [
            Pair(sample, sample if factor is None or ids is None else _after(ids, sample), factor)
            for sample, ids, factor in zip(samples, read, self._factors(groups, held), strict=True)
        ]
        figures = {name: value.result() for name, value in metrics.items()}
        figures["self_distillation/target_fraction"] = sum(bool(pair.factor) for pair in pairs) / len(pairs)
        return pairs, figures

    def _factors(self, groups: Sequence[RolloutGroup], held: Sequence[bool]) -> list[float | None]:
        """What the distillation of each response counts, by successes; None for those without a target.

        `held` are the responses that could have one.
        """
        rewards, targets = reward_values(groups), torch.tensor(held)
        threshold, weighting = self.config.reprompt.success_threshold, self.config.distill.success_weighting
        factors = torch.ones_like(rewards)
        if weighting is SuccessWeighting.failed:
            targets &= ~(rewards >= threshold)
        elif weighting is SuccessWeighting.pass_rate:
            group_ids = torch.tensor([place for place, group in enumerate(groups) for _ in group.rewards])
            factors = pass_rate_weights(rewards, group_ids, targets, threshold=threshold)
        return [factor if target else None for factor, target in zip(factors.tolist(), targets.tolist(), strict=True)]

    def _update(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Mini-batches of whole groups, in order. One without any target is counted, and skipped unless it blends."""
        train = self.config.train
        size = len(pairs) // train.mini_batches_per_step
        total: Metrics = {}
        applied = False
        figures: dict[str, float] = {}
        for _ in range(train.epochs_per_step):
            for start in range(0, len(pairs), size):
                chosen = [pair for pair in pairs[start : start + size] if self.blends or pair.factor is not None]
                teaches = any(pair.factor for pair in chosen)
                empty: Metrics = {"self_distillation/empty_target_batch": Sum(float(not teaches))}
                total = merge(total, empty)
                if not (teaches or self.blends):
                    continue
                metrics, moved = self._update_once(chosen)
                total, applied = merge(total, metrics), applied or moved
                if moved:
                    with self.actor.timer("average"):
                        figures |= self.teacher.after_step()
        if applied:
            with self.actor.timer("average"):
                figures |= self.teacher.after_batch()
        return results(total) | figures

    def _update_once(self, pairs: Sequence[Pair]) -> tuple[Metrics, bool]:
        config, budget = self.config, self.config.train.max_tokens_per_micro_batch
        with self.actor.timer("plan"):
            mini_batch = with_weights(config, [pair.sample for pair in pairs], [pair.factor for pair in pairs])
            plan = self.actor.plan(mini_batch, budget)
        with self.actor.timer("teacher"):
            targets, other = self.teacher.targets([pair.read for pair in pairs], plan, budget)
        objective = distillation(
            config, targets, other, vocab_size=self.actor.shape.vocab_size, on_policy=self.on_policy
        )
        stats = self.actor.forward_backward(mini_batch, plan, objective)
        update = self.actor.step()
        return update_metrics("actor", stats, update), update.applied

    def roles(self) -> dict[str, Role]:
        """A live teacher is the actor, and has nothing of its own."""
        live = self.config.teacher.mode is TeacherMode.live
        return {"actor": self.actor, **({} if live else {"teacher": self.teacher})}

    def state(self) -> dict[str, Any]:
        return self.batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.batches.load_state(state)


def _after(prompt_ids: Sequence[int], sample: Sample) -> Sample:
    """The sample's response after another prompt."""
    prompt = torch.tensor(prompt_ids, dtype=torch.int64)
    tokens = torch.cat([prompt, sample.token_ids[sample.prompt_length :]])
    return replace(sample, token_ids=tokens, prompt_length=len(prompt), fields={})


def with_weights(config: SdpoConfig, samples: Sequence[Sample], factors: Sequence[float | None]) -> list[Sample]:
    """The samples of one mini-batch with the weights of both losses; `factors` as a `Pair` has them."""
    horizon = config.rollout.max_new_tokens
    samples = weighed(samples, str(config.algorithm.aggregation), horizon=horizon)
    return weighed_targets(samples, factors, config.distill.aggregation, horizon=horizon)


def reprompt_options(config: SdpoConfig) -> RepromptOptions:
    """The config's section as data/reprompt.py takes it; ValueError where a template cannot be filled."""
    r = config.reprompt
    assert r.max_tokens is not None
    return RepromptOptions(
        success_threshold=r.success_threshold,
        choice=r.choice.value,
        exclude_self=r.exclude_self,
        remove_thinking=r.remove_thinking,
        feedback=r.feedback.value,
        reprompt_template=r.reprompt_template,
        solution_template=r.solution_template,
        feedback_template=r.feedback_template,
        max_tokens=r.max_tokens,
        overlong=r.overlong.value,
    )


def distillation(
    config: SdpoConfig, targets: Targets, other: Targets | None, *, vocab_size: int, on_policy: bool
) -> Distillation:
    """The config's objective for one mini-batch's targets, with the policy loss where that counts."""
    distill = config.distill
    return Distillation(
        targets=targets,
        other=other,
        mix=config.teacher.rate,
        support=distill.support.value,
        topk=min(distill.topk, vocab_size),
        alpha=distill.alpha,
        tail=distill.tail.value,
        sampled=distill.loss is DistillLoss.sampled_token,
        is_clip=None if on_policy else distill.is_clip,
        corrected=is_corrected(config.rollout_correction),
        entropy_weighting=distill.entropy_weighting,
        weight=distill.weight,
        policy=replace(policy_gradient(config), on_policy=on_policy) if distill.weight < 1 else None,
        temperature=config.rollout.temperature,
        on_policy=on_policy or distill.is_clip is None,
    )


def build(config: SdpoConfig, mesh: Mesh) -> SdpoTrainer:
    """The trainer on this rank."""
    parts = Parts(config)
    actor = ModelWorker(config.model, config.optim, mesh, total_steps=config.train.steps * updates_per_step(config))
    teacher = Teacher(config.model, config.teacher, actor)
    return SdpoTrainer(config, actor, teacher, parts, train_prompts(config, parts.tokenizer))
