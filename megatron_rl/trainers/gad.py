"""Generative adversarial distillation: answer, be told apart from the teacher, learn to pass for it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_rl.algorithms.discriminator import length_correlation, rewards
from megatron_rl.checkpoint.store import Role
from megatron_rl.config.schema import GadConfig, KLPlace
from megatron_rl.data.chat import encode_response
from megatron_rl.data.samples import weighed
from megatron_rl.data.sources import ExampleSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import StepLog
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.trainers.audit import audit_padding, audit_rollouts
from megatron_rl.trainers.critic import critic_model
from megatron_rl.trainers.data import train_examples
from megatron_rl.trainers.discriminator import Discriminator, Judged, make_pairs
from megatron_rl.trainers.objectives import updates_per_step
from megatron_rl.trainers.parts import Parts, score
from megatron_rl.trainers.policies import Policies
from megatron_rl.trainers.policy_update import PolicyUpdate
from megatron_rl.trainers.rollout_metrics import rollout_histograms, rollout_metrics, sample_records
from megatron_rl.trainers.rollouts import sampling, to_samples
from megatron_rl.trainers.shaping import shaped_rewards, with_advantages
from megatron_rl.trainers.update_metrics import results, update_metrics
from megatron_rl.types import Reward, RolloutGroup
from megatron_rl.workers.average import WeightAverage
from megatron_rl.workers.critic import CriticWorker, Reading
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.objective import NegativeLogLikelihood
from megatron_rl.workers.sharded_model import ShardedModel

NOTHING_TO_SCORE = "no countable token"


class GadTrainer:
    """Rollouts, scores, the policy's update, the critic's; the scores are taken before the critic learns from them.

    First come `sft_steps` in which the policy learns the teacher's responses, then `warmup_steps` in which it rests.
    """

    average: WeightAverage | None = None

    def __init__(
        self,
        config: GadConfig,
        actor: ModelWorker,
        critic: CriticWorker,
        reference: ShardedModel | None,
        parts: Parts,
        source: ExampleSource,
    ) -> None:
        self.config, self.actor, self.critic, self.parts, self.source = config, actor, critic, parts, source
        self.discriminator = Discriminator(
            config.discriminator, critic, stop=parts.stop, max_tokens=config.train.max_tokens_per_micro_batch
        )
        self.update = PolicyUpdate(config, actor, None)
        needs_old = not self.update.objective.on_policy or config.kl.where is KLPlace.reward
        self.policies = Policies(config, actor, reference, parts, needs_old=needs_old)
        self.first_answers: list[list[int]] | None = None  # to the held-out problems, before any step

    def step(self, step: int, timer: Timer) -> StepLog:
        config, parts, options = self.config, self.parts, self.config.discriminator
        with timer("sync"):
            figures = parts.push(self.actor)
        with timer("gen"):
            examples = self.source.next(config.train.batch_size)
            groups = parts.generate([prompt for prompt, _ in examples], sampling(config, step, 0))
        if options.reward_weight:
            with timer("reward"):
                groups = score(parts.pool, groups)
        with timer("critic"):
            judged = self._judge(groups, [response for _, response in examples])
            groups, score_figures = self._rewarded(groups, judged)
        with timer("samples"):
            samples = to_samples(groups, drop_truncated=bool(config.algorithm.drop_truncated))
            figures |= audit_rollouts(groups, samples, parts.stop, config.rollout.stop)
            figures |= audit_padding(parts.tokenizer, parts.stop)
        values = torch.zeros(len(samples), dtype=torch.float64)
        histograms: dict[str, list[float]] = {}
        if step <= options.sft_steps:
            with timer("update_actor"):
                figures |= self._imitate(judged)
        elif step > options.sft_steps + options.warmup_steps:
            samples, policy_figures = self.policies.compare(groups, samples, step, timer)
            with timer("adv"):
                shaped, reward_figures = shaped_rewards(config, groups, samples)
                samples, values = with_advantages(config.algorithm, groups, samples, shaped, None)
            with timer("update_actor"):
                update_figures, histograms = self.update(samples)
            figures |= policy_figures | reward_figures | update_figures
        with timer("update_critic"):
            figures |= self.discriminator.update(judged)
        with timer("metrics"):
            figures |= rollout_metrics(groups, values) | score_figures
            if not options.reward_weight:
                del figures["rollout/correct"]  # nobody has said what is
            scores = {"teacher": judged.teacher_scores, "student": judged.student_scores}
            histograms |= {f"critic/{side}_value": of_side.tolist() for side, of_side in scores.items()}
            return StepLog(figures, histograms | rollout_histograms(groups, values), sample_records(groups, samples))

    def _teacher_ids(self, response: str) -> tuple[int, ...]:
        ids = encode_response(self.parts.tokenizer, response)
        return ids if self.config.discriminator.append_eos else ids[:-1]

    def _judge(self, groups: Sequence[RolloutGroup], responses: Sequence[str]) -> Judged:
        """The rollouts of each prompt against its teacher's response."""
        return self.discriminator.judge(
            *make_pairs(
                [group.prompt.token_ids for group in groups],
                [self._teacher_ids(response) for response in responses],
                [[rollout.token_ids for rollout in group.rollouts] for group in groups],
                [[r.text == response for r in group.rollouts] for group, response in zip(groups, responses)],
            )
        )

    def _rewarded(self, groups: Sequence[RolloutGroup], judged: Judged) -> tuple[list[RolloutGroup], dict[str, float]]:
        """The groups with the critic's rewards; where there is a rule-based one, its part is added."""
        countable = torch.tensor([bool(mask.any()) for mask in judged.masks[: len(judged.pairs)]])
        lengths, values = judged.student_lengths, torch.full((len(judged.pairs),), math.nan, dtype=torch.float64)
        values[countable] = rewards(judged.student_scores[countable], lengths[countable], self.discriminator.loss)
        correlation = length_correlation(values[countable], lengths[countable])
        rest = iter(values.tolist())
        rewarded = []
        for group in groups:
            ruled: Sequence[Reward | None] = group.rewards or [None] * len(group.rollouts)
            rewarded.append(replace(group, rewards=tuple(self._reward(next(rest), rule) for rule in ruled)))
        return rewarded, {"reward/length_corr": correlation}

    def _reward(self, value: float, rule: Reward | None) -> Reward:
        if math.isnan(value):
            return Reward(value=value, reason=NOTHING_TO_SCORE)
        if rule is None:
            return Reward(value=value, parts={"critic": value})
        if rule.reason is not None:
            return rule
        whole = value + self.config.discriminator.reward_weight * rule.value
        return Reward(value=whole, parts={"rule": rule.value, **rule.parts, "critic": value})

    def _imitate(self, judged: Judged) -> dict[str, float]:
        """One supervised update on the teacher's responses."""
        with self.actor.timer("plan"):
            samples = weighed(judged.teachers, "token-mean")
            plan = self.actor.plan(samples, self.config.train.max_tokens_per_micro_batch)
        metrics = self.actor.forward_backward(samples, plan, NegativeLogLikelihood(entropy=False))
        return results(update_metrics("actor", metrics, self.actor.step()))

    def tell_apart(self, answers: Sequence[RolloutGroup]) -> dict[str, float]:
        """`val/*` of fixed pairs: the teacher's held-out responses against the policy's first answers. Collective."""
        if self.first_answers is None:
            self.first_answers = [list(group.rollouts[0].token_ids) for group in answers]
        key = self.config.data.response_key
        responses = [str(group.prompt.row[key]) for group in answers]
        first = [[ids] for ids in self.first_answers]
        sides = make_pairs(
            [group.prompt.token_ids for group in answers],
            [self._teacher_ids(response) for response in responses],
            first,
            [[False]] * len(first),
        )
        judged = self.discriminator.judge(*sides)
        difference = self.discriminator.difference(judged)
        return {
            "val/d_acc": float((difference > 0).double().mean()),
            "val/score_diff": float(difference.mean()),
            "val/length_corr": length_correlation(judged.student_scores, judged.student_lengths),
        }

    def roles(self) -> dict[str, Role]:
        roles = {"actor": self.actor, "critic": self.critic, "reference": self.policies.reference}
        return {name: role for name, role in roles.items() if role is not None}

    def state(self) -> dict[str, Any]:
        return {"source": self.source.state_dict(), "first_answers": self.first_answers}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self.first_answers = state["first_answers"]


def build(config: GadConfig, mesh: Mesh) -> GadTrainer:
    """The trainer on this rank. The reference is the model that training starts from."""
    parts, model = Parts(config), config.model
    imitation, rest = config.discriminator.sft_steps, config.discriminator.warmup_steps
    updates = imitation + max(config.train.steps - imitation - rest, 0) * updates_per_step(config)
    actor = ModelWorker(model, config.optim, mesh, total_steps=updates)
    judge = CriticWorker(
        critic_model(config),
        config.critic.optim,
        mesh,
        total_steps=config.train.steps,
        reading=Reading.at,
    )
    reference = ShardedModel(model, mesh) if config.kl.where is not KLPlace.none else None
    return GadTrainer(config, actor, judge, reference, parts, train_examples(config, parts.tokenizer))
