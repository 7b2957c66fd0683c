"""Group-relative policy optimisation: answer, judge, compare within the group, update."""

from typing import Any

from megatron_rl.checkpoint.store import Role
from megatron_rl.config.schema import GrpoConfig, KLPlace
from megatron_rl.data.sources import PromptSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import StepLog
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.trainers.audit import audit_padding, audit_rollouts
from megatron_rl.trainers.average import kept_average
from megatron_rl.trainers.data import train_prompts
from megatron_rl.trainers.objectives import updates_per_step
from megatron_rl.trainers.parts import Parts
from megatron_rl.trainers.policies import Policies
from megatron_rl.trainers.policy_update import PolicyUpdate
from megatron_rl.trainers.rollout_metrics import rollout_histograms, rollout_metrics, sample_records
from megatron_rl.trainers.rollouts import RolloutBatches, greedy_rewards, to_samples
from megatron_rl.trainers.shaping import shaped_rewards, with_advantages
from megatron_rl.workers.critic import CriticWorker
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.sharded_model import ShardedModel


class GrpoTrainer:
    """One rollout batch; `epochs_per_step` times its mini-batches, one update each."""

    critic: CriticWorker | None = None

    def __init__(
        self, config: GrpoConfig, actor: ModelWorker, reference: ShardedModel | None, parts: Parts, source: PromptSource
    ) -> None:
        self.config, self.actor, self.parts = config, actor, parts
        self.batches = RolloutBatches(config, actor, parts, source)
        self.average = kept_average(config, actor)
        self.update = PolicyUpdate(config, actor, self.average)
        needs_old = not self.update.objective.on_policy or config.kl.where is KLPlace.reward
        self.policies = Policies(config, actor, reference, parts, needs_old=needs_old)

    def step(self, step: int, timer: Timer) -> StepLog:
        config = self.config
        groups, figures = self.batches(step, timer)
        greedy = greedy_rewards(config, self.parts, groups, timer)
        with timer("samples"):
            samples = to_samples(groups, drop_truncated=bool(config.algorithm.drop_truncated))
        samples, policy_figures = self.policies.compare(groups, samples, step, timer)
        with timer("samples"):
            audit = audit_rollouts(groups, samples, self.parts.stop, config.rollout.stop)
            audit |= audit_padding(self.parts.tokenizer, self.parts.stop)
        with timer("adv"):
            rewards, reward_figures = shaped_rewards(config, groups, samples)
            samples, values = with_advantages(config.algorithm, groups, samples, rewards, greedy)
        with timer("update_actor"):
            update_figures, histograms = self.update(samples)
        with timer("metrics"):
            histograms |= rollout_histograms(groups, values)
            figures |= rollout_metrics(groups, values) | audit
            figures |= policy_figures | reward_figures | update_figures
            return StepLog(figures, histograms, sample_records(groups, samples))

    def roles(self) -> dict[str, Role]:
        """The reference too: what training started from may be gone, or another, when the run is continued."""
        roles = {"actor": self.actor, "reference": self.policies.reference, "average": self.average}
        return {name: role for name, role in roles.items() if role is not None}

    def state(self) -> dict[str, Any]:
        return self.batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.batches.load_state(state)


def build(config: GrpoConfig, mesh: Mesh) -> GrpoTrainer:
    """The trainer on this rank. The reference is the model that training starts from."""
    parts = Parts(config)
    actor = ModelWorker(config.model, config.optim, mesh, total_steps=config.train.steps * updates_per_step(config))
    reference = ShardedModel(config.model, mesh) if config.kl.where is not KLPlace.none else None
    return GrpoTrainer(config, actor, reference, parts, train_prompts(config, parts.tokenizer))
