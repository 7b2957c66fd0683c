"""From values of tokens to what is learned from them, and the critic's updates on it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.algorithms import advantages
from megatron_rl.algorithms.value_loss import explained_variance
from megatron_rl.config.critic import PpoOptions
from megatron_rl.config.schema import PpoConfig
from megatron_rl.data.samples import Sample, weighed
from megatron_rl.metrics.types import Max, Metrics, merge
from megatron_rl.trainers.rollout_metrics import summary
from megatron_rl.trainers.update_metrics import results, update_metrics
from megatron_rl.workers.critic import CriticWorker, ValueRegression


def with_estimates(
    options: PpoOptions, samples: Sequence[Sample], rewards: Tensor, values: Mapping[int, Tensor]
) -> tuple[list[Sample], Tensor, dict[str, float]]:
    """The samples with `advantages`, `returns` and `old_values`; all of the first [N]; and figures.

    `rewards` [N] are those of the loss-bearing tokens of all samples, `values` by sample those of the states before
    them.
    """
    lengths = [int(sample.loss_mask.sum()) for sample in samples]
    before = torch.cat([values[sample.id] for sample in samples]).double()
    ids = torch.arange(len(samples)).repeat_interleave(torch.tensor(lengths))
    gained, returns = advantages.gae(rewards, before, ids, gamma=options.gamma, lam=options.lam)
    if options.whiten:
        gained = advantages.whiten(gained)
    parts = zip(samples, gained.split(lengths), returns.split(lengths), before.split(lengths), strict=True)
    estimated = [
        sample.with_loss_field("advantages", a).with_loss_field("returns", r).with_loss_field("old_values", v)
        for sample, a, r, v in parts
    ]
    figures = summary("critic/returns", returns.tolist()) | summary("critic/values", before.tolist())
    return estimated, gained, figures | {"critic/vf_explained_var": explained_variance(before, returns)}


class ValueUpdate:
    """The critic learns the returns on the mini-batches of the policy's update, one step each."""

    def __init__(self, config: PpoConfig, critic: CriticWorker) -> None:
        self.config, self.critic = config, critic
        self.objective = ValueRegression(config.ppo.value_clip)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, float]:
        """The figures of one rollout batch, the loss as its mean over the updates. Collective."""
        train = self.config.train
        size = len(samples) // train.mini_batches_per_step
        total: Metrics = {}
        for _ in range(train.epochs_per_step):
            for start in range(0, len(samples), size):
                total = merge(total, self._once(samples[start : start + size]))
        return results(total)

    def _once(self, samples: Sequence[Sample]) -> Metrics:
        with self.critic.timer("plan"):
            mini_batch = weighed(samples, "token-mean")
            plan = self.critic.plan(mini_batch, self.config.train.max_tokens_per_micro_batch)
        stats = self.critic.forward_backward(mini_batch, plan, self.objective)
        update = self.critic.step()
        clipped = Max(min(update.grad_norm, self.critic.clip_grad))
        return update_metrics("critic", stats, update) | {"critic/grad_norm_clipped": clipped}
