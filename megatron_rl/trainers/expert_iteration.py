"""Expert iteration: answer, judge, keep what is right, and learn it as if it had been demonstrated."""

from collections.abc import Sequence
from typing import Any

from megatron_rl.checkpoint.store import Role
from megatron_rl.config.schema import ExpertIterationConfig
from megatron_rl.data.samples import Sample
from megatron_rl.data.sources import PromptSource, permutation
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import Metrics, StepLog, Sum, merge
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.trainers.audit import audit_padding, audit_rollouts
from megatron_rl.trainers.average import kept_average
from megatron_rl.trainers.data import train_prompts
from megatron_rl.trainers.likelihood import likelihood_update
from megatron_rl.trainers.objectives import updates_per_step
from megatron_rl.trainers.parity import ParityProbe
from megatron_rl.trainers.parts import Parts
from megatron_rl.trainers.rollout_metrics import rollout_histograms, rollout_metrics, sample_records
from megatron_rl.trainers.rollouts import answer, sampling, to_samples
from megatron_rl.trainers.selection import cut, kept_answers, selection_metrics
from megatron_rl.trainers.update_metrics import results
from megatron_rl.types import RolloutGroup
from megatron_rl.workers.critic import CriticWorker
from megatron_rl.workers.model_worker import ModelWorker


class ExpertIterationTrainer:
    """One rollout batch; what is kept of it is learned `epochs_per_step` times, in mini-batches of one update each."""

    critic: CriticWorker | None = None

    def __init__(self, config: ExpertIterationConfig, actor: ModelWorker, parts: Parts, source: PromptSource) -> None:
        self.config, self.actor, self.parts, self.source = config, actor, parts, source
        self.average = kept_average(config, actor)
        self.parity = ParityProbe(config, actor, parts)

    def step(self, step: int, timer: Timer) -> StepLog:
        config, parts = self.config, self.parts
        with timer("sync"):
            figures = parts.push(self.actor)
        with timer("gen"):
            prompts = self.source.next(config.train.batch_size)
        groups = answer(parts, prompts, sampling(config, step, 0), timer)
        with timer("samples"):
            samples = to_samples(groups)
            figures |= audit_rollouts(groups, samples, parts.stop, config.rollout.stop)
            figures |= audit_padding(parts.tokenizer, parts.stop)
            kept = kept_answers(groups, config.expert)
        figures |= self._compare(groups, samples, step, timer)
        with timer("update_actor"):
            figures |= self._learn([samples[place] for place in kept.places], step)
        with timer("metrics"):
            figures |= rollout_metrics(groups) | selection_metrics(groups, kept)
            return StepLog(figures, rollout_histograms(groups), sample_records(groups, samples))

    def _compare(
        self, groups: Sequence[RolloutGroup], samples: Sequence[Sample], step: int, timer: Timer
    ) -> dict[str, float]:
        """The engine's log-probabilities against the trainer's, now and then."""
        if not self.parity.asks(step):
            return {}
        with timer("old_log_prob"):
            plan = self.actor.plan(samples, self.config.train.max_tokens_per_micro_batch)
            log_probs = self.actor.log_probs(samples, plan, self.config.rollout.temperature)
        with timer("parity"):
            return self.parity.check(groups, log_probs, step)

    def _learn(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """The updates of one step. Where nothing was kept there are none, and weights and learning rate stay."""
        train = self.config.train
        total: Metrics = {"expert/updates": Sum(0.0)}
        for epoch in range(train.epochs_per_step):
            order = permutation(len(samples), train.seed, step, epoch)
            for places in cut(order, train.mini_batches_per_step):
                update = likelihood_update(self.config, self.actor, self.average, [samples[place] for place in places])
                total = merge(total, update | {"expert/updates": Sum(1.0)})
        return results(total)

    def roles(self) -> dict[str, Role]:
        return {"actor": self.actor, **({} if self.average is None else {"average": self.average})}

    def state(self) -> dict[str, Any]:
        return {"source": self.source.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])


def build(config: ExpertIterationConfig, mesh: Mesh) -> ExpertIterationTrainer:
    """The trainer on this rank."""
    parts = Parts(config)
    actor = ModelWorker(config.model, config.optim, mesh, total_steps=config.train.steps * updates_per_step(config))
    return ExpertIterationTrainer(config, actor, parts, train_prompts(config, parts.tokenizer))
