"""Drawing a token: truncated softmax, and the inverse of its distribution function at a keyed uniform number.

The uniforms come from a counter-based generator (Philox; Salmon et al., 2011) keyed by (seed, stream, prompt, sample),
one per position. A draw therefore depends on its key and on the model's distribution, never on what else is in the
batch, how many draws went before, or on which rank it happens.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # tokens whose probabilities are summed up first


def uniforms(seed: int, key: Sequence[int], length: int) -> np.ndarray:
    """`length` float64 numbers in [0, 1), for positions 0, 1, ... of the response that `key` names."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key]))).random(length)


def sampling_log_probs(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities that tokens are drawn with, and the log of the mass that truncation kept.

    logits [B, V] -> (log_probs [B, V] float32 with -inf where cut off, log_kept [B]). Top-k keeps the k largest; top-p
    (Holtzman et al., 2020) then keeps the shortest head of the sorted rest whose mass within it reaches p.
    Temperature 0 keeps the largest logit of the distribution at temperature 1.
    """
    if temperature == 0:
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        top_k, top_p = 1, 1.0
    else:
        log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_k == 0 and top_p == 1.0:
        return log_probs, torch.zeros(len(logits), device=logits.device)
    ranked, order = log_probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = -torch.inf
    head = torch.softmax(ranked, dim=-1)
    # A token stays if the mass before it has not reached p, so the first always does.
    ranked = ranked.masked_fill(head.cumsum(dim=-1) - head >= top_p, -torch.inf)
    log_kept = ranked.logsumexp(dim=-1)
    kept = torch.full_like(log_probs, -torch.inf).scatter(1, order, ranked - log_kept[:, None])
    return kept, log_kept


def draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """The smallest token whose cumulative probability exceeds `uniform` [B] float64; log_probs [B, V] -> [B] int64.

    The sum is taken in float64, over blocks of tokens first and then inside one block.
    """
    rows, size = log_probs.shape
    probs = F.pad(log_probs.exp(), (0, -size % BLOCK)).view(rows, -1, BLOCK)
    before = probs.sum(-1, dtype=torch.float64).cumsum(1)
    # Scaled by the sum, so that rounding never leaves a gap at the top.
    level = (uniform * before[:, -1])[:, None]
    block = torch.searchsorted(before, level, right=True).clamp(max=probs.shape[1] - 1)
    inside = probs.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(1)
    inside += F.pad(before, (1, 0)).gather(1, block)
    place = torch.searchsorted(inside, level, right=True).clamp(max=BLOCK - 1)
    return (block * BLOCK + place)[:, 0].clamp(max=size - 1)
