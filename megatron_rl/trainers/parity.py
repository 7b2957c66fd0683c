"""The probe that compares what the engine drew by with what the trainer computes."""

from collections.abc import Sequence

from torch import Tensor

from megatron_rl.config.schema import RolloutTrainerConfig
from megatron_rl.data.samples import from_example
from megatron_rl.rollout.engine import Sampling
from megatron_rl.rollout.sync import check_parity, parity_gap
from megatron_rl.trainers.evaluate import PROBE
from megatron_rl.trainers.parts import Parts
from megatron_rl.types import Prompt, Rollout, RolloutGroup
from megatron_rl.workers.model_worker import ModelWorker

REMEMBERED = 4  # prompts that are asked again after the next update


class ParityProbe:
    """After the first two weight updates of this process, and every so many steps.

    From the second time on, prompts of the time before are answered once more: an engine that keeps what it computed
    with its old weights would begin from that.
    """

    def __init__(self, config: RolloutTrainerConfig, actor: ModelWorker, parts: Parts) -> None:
        self.config, self.actor, self.parts = config, actor, parts
        self.probes = 0
        self.remembered: list[Prompt] = []

    def asks(self, step: int) -> bool:
        """Whether this step is one that compares."""
        return self.probes < 2 or self._is_due(step)

    def check(self, groups: Sequence[RolloutGroup], log_probs: dict[int, Tensor], step: int) -> dict[str, float]:
        """The gap between the two, on the steps that log it; raises ParityError where it is too large.

        `log_probs[i]` are the trainer's for the i-th rollout, at the sampling temperature. Of rollouts that were drawn
        ahead, with other weights, nothing can be said: then the answers to the remembered prompts are compared.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        ahead, version = self.config.rollout.vllm.server.ahead, self.actor.version
        now = [(r, log_probs[i]) for i, r in enumerate(rollouts) if not ahead or r.policy_version == version]
        largest, mean = parity_gap([r for r, _ in now], {i: values for i, (_, values) in enumerate(now)})
        self._compare(largest, mean)
        if self.remembered:
            again = self._asked_again(step)
            self._compare(*again)
            if not now:
                largest, mean = again
        self.remembered = [group.prompt for group in groups[:REMEMBERED]]
        self.probes += 1
        # The probe of a continued run is not in the uninterrupted one's log.
        shown = self._is_due(step)
        return {"rollout/log_prob_gap_max": largest, "rollout/log_prob_gap_mean": mean} if shown else {}

    def _compare(self, largest: float, mean: float) -> None:
        tolerance = self.config.rollout.parity_tolerance
        assert tolerance is not None
        if "parity" not in self.config.guards.ignore:
            check_parity(largest, mean, tolerance, self.actor.version)

    def _asked_again(self, step: int) -> tuple[float, float]:
        """The gap on one token after each remembered prompt."""
        config = self.config
        sampling = Sampling(
            group_size=1,
            max_new_tokens=1,
            temperature=config.rollout.temperature,
            seed=config.train.seed,
            stream=(PROBE, step),
        )
        groups = self.parts.generate(self.remembered, sampling)
        rollouts: list[Rollout] = [group.rollouts[0] for group in groups]
        samples = [
            from_example(number, group.prompt.token_ids, rollout.token_ids)
            for number, (group, rollout) in enumerate(zip(groups, rollouts))
        ]
        plan = self.actor.plan(samples, config.train.max_tokens_per_micro_batch)
        return parity_gap(rollouts, self.actor.log_probs(samples, plan, config.rollout.temperature))

    def _is_due(self, step: int) -> bool:
        every = self.config.rollout.parity_every
        return step == 1 or (every > 0 and step % every == 0)
