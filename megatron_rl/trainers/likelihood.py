"""One update towards given tokens, whoever wrote them."""

from collections.abc import Sequence

from megatron_rl.config.schema import LikelihoodConfig
from megatron_rl.data.samples import Sample, weighed
from megatron_rl.metrics.types import Metrics
from megatron_rl.trainers.average import take_step
from megatron_rl.trainers.update_metrics import update_metrics
from megatron_rl.workers.average import WeightAverage
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.objective import NegativeLogLikelihood


def weighed_by(config: LikelihoodConfig, samples: Sequence[Sample]) -> list[Sample]:
    """The samples of one update with their tokens' weights, as `train.aggregation` says."""
    return weighed(samples, config.train.aggregation, horizon=config.train.normalizer)


def likelihood_update(
    config: LikelihoodConfig, actor: ModelWorker, average: WeightAverage | None, samples: Sequence[Sample]
) -> Metrics:
    """-sum_t w_t log pi(y_t) over the loss-bearing tokens of all samples, and one optimizer step. Collective."""
    with actor.timer("plan"):
        batch = weighed_by(config, samples)
        plan = actor.plan(batch, config.train.max_tokens_per_micro_batch)
    stats = actor.forward_backward(batch, plan, NegativeLogLikelihood())
    return update_metrics("actor", stats, take_step(actor, average))
