"""Which rows of the vocabulary a tensor-parallel rank holds."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Rows [start, stop) of the true vocabulary, held by one rank of `group`; None stands for a group of one.

    Frameworks pad the vocabulary so that it divides. A rank's matrix may hence have more rows than its shard; these
    are no tokens, come last, and may be all that a rank has (start == stop).
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(
        cls, vocab_size: int, padded_rows_per_rank: int, rank: int, group: dist.ProcessGroup | None = None
    ) -> "VocabShard":
        """The shard of `rank` when every rank holds `padded_rows_per_rank` rows, in rank order."""
        start = min(rank * padded_rows_per_rank, vocab_size)
        return cls(start, min(start + padded_rows_per_rank, vocab_size), group)

    @property
    def size(self) -> int:
        return self.stop - self.start

    def all_gather(self, local: Tensor) -> Tensor:
        """Every shard's tensor [shards, ...], in rank order, from this shard's [...]; all have the same shape."""
        shards = 1 if self.group is None else dist.get_world_size(self.group)
        if shards == 1:
            return local[None]
        gathered = local.new_empty(shards, *local.shape)
        dist.all_gather_into_tensor(gathered.view(-1), local.contiguous().view(-1), group=self.group)
        return gathered
