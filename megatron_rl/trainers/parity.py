"""The probe that compares what the engine drew by with what the trainer computes."""

from collections.abc import Sequence

from torch import Tensor

from megatron_rl.config.schema import RolloutTrainerConfig
from megatron_rl.rollout.sync import check_parity, parity_gap
from megatron_rl.types import RolloutGroup
from megatron_rl.workers.model_worker import ModelWorker


class ParityProbe:
    """After the first weight update of this process, and every so many steps."""

    def __init__(self, config: RolloutTrainerConfig, actor: ModelWorker) -> None:
        self.config, self.actor = config, actor
        self.probed = False

    def asks(self, step: int) -> bool:
        """Whether this step is one that compares."""
        due = not self.probed or self._is_due(step)
        self.probed = True
        return due

    def check(self, groups: Sequence[RolloutGroup], log_probs: dict[int, Tensor], step: int) -> dict[str, float]:
        """The gap between the two, on the steps that log it; raises ParityError where it is too large.

        `log_probs[i]` are the trainer's for the i-th rollout, at the sampling temperature.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        largest, mean = parity_gap(rollouts, log_probs)
        tolerance = self.config.rollout.parity_tolerance
        assert tolerance is not None
        if "parity" not in self.config.guards.ignore:
            check_parity(largest, mean, tolerance, self.actor.version)
        # The probe of a continued run is not in the uninterrupted one's log.
        shown = self._is_due(step)
        return {"rollout/log_prob_gap_max": largest, "rollout/log_prob_gap_mean": mean} if shown else {}

    def _is_due(self, step: int) -> bool:
        every = self.config.rollout.parity_every
        return step == 1 or (every > 0 and step % every == 0)
