"""Importance ratios between the policy that is trained and the one that the update starts from."""

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0
_MAX_SEQUENCE_LOG_RATIO = 10.0


def log_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """d_t = clamp(logp_t - old_logp_t, -20, 20) [N], so that its exponential neither overflows nor vanishes (verl)."""
    return (logp - old_logp).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def sequence_mean(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """mean_{t in i} values_t, [num_sequences] float64, detached; 0 for an empty sequence.

    `sequence_ids` [N] int64 says to which sequence each token belongs; all tokens of a sequence must be present.
    """
    # In float64 because GSPO clips at 3e-4, and so that the order of a parallel sum does not show.
    values = values.detach().double()
    total = values.new_zeros(num_sequences).index_add_(0, sequence_ids, values)
    return total / torch.bincount(sequence_ids, minlength=num_sequences).clamp(min=1)


def sequence_ratio(logp: Tensor, old_logp: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """s_i = exp(min(mean_{t in i} (logp_t - old_logp_t), 10)), [num_sequences], detached; 1 for an empty sequence.

    The length-normalised ratio of GSPO (Zheng et al., arXiv 2507.18071), with the bound of verl. `sequence_ids` as for
    `sequence_mean`.
    """
    mean = sequence_mean(logp - old_logp, sequence_ids, num_sequences)
    return mean.clamp(max=_MAX_SEQUENCE_LOG_RATIO).exp().to(logp.dtype)


def sequence_token_ratio(logp: Tensor, old_logp: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """r_it = sg(s_i) exp(logp_t - sg(logp_t)), [N]: the value s_i, and the gradient s_i for the token's own logp.

    The token form of GSPO. If the advantage is constant over a sequence, the mean of its tokens' losses has the same
    gradient as the loss of s_i itself.
    """
    ratio = sequence_ratio(logp, old_logp, sequence_ids, num_sequences)
    return ratio[sequence_ids] * (logp - logp.detach()).exp()
