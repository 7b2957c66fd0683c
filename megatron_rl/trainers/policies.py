"""The policies that an update compares: the engine's, the one it starts from, and the reference."""

from collections.abc import Sequence

from megatron_rl.config.schema import PolicyConfig
from megatron_rl.data.planner import StepPlan
from megatron_rl.data.samples import Sample
from megatron_rl.metrics.timing import Timer
from megatron_rl.trainers.correction import correct, is_corrected, with_rollout_log_probs
from megatron_rl.trainers.parity import ParityProbe
from megatron_rl.trainers.parts import Parts
from megatron_rl.types import RolloutGroup
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.sharded_model import ShardedModel


class Policies:
    """Log-probabilities of the rollouts under each policy that the config needs, and the probe that compares two."""

    def __init__(
        self,
        config: PolicyConfig,
        actor: ModelWorker,
        reference: ShardedModel | None,
        parts: Parts,
        *,
        needs_old: bool,
    ) -> None:
        self.config, self.actor, self.reference = config, actor, reference
        correction = config.rollout_correction
        self.needs_old = not correction.bypass and (needs_old or is_corrected(correction))
        self.parity = ParityProbe(config, actor, parts)

    def compare(
        self, groups: Sequence[RolloutGroup], samples: list[Sample], step: int, timer: Timer
    ) -> tuple[list[Sample], dict[str, float]]:
        """Log-probabilities of the policies that the loss compares with, and the correction between them."""
        config, temperature = self.config, self.config.rollout.temperature
        metrics: dict[str, float] = {}
        probe = self.parity.asks(step)
        if probe or self.needs_old:
            with timer("old_log_prob"):
                log_probs = self.actor.log_probs(samples, self._plan(samples), temperature)
                samples = [sample.with_loss_field("old_log_probs", log_probs[sample.id]) for sample in samples]
            if probe:
                with timer("parity"):
                    metrics |= self.parity.check(groups, log_probs, step)
        if self.reference is not None:
            with timer("ref"):
                log_probs = self.reference.log_probs(samples, self._plan(samples), temperature)
                samples = [sample.with_loss_field("ref_log_probs", log_probs[sample.id]) for sample in samples]
        if is_corrected(config.rollout_correction):
            with timer("correction"):
                samples, figures = self._corrected(groups, samples)
            metrics |= figures
        return samples, metrics

    def _corrected(
        self, groups: Sequence[RolloutGroup], samples: list[Sample]
    ) -> tuple[list[Sample], dict[str, float]]:
        samples = with_rollout_log_probs(samples, groups)
        if self.config.rollout_correction.bypass:
            samples = [sample.with_field("old_log_probs", sample.fields["rollout_log_probs"]) for sample in samples]
        return correct(samples, self.config.rollout_correction)

    def _plan(self, samples: Sequence[Sample]) -> StepPlan:
        return self.actor.plan(samples, self.config.train.max_tokens_per_micro_batch)
