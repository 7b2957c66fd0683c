"""Supervised fine-tuning on responses or conversations: the loss of what is demonstrated, and of nothing else."""

from statistics import fmean
from typing import Any

from megatron_rl.checkpoint.store import Role
from megatron_rl.config.schema import SftConfig
from megatron_rl.data.demonstrations import DemonstrationSource
from megatron_rl.data.samples import from_demonstration
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import StepLog
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.trainers.audit import audit_padding, audit_samples
from megatron_rl.trainers.average import kept_average
from megatron_rl.trainers.data import train_demonstrations
from megatron_rl.trainers.likelihood import likelihood_update
from megatron_rl.trainers.parts import Parts
from megatron_rl.trainers.update_metrics import results
from megatron_rl.workers.critic import CriticWorker
from megatron_rl.workers.model_worker import ModelWorker


class SftTrainer:
    """One batch of examples, one update."""

    critic: CriticWorker | None = None

    def __init__(self, config: SftConfig, actor: ModelWorker, parts: Parts, source: DemonstrationSource) -> None:
        self.config, self.actor, self.parts, self.source = config, actor, parts, source
        self.average = kept_average(config, actor)

    def step(self, step: int, timer: Timer) -> StepLog:
        with timer("samples"):
            drawn = self.source.next(self.config.train.batch_size)
            samples = [from_demonstration(number, shown) for number, shown in enumerate(drawn)]
            audit = audit_samples([(shown.prompt.token_ids, shown.token_ids) for shown in drawn], samples)
            audit |= audit_padding(self.parts.tokenizer, self.parts.stop)
        with timer("update_actor"):
            metrics = likelihood_update(self.config, self.actor, self.average, samples)
        with timer("metrics"):
            lengths = [float(sample.loss_mask.sum()) for sample in samples]
            scalars = {
                **results(metrics),
                "response_length/mean": fmean(lengths),
                "perf/total_num_tokens": float(sum(map(len, samples))),
                **audit,
            }
            records = [
                {"id": sample.id, "prompt": shown.prompt.index, "response_length": length}
                for sample, shown, length in zip(samples, drawn, lengths)
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
    return SftTrainer(config, actor, parts, train_demonstrations(config, parts.tokenizer, parts.stop))
