"""From the values of a response's tokens to one score: S = sum_t a_t v_t, with weights a_t that know the tokens only.

A score is linear in the values, so the slope g of a loss with respect to S gives every token the slope g a_t: any loss
on scores, however it couples responses, is driven back through one weight per token.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["last_token", "mean", "mean_no_eos"]


def pool_weights(token_ids: Sequence[int], mode: Pooling, stop: Collection[int]) -> Tensor:
    """a [n] float64 for a response of n tokens; all 0 where no token counts.

        last_token     1 at the last token (Ye et al., arXiv 2511.10643)
        mean           1 / n
        mean_no_eos    the mean without the last token, if that is one of `stop`, the ids that end a response

    `mean_no_eos` leaves such ids inside of the text alone. With it a response scores the same whether its end was
    tokenised or not; under `mean` the two scores of one text may lie far apart.
    """
    weights = torch.zeros(len(token_ids), dtype=torch.float64)
    if mode == "last_token":
        weights[-1:] = 1.0
        return weights
    ended = mode == "mean_no_eos" and len(token_ids) > 0 and token_ids[-1] in stop
    counted = len(token_ids) - ended
    weights[:counted] = 1.0 / max(counted, 1)
    return weights


def pooled(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The scores [B] float64 of responses with values [n_i] and weights [n_i]."""
    pairs = zip(values, weights, strict=True)
    return torch.stack([torch.zeros((), dtype=torch.float64), *((v.double() * a).sum() for v, a in pairs)])[1:]
