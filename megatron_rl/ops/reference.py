"""Dense definitions of the vocabulary operators: what every fast path is tested against."""

import torch
from torch import Tensor


def linear_stats(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p(label) and entropy of p = softmax(hidden weight^T / temperature).

    hidden [N, H], weight [V, H], labels [N] int64 -> logp [N], entropy [N], natural logarithm, in the inputs' dtype or
    float32 if that is wider.
    """
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_softmax = torch.log_softmax(logits, dim=-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(1, labels[:, None])[:, 0], entropy
