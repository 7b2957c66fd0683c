"""megatron-core's embedding with a gradient that has entries for a micro-batch's tokens, and nothing for the rest."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

# isort: split
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


class Embedding(VocabParallelEmbedding):
    """megatron-core's gradient is [rows, hidden] for every micro-batch: made, set to zero, and added to `main_grad`.

    This one is a sparse tensor, which megatron-core's hook adds to `main_grad` where it has entries, in float32.
    """

    @classmethod
    def take(cls, embedding: VocabParallelEmbedding) -> None:
        """Makes the embedding one of this class: GPTModel has a class of its own choice."""
        embedding.__class__ = cls

    def forward(self, ids: Tensor) -> Any:
        """[sequences, tokens] to [sequences, tokens, hidden], or, scattered over ranks, [tokens / tp, sequences, .]."""
        local = ids - self.vocab_start_index
        outside = (local < 0) | (local >= self.num_embeddings_per_partition)
        rows = F.embedding(local.masked_fill(outside, 0), self.weight, sparse=True)
        rows = rows.masked_fill(outside[..., None], 0)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
