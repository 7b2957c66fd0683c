"""Self-distillation policy optimisation: answer, judge, let the teacher read with more in its prompt, follow it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_rl.checkpoint.store import Role
from megatron_rl.config.schema import SdpoConfig
from megatron_rl.config.sdpo import DistillLoss, TeacherMode, TeacherUpdate
from megatron_rl.data.chat import encode_prompt
from megatron_rl.data.reprompt import RepromptOptions, TeacherContext, teacher_contexts
from megatron_rl.data.samples import Sample, weighed
from megatron_rl.data.sources import PromptSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import Max, Mean, Metrics, StepLog, Sum, merge
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.rollout.sync import push
from megatron_rl.trainers.audit import audit_padding, audit_rollouts
from megatron_rl.trainers.correction import is_corrected
from megatron_rl.trainers.data import train_prompts
from megatron_rl.trainers.objectives import updates_per_step
from megatron_rl.trainers.parts import Parts, score
from megatron_rl.trainers.policies import Policies
from megatron_rl.trainers.rollout_metrics import rollout_histograms, rollout_metrics, sample_records
from megatron_rl.trainers.rollouts import sampling, to_samples
from megatron_rl.types import RolloutGroup
from megatron_rl.workers.distillation import Distillation, Targets
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.teacher import Teacher

Pair = tuple[Sample, Sample]  # what the student reads, and what the teacher reads


class SdpoTrainer:
    """One rollout batch; `epochs_per_step` times its mini-batches, the teacher's pass before the student's update."""

    def __init__(
        self, config: SdpoConfig, actor: ModelWorker, teacher: Teacher, parts: Parts, source: PromptSource
    ) -> None:
        self.config, self.actor, self.teacher, self.parts, self.source = config, actor, teacher, parts, source
        self.average = teacher.average
        self.on_policy = updates_per_step(config) == 1 and not config.rollout_correction.bypass
        needs_old = not self.on_policy and config.distill.is_clip is not None
        self.policies = Policies(config, actor, None, needs_old=needs_old)
        self.options = reprompt_options(config)

    def step(self, step: int, timer: Timer) -> StepLog:
        config, parts = self.config, self.parts
        with timer("sync"):
            check = "weight_checksum" not in config.guards.off
            figures = push(self.actor.named_hf_weights, parts.engine, self.actor.version, check=check)
        with timer("gen"):
            groups = parts.engine.generate(self.source.next(config.train.batch_size), sampling(config, step, 0))
        with timer("reward"):
            groups = score(parts.pool, groups)
        samples = to_samples(groups)
        figures |= audit_rollouts(groups, samples, parts.stop) | audit_padding(parts.tokenizer, parts.stop)
        samples, policy_figures = self.policies.compare(groups, samples, step, timer)
        with timer("reprompt"):
            pairs, context_figures = self._pairs(groups, samples, step)
        with timer("update_actor"):
            update_figures = self._update(pairs)
        nothing = torch.zeros(len(samples), dtype=torch.float64)  # there are no advantages
        figures |= {k: v for k, v in rollout_metrics(groups, nothing).items() if not k.startswith("critic/advantages")}
        histograms = {k: v for k, v in rollout_histograms(groups, nothing).items() if k != "critic/advantages"}
        return StepLog(
            figures | policy_figures | context_figures | update_figures, histograms, sample_records(groups, samples)
        )

    def _pairs(
        self, groups: Sequence[RolloutGroup], samples: Sequence[Sample], step: int
    ) -> tuple[list[Pair | None], dict[str, float]]:
        """Each sample with what its teacher reads; None for one that has no teacher or bears no loss."""
        key = self.config.data.prompt_key

        def encode(value: Any) -> tuple[int, ...]:
            return encode_prompt(self.parts.tokenizer, value, chat=self.config.data.chat.value)[1]

        values = [group.prompt.row[key] for group in groups]
        contexts, metrics = teacher_contexts(
            groups, values, encode, self.options, seed=self.config.train.seed, step=step
        )
        flat = [context for group in contexts for context in group]
        pairs = [_pair(sample, context) for sample, context in zip(samples, flat, strict=True)]
        figures = {name: value.result() for name, value in metrics.items()}
        figures["self_distillation/target_fraction"] = sum(pair is not None for pair in pairs) / len(pairs)
        return pairs, figures

    def _update(self, pairs: Sequence[Pair | None]) -> dict[str, float]:
        """Mini-batches of whole groups, in order; one without any target is skipped, and counted."""
        train, teacher = self.config.train, self.config.teacher
        size = len(pairs) // train.mini_batches_per_step
        total: Metrics = {}
        applied, figures = False, {}
        for _ in range(train.epochs_per_step):
            for start in range(0, len(pairs), size):
                chosen = [pair for pair in pairs[start : start + size] if pair is not None]
                empty: Metrics = {"self_distillation/empty_target_batch": Sum(float(not chosen))}
                total = merge(total, empty)
                if not chosen:
                    continue
                metrics, moved = self._update_once(chosen)
                total, applied = merge(total, metrics), applied or moved
                if moved and teacher.every is TeacherUpdate.step:
                    figures = self.teacher.update()
        if applied and teacher.every is TeacherUpdate.rollout:
            figures = self.teacher.update()
        return {name: value.result() for name, value in total.items()} | figures

    def _update_once(self, pairs: Sequence[Pair]) -> tuple[Metrics, bool]:
        config, budget = self.config, self.config.train.max_tokens_per_micro_batch
        mini_batch = weighed(
            [student for student, _ in pairs], config.distill.aggregation, horizon=config.rollout.max_new_tokens
        )
        plan = self.actor.plan(mini_batch, budget)
        targets, other = self.teacher.targets([read for _, read in pairs], plan, budget)
        objective = distillation(
            config, targets, other, vocab_size=self.actor.shape.vocab_size, on_policy=self.on_policy
        )
        stats = self.actor.forward_backward(mini_batch, plan, objective)
        update = self.actor.step()
        metrics: Metrics = {name: Mean(v.value, 1) if isinstance(v, Sum) else v for name, v in stats.items()} | {
            "actor/grad_norm": Max(update.grad_norm),
            "actor/lr": Mean(update.lr, 1),
            "actor/skipped": Sum(float(not update.applied)),
        }
        return metrics, update.applied

    def roles(self) -> dict[str, Role]:
        """A live teacher is the actor, and has nothing of its own."""
        live = self.config.teacher.mode is TeacherMode.live
        return {"actor": self.actor, **({} if live else {"teacher": self.teacher})}

    def state(self) -> dict[str, Any]:
        return {"source": self.source.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])


def _pair(sample: Sample, context: TeacherContext | None) -> Pair | None:
    if context is None or not sample.loss_mask.any():
        return None
    prompt = torch.tensor(context.token_ids, dtype=torch.int64)
    tokens = torch.cat([prompt, sample.token_ids[sample.prompt_length :]])
    return sample, replace(sample, token_ids=tokens, prompt_length=len(prompt), fields={})


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
    """The config's objective for one mini-batch's targets."""
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
        temperature=config.rollout.temperature,
        on_policy=on_policy or distill.is_clip is None,
    )


def build(config: SdpoConfig, mesh: Mesh) -> SdpoTrainer:
    """The trainer on this rank."""
    parts = Parts(config)
    actor = ModelWorker(config.model, config.optim, mesh, total_steps=config.train.steps * updates_per_step(config))
    teacher = Teacher(config.model, config.teacher, actor)
    return SdpoTrainer(config, actor, teacher, parts, train_prompts(config, parts.tokenizer))
