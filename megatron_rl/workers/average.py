"""The moving average of a model's weights, on the shards that the distributed optimizer cuts them into.

    theta_T <- d theta_T + (1 - d) theta_S

theta_S are the optimizer's float32 master weights: of bfloat16 ones most steps would be lost. An update stays on its
rank; whole tensors exist only where the average is saved, and in a model that it is written to: there each rank rounds
its own shard, and ranks send each other what is rounded.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron_rl.config.average import AverageConfig, AverageSchedule
from megatron_rl.config.schema import ModelConfig
from megatron_rl.ops import ema
from megatron_rl.parallel.device import device
from megatron_rl.workers import adam_state
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.sharded_model import ShardedModel

# isort: split
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared


def decay_of(config: AverageConfig) -> Callable[[int], float]:
    """The decay of an update, given how many were done before."""
    if config.schedule is AverageSchedule.constant:
        return lambda num_updates: 1.0 - config.rate
    return partial(
        ema.decay,
        inv_gamma=config.inv_gamma,
        power=config.power,
        min_value=config.min,
        max_value=config.max,
        update_after=config.update_after,
    )


class EmptyModel(ShardedModel):
    """One that weights are written to: it reads none."""

    def _load(self, model: ModelConfig) -> None:
        pass


class WeightAverage:
    """An exponential moving average of a worker's weights: a float32 shard per rank beside the optimizer's own.

    It starts as a copy. `num_updates` counts what has changed it since, refreshes too. What is not trained has no
    shard: frozen parameters and buffers are the worker's.

    A `model` follows it, in its own precision: each update is written there in the same pass over the shards. The
    weights of a float32 model are the average itself, unless that is kept off the device.
    """

    def __init__(
        self,
        worker: ModelWorker,
        decay: Callable[[int], float],
        *,
        offload: bool = False,
        model: ShardedModel | None = None,
    ) -> None:
        self.worker, self.decay, self.model = worker, decay, model
        self.num_updates = 0
        place = torch.device("cpu") if offload else device()
        held = list(adam_state.shards(worker.optimizer))
        followers = self._own(self._flat(model)) if model is not None else []
        self._is_model = all(x.dtype == torch.float32 and x.device == place for x in followers) and bool(followers)
        if self._is_model:
            self.shards = {shard.parameter: x for shard, x in zip(held, followers, strict=True)}
            for average, weights in self._pairs():
                average.copy_(weights)
        else:
            self.shards = {x.parameter: x.tensors[adam_state.MASTER].detach().to(place, copy=True) for x in held}
        self.show()

    def update(self) -> float:
        """One update from the worker's weights, without communication but for a model that follows; its decay."""
        decay = self.decay(self.num_updates)
        self._update(decay)
        return decay

    def refresh(self) -> None:
        """The average becomes a copy of the weights: an update of decay 0."""
        self._update(0.0)

    def show(self) -> None:
        """Fills the model that follows, if there is one. Collective."""
        if self.model is not None:
            self.write_to(self.model)

    def _update(self, decay: float) -> None:
        averages, weights = zip(*self._pairs(), strict=True)
        self.num_updates += 1
        if self.model is None:
            ema.ema_update_(averages, weights, decay)
            return
        flat = self._flat(self.model)
        ema.ema_update_(averages, weights, decay, copies=None if self._is_model else self._own(flat))
        self._complete(self.model, flat)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Average and weights of each shard, where the average is kept."""
        for parameter, _, _, tensors in adam_state.shards(self.worker.optimizer):
            average = self.shards[parameter]
            yield average, tensors[adam_state.MASTER].detach().to(average.device)

    @torch.no_grad()
    def write_to(self, model: ShardedModel) -> None:
        """Fills a model of the same shape on the same mesh, in its own precision. Collective."""
        flat = self._flat(model)
        for place, (average, _) in zip(self._own(flat), self._pairs(), strict=True):
            place.copy_(average)
        self._complete(model, flat)

    def _parameters(self, model: ShardedModel) -> Iterator[tuple[Parameter, Parameter]]:
        """Each of the worker's, with the model's."""
        for mine, other in zip(self.worker.models, model.models, strict=True):
            yield from zip(mine.parameters(), other.parameters(), strict=True)

    def _flat(self, model: ShardedModel) -> dict[Parameter, Tensor]:
        """All elements of what the model has for each trained parameter of the worker."""
        return {mine: other.detach().view(-1) for mine, other in self._parameters(model) if mine.requires_grad}

    def _own(self, flat: dict[Parameter, Tensor]) -> list[Tensor]:
        """Of these the elements whose average is on this rank, in the order of the shards."""
        return [flat[shard.parameter][shard.start : shard.stop] for shard in adam_state.shards(self.worker.optimizer)]

    @torch.no_grad()
    def _complete(self, model: ShardedModel, flat: dict[Parameter, Tensor]) -> None:
        """The model's elements that other ranks hold, and what is not trained."""
        for part in self.worker.optimizer.chained_optimizers:
            adam_state.complete(part, flat.pop)
        assert not flat, "every trained parameter is in the optimizer"
        for mine, other in self._parameters(model):
            if not mine.requires_grad:
                other.copy_(mine)
        for source, place in zip(self.worker.models, model.models, strict=True):
            for of_source, of_place in zip(source.buffers(), place.buffers(), strict=True):
                of_place.copy_(of_source)
        model.version = self.num_updates

    def distance(self) -> float:
        """|| theta_T - theta_S || / || theta_S ||, each weight of the model counted once. Collective."""
        squares = torch.zeros(2, dtype=torch.float64, device=device())
        for parameter, (average, weight) in zip(self.shards, self._pairs(), strict=True):
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in (average - weight, weight)]
                squares += torch.stack(norms).to(squares.device).square()
        dist.all_reduce(squares)
        apart, whole = squares.tolist()
        return math.sqrt(apart / whole)

    def state_bytes(self) -> int:
        """What this rank keeps: 4 bytes for each of its share of the trained parameters."""
        return sum(shard.nbytes for shard in self.shards.values())

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return self.worker.identity()

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Tensors of the weights' names and shapes, which reshard as the weights do, and the count."""
        weights = self.worker.sharded_weights()
        shards = {
            number: adam_state.beside(part, weights, "", self.shards.__getitem__, loading=loading)
            for number, part in enumerate(self.worker.optimizer.chained_optimizers)
        }
        return {"shards": shards, "num_updates": self.num_updates}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `sharded_state` gave out."""
        for number, part in enumerate(self.worker.optimizer.chained_optimizers):
            adam_state.take(part, state["shards"][number], self.shards.__getitem__)
        self.num_updates = state["num_updates"]
        self.show()
