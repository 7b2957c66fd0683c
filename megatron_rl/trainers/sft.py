"""Supervised fine-tuning on prompt/response pairs: the loss of the response tokens, token mean over the batch."""

from statistics import fmean
from typing import Any

from megatron_rl.checkpoint.store import Role
from megatron_rl.config.schema import SftConfig
from megatron_rl.data.chat import encode_response
from megatron_rl.data.samples import from_example, weighed
from megatron_rl.data.sources import ExampleSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import StepLog
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.trainers.audit import audit_padding, audit_samples
from megatron_rl.trainers.average import kept_average, take_step
from megatron_rl.trainers.data import train_examples
from megatron_rl.trainers.parts import Parts
from megatron_rl.trainers.update_metrics import results, update_metrics
from megatron_rl.workers.critic import CriticWorker
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.objective import NegativeLogLikelihood


class SftTrainer:
    """One batch of examples, one update."""

    critic: CriticWorker | None = None

    def __init__(self, config: SftConfig, actor: ModelWorker, parts: Parts, source: ExampleSource) -> None:
        self.config, self.actor, self.parts, self.source = config, actor, parts, source
        self.objective = NegativeLogLikelihood()
        self.average = kept_average(config, actor)

    def step(self, step: int, timer: Timer) -> StepLog:
        actor, config = self.actor, self.config
        drawn = self.source.next(config.train.batch_size)
        pairs = [(prompt.token_ids, encode_response(self.parts.tokenizer, response)) for prompt, response in drawn]
        examples = [from_example(i, *pair) for i, pair in enumerate(pairs)]
        samples = weighed(examples, "token-mean")
        plan = actor.plan(samples, config.train.max_tokens_per_micro_batch)
        with timer("update_actor"):
            metrics = actor.forward_backward(samples, plan, self.objective)
            update = take_step(actor, self.average)
        lengths = [float(sample.response_length) for sample in samples]
        scalars = {
            **results(update_metrics("actor", metrics, update)),
            "response_length/mean": fmean(lengths),
            "perf/total_num_tokens": float(sum(map(len, samples))),
            **audit_samples(pairs, samples),
            **audit_padding(self.parts.tokenizer, self.parts.stop),
        }
        records = [
            {"id": sample.id, "prompt": prompt.index, "response_length": sample.response_length}
            for sample, (prompt, _) in zip(samples, drawn)
        ]
        return StepLog(scalars, {"response_length": lengths}, records)

    def roles(self) -> dict[str, Role]:
        return {"actor": self.actor, **({} if self.average is None else {"average": self.average})}

    def state(self) -> dict[str, Any]:
        return {"source": self.source.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])


def build(config: SftConfig, mesh: Mesh) -> SftTrainer:
    """The trainer on this rank."""
    parts = Parts(config)
    actor = ModelWorker(config.model, config.optim, mesh, total_steps=config.train.steps)
    return SftTrainer(config, actor, parts, train_examples(config, parts.tokenizer))
