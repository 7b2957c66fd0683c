"""What one shard of the vocabulary says of each token, before the shards are merged."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.ops.topk import NO_ID


class ShardPart(NamedTuple):
    """Of one shard's columns, whose ids count from its first."""

    rows: Tensor  # [N, 3 to 5]
    largest_values: Tensor | None  # [N, k], -inf where there are fewer
    largest_ids: Tensor | None  # [N, k] int64
    given_values: Tensor | None  # [N, n], 0 where the shard does not hold the id

    def with_largest(self, values: Tensor, ids: Tensor, k: int) -> "ShardPart":
        """A shard with less than k columns has lists that end with places which lose to every id."""
        missing = k - values.shape[1]
        pad = torch.nn.functional.pad
        return self._replace(
            largest_values=pad(values, (0, missing), value=-torch.inf), largest_ids=pad(ids, (0, missing), value=NO_ID)
        )
