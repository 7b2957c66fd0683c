"""A critic: the model's body under a scalar head of its own. It has a value for every token that bears loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.algorithms.value_loss import value_loss
from megatron_rl.checkpoint.hf import SafetensorsReader
from megatron_rl.checkpoint.store import find_checkpoint, load_weights, read_state
from megatron_rl.config.schema import PRETRAINED, RANDOM, ModelConfig, OptimConfig
from megatron_rl.data.collate import MicroBatch, scatter_back
from megatron_rl.data.planner import StepPlan
from megatron_rl.data.samples import Sample
from megatron_rl.metrics.types import Sum
from megatron_rl.models.build import weight_map
from megatron_rl.models.exchange import import_weights
from megatron_rl.models.hf_config import ModelShape, load_shape
from megatron_rl.models.hf_map import SCALAR_HEAD
from megatron_rl.models.random_weights import RandomWeights, WithScalarHead, scalar_head
from megatron_rl.ops.segments import segment_mean
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.parallel.schedule import LossFunction, run_schedule
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.objective import Outcome, token_mean

ROLE = "critic"
HEAD = SCALAR_HEAD.megatron


class Reading(Enum):
    """Where a token's value is read: at its own position, where the model has seen it, or at the one before."""

    at = 1
    before = 0


@dataclass(frozen=True, slots=True)
class ValueTokens:
    """What an objective of a critic sees: the values [N] float32 of the loss-bearing tokens of a micro-batch."""

    values: Tensor
    batch: MicroBatch


@dataclass(frozen=True, slots=True)
class WeighedValues:
    """sum_t w_t v_t. With w_t the slope of any loss with respect to v_t, its gradient is that loss's."""

    field_names: tuple[str, ...] = ("slopes",)

    def __call__(self, tokens: ValueTokens) -> Outcome:
        loss = (tokens.batch.fields["slopes"] * tokens.values).sum()
        return Outcome(loss, {"critic/weighed_values": Sum(float(loss.detach()))})


@dataclass(frozen=True, slots=True)
class ValueRegression:
    """PPO's loss of a value function: sum_t w_t l_t, with l of `algorithms/value_loss.py` and its `clip`."""

    clip: float | None
    field_names: tuple[str, ...] = ("weights", "returns", "old_values")

    def __call__(self, tokens: ValueTokens) -> Outcome:
        fields = tokens.batch.fields
        per_token = value_loss(tokens.values, fields["old_values"], fields["returns"], clip=self.clip)
        loss = (fields["weights"] * per_token.loss).sum()
        return Outcome(
            loss,
            {
                "critic/vf_loss": Sum(float(loss.detach())),
                "critic/vf_clipfrac": token_mean(per_token.clipped.float()),
                "critic/vpred_mean": token_mean(tokens.values),
            },
        )


def pooled(values: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """The scores [B] float64 of responses: of each the mean of those of its values [n_i] that its mask counts."""
    bounds = torch.tensor([0, *accumulate(map(len, values))])
    together = torch.cat([torch.empty(0, dtype=torch.float64), *values])
    return segment_mean(together, torch.cat([torch.empty(0, dtype=torch.bool), *masks]), bounds)


class CriticWorker(ModelWorker):
    """Values of tokens, and training on them.

    The weights that `model` names may be another critic's, or those of a language model: then the head is drawn by the
    model's seed, small, so that the first values are near zero.
    """

    def __init__(
        self, model: ModelConfig, optim: OptimConfig, mesh: Mesh, *, total_steps: int, reading: Reading
    ) -> None:
        super().__init__(model, optim, mesh, total_steps=total_steps)
        self.reading = reading

    def _shape(self, model: ModelConfig) -> ModelShape:
        return load_shape(model.path).as_scalar()

    def _load(self, model: ModelConfig) -> None:
        if model.weights == RANDOM:
            import_weights(self.models, WithScalarHead(RandomWeights(model.path, model.seed), model.seed), self.mesh)
        elif model.weights == PRETRAINED:
            reader = SafetensorsReader(model.path)
            drawn = frozenset(SCALAR_HEAD.hf) - frozenset(reader.files)
            reader.check(weight_map(self.shape).hf_names() - drawn)
            import_weights(self.models, WithScalarHead(reader, model.seed) if drawn else reader, self.mesh)
        else:
            self._load_checkpoint(find_checkpoint(model.weights), model)

    def _load_checkpoint(self, path: Path, model: ModelConfig) -> None:
        """A critic's weights, or under a drawn head those of the actor's body. Collective."""
        trees = self.sharded_weights()
        if ROLE in read_state(path)["models"]:
            self._load_weights(load_weights(path, ROLE, self.identity(), trees))
            return
        bodies = {name: {key: t for key, t in tree.items() if key != HEAD} for name, tree in trees.items()}
        loaded = load_weights(path, "actor", load_shape(model.path).identity(), bodies)
        head = scalar_head(self.shape.hidden_size, model.seed)
        self._load_weights({name: loaded[name] | ({HEAD: head} if HEAD in trees[name] else {}) for name in trees})

    def _loss_tokens(self, output: Tensor, batch: MicroBatch) -> ValueTokens:
        return ValueTokens(output.flatten().index_select(0, batch.loss_positions + self.reading.value), batch)

    def values(self, samples: Sequence[Sample], plan: StepPlan) -> dict[int, Tensor]:
        """Per sample id, the value [n] float32 of each loss-bearing token, on every rank. No gradient."""
        for chunk in self.chunks:
            chunk.eval()

        def step(chunk: object, batch: MicroBatch) -> tuple[Tensor, LossFunction]:
            def measure(output: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
                return output.sum(), scatter_back(self._loss_tokens(output, batch).values.cpu(), batch)

            return self._forward(chunk, batch), measure

        batches = self._micro_batches(samples, plan, ())
        parts = run_schedule(self.chunks, batches, step, mesh=self.mesh, forward_only=True)
        return {sample_id: values for part in self.gather(parts) for sample_id, values in part.items()}
