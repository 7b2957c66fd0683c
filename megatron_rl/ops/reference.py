"""The operators by definition: dense, one shard, gradients by autograd. The tests measure the others against these."""

import torch
from torch import Tensor


def log_probs(hidden: Tensor, weight: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(hidden weight^T / temperature) [N, V], float64 for float64, otherwise float32."""
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    return logits.log_softmax(-1)


def linear_stats(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of the labels, and entropy, of softmax(hidden weight^T / temperature).

    `hidden` [N, H], `weight` [V, H], `labels` [N] int64; both results [N], float64 for float64, otherwise float32.
    """
    logp = log_probs(hidden, weight, temperature)
    # p log p is 0 at p = 0, where log p is -inf.
    entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
    return logp.gather(1, labels[:, None])[:, 0], entropy


def largest(values: Tensor, k: int) -> Tensor:
    """Ids [N, k] of the k largest of each row of `values` [N, V]: by value, then by the smaller id."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def listed(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, k] at `ids` [N, k], and the log of the sum [N] of all other probabilities.

    The sum is at least the smallest normal number.
    """
    logp = log_probs(hidden, weight, temperature)
    others = logp.scatter(1, ids, -torch.inf).exp().sum(-1)
    return logp.gather(1, ids), others.clamp(min=torch.finfo(logp.dtype).tiny).log()
