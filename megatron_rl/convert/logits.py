"""What a model says of the same tokens, as transformers computes it and as Megatron does: `verify` by logits."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_rl.config.schema import DType, ModelConfig
from megatron_rl.convert.exporting import Saved, read_saved
from megatron_rl.convert.opening import is_hf
from megatron_rl.models.attention import packed_seq_params
from megatron_rl.models.hf_config import load_config
from megatron_rl.parallel.mesh import create_mesh, destroy_mesh
from megatron_rl.workers.sharded_model import ShardedModel


class Agreement(NamedTuple):
    """Of logits, or of a critic's values: the largest difference, and how often the likeliest token is the same."""

    largest: float
    same_argmax: float


def agreement(one: Tensor, other: Tensor) -> Agreement:
    """Of outputs [tokens, vocabulary], or [tokens, 1]."""
    if one.shape != other.shape:
        raise ValueError(f"the outputs are {list(one.shape)} and {list(other.shape)}: these are different models")
    return Agreement(float((one - other).abs().max()), float((one.argmax(-1) == other.argmax(-1)).float().mean()))


def outputs(path: Path, role: str | None, like: Path | None, tokens: Tensor) -> Tensor:
    """float32, [tokens, vocabulary]; of a critic its values, [tokens, 1]. Megatron computes those of a checkpoint."""
    return _of_transformers(path, tokens) if is_hf(path) else _of_megatron(read_saved(path, role, like), tokens)


def draw(vocab_size: int, count: int) -> Tensor:
    """[count] tokens, the same every time."""
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _of_transformers(path: Path, tokens: Tensor) -> Tensor:
    is_classifier = any("SequenceClassification" in name for name in load_config(path).architectures or ())
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    if is_classifier:
        return model.score(model.model(tokens[None]).last_hidden_state)[0]
    return model(tokens[None]).logits[0]


class _Body(ShardedModel):
    """A role of a checkpoint, of whichever kind."""

    def __init__(self, saved: Saved, mesh: object) -> None:
        self.saved = saved
        super().__init__(ModelConfig(path=str(saved.like), dtype=DType.float32), mesh)  # type: ignore[arg-type]

    def _shape(self, model: ModelConfig) -> object:  # type: ignore[override]
        return self.saved.shape

    def _load(self, model: ModelConfig) -> None:
        self.load_checkpoint(self.saved.path, self.saved.role)


@torch.no_grad()
def _of_megatron(saved: Saved, tokens: Tensor) -> Tensor:
    """In a world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = _Body(saved, create_mesh())
        chunk = model.models[0].eval()
        ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
        hidden = chunk(
            tokens[None], torch.arange(len(tokens))[None], None, packed_seq_params=packed_seq_params(ends, len(tokens))
        ).view(len(tokens), -1)
        return hidden if saved.shape.scalar else hidden @ chunk.head_weight()[: saved.shape.vocab_size].T
    finally:
        destroy_mesh()
