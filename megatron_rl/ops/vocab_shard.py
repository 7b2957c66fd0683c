"""Which rows of the vocabulary this rank holds, as a value."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Rows [start, stop) of the true vocabulary; the rank's weight may have more, which pad it and are never read.

    `group` is the tensor-parallel group, or None where one rank holds everything.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None

    @staticmethod
    def of(vocab_size: int, rows: int, rank: int, group: dist.ProcessGroup | None) -> "VocabShard":
        """The shard of tensor-parallel rank `rank`, when every rank's weight has `rows` rows, padding included."""
        return VocabShard(min(vocab_size, rank * rows), min(vocab_size, (rank + 1) * rows), group)

    @property
    def size(self) -> int:
        return self.stop - self.start

    def gather(self, statistics: Tensor) -> Tensor:
        """All ranks' [N, k], stacked to [ranks, N, k]."""
        if self.group is None or dist.get_world_size(self.group) == 1:
            return statistics[None]
        ranks = dist.get_world_size(self.group)
        gathered = statistics.new_empty(ranks, *statistics.shape)
        # Every rank has the same tokens, so either all of them skip the empty collective or none.
        if statistics.numel():
            dist.all_gather_into_tensor(gathered.view(-1), statistics.contiguous().view(-1), group=self.group)
        return gathered

    def locate(self, ids: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Where global `ids` lie in the local rows [first, last): (position clamped into them, whether it is inside)."""
        place = ids - (self.start + first)
        return place.clamp(0, last - first - 1), (place >= 0) & (place < last - first)
