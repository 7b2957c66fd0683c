"""Supervised fine-tuning on prompt/response pairs: the loss of the response tokens, token mean over the batch."""

from typing import Any

from megatron_rl.config.schema import SftConfig
from megatron_rl.data.chat import encode_response
from megatron_rl.data.samples import from_example, weighed
from megatron_rl.data.sources import ExampleSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.trainers.data import train_examples
from megatron_rl.trainers.parts import Parts
from megatron_rl.workers.objective import NegativeLogLikelihood


class SftTrainer:
    """One batch of examples, one update."""

    def __init__(self, config: SftConfig, parts: Parts, source: ExampleSource) -> None:
        self.config, self.parts, self.source = config, parts, source
        self.objective = NegativeLogLikelihood()

    def step(self, step: int, timer: Timer) -> dict[str, float]:
        actor, config = self.parts.actor, self.config
        examples = [
            from_example(i, prompt.token_ids, encode_response(self.parts.tokenizer, response))
            for i, (prompt, response) in enumerate(self.source.next(config.train.batch_size))
        ]
        samples = weighed(examples, "token-mean")
        plan = actor.plan(samples, config.train.max_tokens_per_micro_batch)
        with timer("update_actor"):
            metrics = actor.forward_backward(samples, plan, self.objective)
            update = actor.step()
        return {
            **{name: value.result() for name, value in metrics.items()},
            "actor/grad_norm": update.grad_norm,
            "actor/lr": update.lr,
            "actor/skipped": float(not update.applied),
            "response_length/mean": sum(sample.response_length for sample in samples) / len(samples),
            "perf/total_num_tokens": float(sum(map(len, samples))),
        }

    def state(self) -> dict[str, Any]:
        return {"source": self.source.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])


def build(config: SftConfig, mesh: Mesh) -> SftTrainer:
    """The trainer on this rank."""
    parts = Parts(config, mesh, total_updates=config.train.steps)
    return SftTrainer(config, parts, train_examples(config, parts.tokenizer))
