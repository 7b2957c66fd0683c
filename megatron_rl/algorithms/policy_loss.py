"""Clipped policy-gradient losses, one value per token. The reduction is not here: callers sum `weights * loss`.

All tensors are flat [N], over the tokens that bear loss. `old_logp` belongs to the policy that the update starts from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.algorithms.importance import log_ratio, sequence_token_ratio


class PolicyLoss(NamedTuple):
    """Per token [N]. Only `loss` has a gradient; the rest is for the logs."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor  # bool: the clipped surrogate is the larger one, so that the token has no gradient
    clipped_low: Tensor  # bool: the dual clip bounds the loss of a token with negative advantage
    approx_kl: Tensor  # old_logp - logp, whose mean over samples of the old policy is KL(old || new)


def ppo_clip(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> PolicyLoss:
    """L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); where A < 0, at most -A dual_clip.

    r = exp(clamp(logp - old_logp, -20, 20)). The clip is PPO's (Schulman et al., arXiv 1707.06347), with the two bounds
    of DAPO (Yu et al., arXiv 2503.14476); the dual clip is of Ye et al. (arXiv 1912.09729), None for none.
    """
    assert dual_clip is None or dual_clip > 1, dual_clip
    ratio = log_ratio(logp, old_logp).exp()
    loss, clipped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    clipped_low = torch.zeros_like(clipped)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        clipped_low = (advantages < 0) & (loss > bound)
        loss = torch.where(clipped_low, bound, loss)
    return PolicyLoss(loss, ratio.detach(), clipped, clipped_low, (old_logp - logp).detach())


def gspo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with the sequence's ratio for every token of it.

    GSPO (Zheng et al., arXiv 2507.18071), in its token form; `importance.sequence_token_ratio` gives r. The paper
    averages tokens within a sequence, then sequences. `sequence_ids` [N] int64 are below `num_sequences`.
    """
    ratio = sequence_token_ratio(logp, old_logp, sequence_ids, num_sequences)
    loss, clipped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    return PolicyLoss(loss, ratio.detach(), clipped, torch.zeros_like(clipped), (old_logp - logp).detach())


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clip(r)), and where the second is strictly larger."""
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(free, bounded), bounded > free
