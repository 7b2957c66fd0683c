"""Supervised fine-tuning on prompt/response pairs: the loss of the response tokens."""

from statistics import fmean
from typing import Any

from megatron_rl.checkpoint.store import Role
from megatron_rl.config.schema import SftConfig
from megatron_rl.data.chat import encode_response
from megatron_rl.data.samples import from_example
from megatron_rl.data.sources import ExampleSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import StepLog
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.trainers.audit import audit_padding, audit_samples
from megatron_rl.trainers.average import kept_average
from megatron_rl.trainers.data import train_examples
from megatron_rl.trainers.likelihood import likelihood_update
from megatron_rl.trainers.parts import Parts
from megatron_rl.trainers.update_metrics import results
from megatron_rl.workers.critic import CriticWorker
from megatron_rl.workers.model_worker import ModelWorker


class SftTrainer:
    """One batch of examples, one update."""

    critic: CriticWorker | None = None

    def __init__(self, config: SftConfig, actor: ModelWorker, parts: Parts, source: ExampleSource) -> None:
        self.config, self.actor, self.parts, self.source = config, actor, parts, source
        self.average = kept_average(config, actor)

    def step(self, step: int, timer: Timer) -> StepLog:
        drawn = self.source.next(self.config.train.batch_size)
        pairs = [(prompt.token_ids, encode_response(self.parts.tokenizer, response)) for prompt, response in drawn]
        samples = [from_example(i, *pair) for i, pair in enumerate(pairs)]
        with timer("update_actor"):
            metrics = likelihood_update(self.config, self.actor, self.average, samples)
        lengths = [float(sample.response_length) for sample in samples]
        scalars = {
            **results(metrics),
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
