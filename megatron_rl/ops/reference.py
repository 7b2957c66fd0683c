"""The operators by definition: dense, one shard, gradients by autograd. The tests measure the others against these."""

import torch
from torch import Tensor


def linear_stats(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of the labels, and entropy, of softmax(hidden weight^T / temperature).

    `hidden` [N, H], `weight` [V, H], `labels` [N] int64; both results [N], float64 for float64, otherwise float32.
    """
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    log_probs = logits.log_softmax(-1)
    # p log p is 0 at p = 0, where log p is -inf.
    entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
    return log_probs.gather(1, labels[:, None])[:, 0], entropy
