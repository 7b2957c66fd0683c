"""The updates of a policy that one rollout batch is used for."""

from collections.abc import Sequence
from statistics import fmean

import torch

from megatron_rl.config.schema import PolicyGradientConfig
from megatron_rl.data.samples import Sample, weighed
from megatron_rl.metrics.types import Metrics, merge
from megatron_rl.trainers.average import take_step
from megatron_rl.trainers.objectives import policy_objective
from megatron_rl.trainers.update_metrics import results, update_metrics
from megatron_rl.workers.average import WeightAverage
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.smoothing import Record


class PolicyUpdate:
    """`epochs_per_step` times the mini-batches of whole groups, in order, one update each.

    Samples have advantages, and what else the config's objective reads.
    """

    def __init__(self, config: PolicyGradientConfig, actor: ModelWorker, average: WeightAverage | None) -> None:
        self.config, self.actor, self.average = config, actor, average
        self.objective = policy_objective(config)

    def __call__(self, samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The figures of one rollout batch, a loss as its mean over the updates; distributions of the last one."""
        train, smoother = self.config.train, self.objective.smoother
        size = len(samples) // train.mini_batches_per_step
        total: Metrics = {}
        records: list[Record] = []
        smoothing: dict[str, list[float]] = {}
        if smoother is not None:
            smoother.forget()
        for epoch in range(train.epochs_per_step):
            for start in range(0, len(samples), size):
                if smoother is not None:
                    smoother.begin()
                    smoother.visit = epoch
                per_update = self._once(samples[start : start + size])
                if smoother is not None:
                    with self.actor.timer("smoothing"):
                        records = self.actor.gather(smoother.records)
                        states = sum(self.actor.gather([len(smoother.averages)]))
                        for name, value in smoother.metrics(records, states).items():
                            smoothing.setdefault(name, []).append(value)
                total = merge(total, per_update) if total else per_update
        figures = results(total)
        return figures | {name: fmean(values) for name, values in smoothing.items()}, _histograms(records)

    def _once(self, samples: Sequence[Sample]) -> Metrics:
        config = self.config
        with self.actor.timer("plan"):
            mini_batch = weighed(samples, str(config.algorithm.aggregation), horizon=config.rollout.max_new_tokens)
            plan = self.actor.plan(mini_batch, config.train.max_tokens_per_micro_batch)
        stats = self.actor.forward_backward(mini_batch, plan, self.objective)
        return update_metrics("actor", stats, take_step(self.actor, self.average))


def _histograms(records: Sequence[Record]) -> dict[str, list[float]]:
    if not records:
        return {}
    raw, smoothed, _ = (torch.cat(parts).tolist() for parts in zip(*records))
    return {"ema/raw_weights": raw, "ema/smoothed_weights": smoothed}
