"""Proximal policy optimisation: answer, judge, ask the critic what was to be expected, update both."""

from typing import Any

from megatron_rl.checkpoint.store import Role
from megatron_rl.config.schema import KLPlace, PpoConfig
from megatron_rl.data.sources import PromptSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import StepLog
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.trainers.audit import audit_padding, audit_rollouts
from megatron_rl.trainers.average import kept_average
from megatron_rl.trainers.critic import critic_model
from megatron_rl.trainers.data import train_prompts
from megatron_rl.trainers.objectives import updates_per_step
from megatron_rl.trainers.parts import Parts
from megatron_rl.trainers.policies import Policies
from megatron_rl.trainers.policy_update import PolicyUpdate
from megatron_rl.trainers.rollout_metrics import rollout_histograms, rollout_metrics, sample_records
from megatron_rl.trainers.rollouts import RolloutBatches, to_samples
from megatron_rl.trainers.shaping import token_rewards
from megatron_rl.trainers.value_update import ValueUpdate, with_estimates
from megatron_rl.workers.critic import CriticWorker, Reading
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.sharded_model import ShardedModel


class PpoTrainer:
    """One rollout batch; the critic's updates on its mini-batches, then after `critic_warmup` steps the policy's."""

    def __init__(
        self,
        config: PpoConfig,
        actor: ModelWorker,
        critic: CriticWorker,
        reference: ShardedModel | None,
        parts: Parts,
        source: PromptSource,
    ) -> None:
        self.config, self.actor, self.critic, self.parts = config, actor, critic, parts
        self.batches = RolloutBatches(config, actor, parts, source)
        self.average = kept_average(config, actor)
        self.update = PolicyUpdate(config, actor, self.average)
        self.value_update = ValueUpdate(config, critic)
        needs_old = not self.update.objective.on_policy or config.kl.where is KLPlace.reward
        self.policies = Policies(config, actor, reference, parts, needs_old=needs_old)

    def step(self, step: int, timer: Timer) -> StepLog:
        config, critic = self.config, self.critic
        groups, figures = self.batches(step, timer)
        with timer("samples"):
            samples = to_samples(groups, drop_truncated=bool(config.algorithm.drop_truncated))
        samples, policy_figures = self.policies.compare(groups, samples, step, timer)
        with timer("samples"):
            figures |= audit_rollouts(groups, samples, self.parts.stop, config.rollout.stop)
            figures |= audit_padding(self.parts.tokenizer, self.parts.stop)
        with timer("values"):
            values = critic.values(samples, critic.plan(samples, config.train.max_tokens_per_micro_batch))
        with timer("adv"):
            rewards, reward_figures = token_rewards(config, groups, samples)
            samples, advantages, value_figures = with_estimates(config.ppo, samples, rewards, values)
        with timer("update_critic"):
            figures |= self.value_update(samples)
        histograms: dict[str, list[float]] = {}
        if step > config.ppo.critic_warmup:
            with timer("update_actor"):
                update_figures, histograms = self.update(samples)
            figures |= update_figures
        with timer("metrics"):
            figures |= policy_figures | reward_figures | value_figures | rollout_metrics(groups, advantages)
            histograms |= rollout_histograms(groups, advantages)
            return StepLog(figures, histograms, sample_records(groups, samples))

    def roles(self) -> dict[str, Role]:
        """The reference too: what training started from may be gone, or another, when the run is continued."""
        roles = {
            "actor": self.actor,
            "critic": self.critic,
            "reference": self.policies.reference,
            "average": self.average,
        }
        return {name: role for name, role in roles.items() if role is not None}

    def state(self) -> dict[str, Any]:
        return self.batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.batches.load_state(state)


def build(config: PpoConfig, mesh: Mesh) -> PpoTrainer:
    """The trainer on this rank. The reference is the model that training starts from."""
    parts, updates = Parts(config), updates_per_step(config)
    steps = max(config.train.steps - config.ppo.critic_warmup, 0)
    actor = ModelWorker(config.model, config.optim, mesh, total_steps=steps * updates)
    critic = CriticWorker(
        critic_model(config),
        config.critic.optim,
        mesh,
        total_steps=config.train.steps * updates,
        reading=Reading.before,
    )
    reference = ShardedModel(config.model, mesh) if config.kl.where is not KLPlace.none else None
    return PpoTrainer(config, actor, critic, reference, parts, train_prompts(config, parts.tokenizer))
