"""How much each token counts in a loss: weights, so that a loss is `sum(weights * values)` however it is split up."""

from collections.abc import Sequence

import torch
from torch import Tensor

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def token_weights(loss_masks: Sequence[Tensor], mode: str, *, horizon: float | None = None) -> list[Tensor]:
    """Weights [n_i] float64 for the tokens of every sequence of one global mini-batch; `loss_masks` are bool [n_i].

    With c_i tokens that bear loss in sequence i, and S sequences that have any, such a token weighs

        token-mean                1 / sum_i c_i      (DAPO; sums to 1)
        seq-mean-token-mean       1 / (S c_i)        (GRPO, GSPO; sums to 1)
        seq-mean-token-sum        1 / S
        seq-mean-token-sum-norm   1 / (S horizon)    (Dr. GRPO, where the horizon is the longest response allowed;
                                                    supervised fine-tuning, where it is any constant)

    and any other token 0. The names are verl's.
    """
    if mode not in MODES:
        raise ValueError(f"aggregation is {mode!r}; choose one of {', '.join(MODES)}")
    counts = [int(mask.sum()) for mask in loss_masks]
    num_tokens, num_sequences = sum(counts), sum(count > 0 for count in counts)

    def divisor(count: int) -> float:
        if mode == "token-mean":
            return num_tokens
        if mode == "seq-mean-token-mean":
            return num_sequences * count
        if mode == "seq-mean-token-sum":
            return num_sequences
        if horizon is None or horizon <= 0:
            raise ValueError(f"aggregation {mode} divides by the horizon, which is {horizon}: give more than 0")
        return num_sequences * horizon

    # A sequence without tokens has a divisor of 0, and nothing to divide.
    return [mask.to(torch.float64) / (divisor(count) or 1) for mask, count in zip(loss_masks, counts)]
