"""Which of a response's tokens make its score: S is the mean of their values.

A score is linear in the values, so the slope of a loss with respect to S gives each counted token its share of it: any
loss on scores, however it couples responses, is driven back through one weight per token.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["last_token", "mean", "mean_no_eos"]


def counted(token_ids: Sequence[int], mode: Pooling, stop: Collection[int]) -> Tensor:
    """Bool [n] for a response of n tokens.

        last_token     the last token (Ye et al., arXiv 2511.10643)
        mean           all
        mean_no_eos    all but the last token, if that is one of `stop`, the ids that end a response

    `mean_no_eos` leaves such ids inside of the text alone. With it a response scores the same whether its end was
    tokenised or not; under `mean` the two scores of one text may lie far apart.
    """
    mask = torch.full((len(token_ids),), mode != "last_token")
    if mode == "last_token":
        mask[-1:] = True
    elif mode == "mean_no_eos" and len(token_ids) > 0 and token_ids[-1] in stop:
        mask[-1] = False
    return mask
