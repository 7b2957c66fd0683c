"""A Megatron model on the mesh: log-probabilities and weights out. What is frozen needs no more."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_rl.checkpoint.hf import SafetensorsReader
from megatron_rl.checkpoint.store import find_checkpoint, load_weights
from megatron_rl.config.schema import PRETRAINED, RANDOM, ModelConfig
from megatron_rl.data.collate import MicroBatch, collate, scatter_back
from megatron_rl.data.planner import StepPlan, plan_step
from megatron_rl.data.samples import Sample
from megatron_rl.models.attention import packed_seq_params
from megatron_rl.models.build import LanguageModel, build_model, weight_map
from megatron_rl.models.exchange import export_weights, import_weights
from megatron_rl.models.hf_config import ModelShape, load_shape, num_parameters
from megatron_rl.models.random_weights import RandomWeights
from megatron_rl.ops.logit_stream import vocabulary_chunk
from megatron_rl.parallel.collect import from_last_stage, gather_over_data
from megatron_rl.parallel.device import device
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.parallel.schedule import LossFunction, run_schedule
from megatron_rl.workers.objective import loss_tokens

T = TypeVar("T")

EXTRA_STATE = re.compile(r"_extra_state\d*$")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ShardedModel:
    """A GPTModel with the config and tokenizer of a Hugging Face directory, and the weights that `model` names.

    `version` counts the updates its weights have had in this run.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        self.mesh = mesh
        self.hf_path = Path(model.path)
        self.shape = self._shape(model)
        self.num_parameters = num_parameters(model.path)
        self.models: list[LanguageModel] = build_model(self.shape, mesh, DTYPES[model.dtype.value])
        self.config = self.models[0].config
        self.chunks: list[Any] = list(self.models)
        self.version = 0
        self.vocabulary_chunk = vocabulary_chunk(device())
        self._load(model)

    def _shape(self, model: ModelConfig) -> ModelShape:
        return load_shape(model.path)

    def _load(self, model: ModelConfig) -> None:
        if model.weights == RANDOM:
            import_weights(self.models, RandomWeights(model.path, model.seed), self.mesh)
        elif model.weights == PRETRAINED:
            reader = SafetensorsReader(model.path)
            reader.check(weight_map(self.shape).hf_names())
            import_weights(self.models, reader, self.mesh)
        else:
            self.load_checkpoint(find_checkpoint(model.weights))

    def load_checkpoint(self, path: Path, role: str = "actor") -> None:
        """Takes a role's weights, or an average of weights, and nothing else, from a checkpoint. Collective."""
        self._load_weights(load_weights(path, role, self.identity(), self.sharded_weights()))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return self.shape.identity()

    def _names(self) -> list[str]:
        return [f"model{index}" for index in range(len(self.models))]

    def _metadata(self) -> dict[str, Any]:
        """How megatron-core is to write: a format that any other layout can read."""
        return {
            "singleton_local_shards": False,
            "dp_cp_group": self.mesh.dp_group,
        }

    def sharded_weights(self) -> dict[str, Any]:
        """Without the `_extra_state` of layers: only fp8 has any, and which layers have it depends on their library."""
        metadata = self._metadata()
        trees = {name: model.sharded_state_dict(metadata=metadata) for name, model in zip(self._names(), self.models)}
        return {name: {key: t for key, t in tree.items() if not _is_extra(key)} for name, tree in trees.items()}

    def _load_weights(self, trees: dict[str, Any]) -> None:
        for name, model in zip(self._names(), self.models):
            model.load_state_dict(trees[name] | dict.fromkeys(filter(_is_extra, model.state_dict())))

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """The weights as megatron-core's sharded tensors, which reshard."""
        return {**self.sharded_weights(), "version": self.version}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `sharded_state` gave out."""
        self._load_weights(state)
        self.version = state["version"]

    def plan(self, samples: Sequence[Sample], max_tokens: int) -> StepPlan:
        """Cuts one mini-batch into micro-batches, the same number on every rank."""
        return plan_step(
            [len(sample) for sample in samples],
            dp_size=self.mesh.dp_size,
            max_tokens=max_tokens,
            min_micro_batches=self.mesh.min_micro_batches,
            multiple_of=self.mesh.micro_batch_multiple,
        )

    def _micro_batches(
        self, samples: Sequence[Sample], plan: StepPlan, field_names: tuple[str, ...]
    ) -> list[MicroBatch]:
        """This rank's share. Sequences of equal length stand together: attention takes them in one call."""
        return [
            collate(
                sorted((samples[i] for i in indices), key=len),
                field_names=field_names,
                pad_multiple=self.mesh.pad_multiple,
                min_tokens=self.mesh.tp_size,
            ).to(device())
            for indices in plan.micro_batches[self.mesh.dp_rank]
        ]

    def _forward(self, chunk: Any, batch: MicroBatch) -> Tensor:
        return chunk(
            batch.tokens,
            batch.position_ids,
            None,
            packed_seq_params=packed_seq_params(batch.cu_seqlens, batch.max_seqlen),
        )

    def log_probs(self, samples: Sequence[Sample], plan: StepPlan, temperature: float) -> dict[int, Tensor]:
        """Per sample id, the log-probability of each loss-bearing token, on every rank. No gradient."""
        for chunk in self.chunks:
            chunk.eval()

        def step(chunk: Any, batch: MicroBatch) -> tuple[Tensor, LossFunction]:
            def measure(hidden: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
                stats = self._loss_tokens(hidden, batch).stats(temperature=temperature, entropy=False)
                return hidden.sum(), scatter_back(stats.logp.cpu(), batch)

            return self._forward(chunk, batch), measure

        batches = self._micro_batches(samples, plan, ())
        parts = run_schedule(self.chunks, batches, step, mesh=self.mesh, forward_only=True)
        return _united(self.gather(parts))

    def final_hidden(self, samples: Sequence[Sample], plan: StepPlan) -> dict[int, Tensor]:
        """Per sample id, the final hidden states [n, H] that predict its loss-bearing tokens. No gradient.

        They stay where they are born: on the last stage's ranks, those of each data-parallel rank's own samples, the
        same on its tensor-parallel ranks. Elsewhere nothing.
        """
        for chunk in self.chunks:
            chunk.eval()

        def step(chunk: Any, batch: MicroBatch) -> tuple[Tensor, LossFunction]:
            def keep(hidden: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
                return hidden.sum(), scatter_back(self._loss_tokens(hidden, batch).hidden, batch)

            return self._forward(chunk, batch), keep

        batches = self._micro_batches(samples, plan, ())
        return _united(run_schedule(self.chunks, batches, step, mesh=self.mesh, forward_only=True))

    def _loss_tokens(self, hidden: Tensor, batch: MicroBatch) -> Any:
        """What an objective of this model sees of a micro-batch: LossTokens, if the model has a vocabulary."""
        return loss_tokens(self.models[-1], hidden, batch, self.mesh, chunk=self.vocabulary_chunk)

    def gather(self, records: list[T]) -> list[T]:
        """What the last stage's ranks hold, of all data-parallel ranks, on every rank. Collective."""
        return gather_over_data(from_last_stage(records if self.mesh.is_last_stage else None, self.mesh), self.mesh)

    def named_hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) on every rank; collective."""
        return export_weights(self.models, self.mesh)


def _united(parts: Sequence[dict[int, Tensor]]) -> dict[int, Tensor]:
    return {sample_id: values for part in parts for sample_id, values in part.items()}


def _is_extra(key: str) -> bool:
    """Experts that are multiplied at once have one each, with a number behind it from the second on."""
    return EXTRA_STATE.search(key) is not None
