"""Policy-gradient losses, one value per token. The reduction is not here: callers sum `weights * loss`.

All tensors are flat [N], over the tokens that bear loss. `old_logp` belongs to the policy that the update starts from,
d = logp - old_logp, r = exp(clamp(d, -20, 20)) and A is the advantage; sg() has no gradient. Losses that couple the
tokens of a sequence take `sequence_ids` [N] int64, below `num_sequences`: all tokens of a sequence must be present.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.algorithms.importance import log_ratio, sequence_mean, sequence_token_ratio


class PolicyLoss(NamedTuple):
    """Per token [N]. Only `loss` has a gradient; the rest is for the logs."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor  # bool: the clip decides, so that the token has no gradient (in CISPO a smaller one)
    clipped_low: Tensor  # bool: the second bound decides, that of the dual clip or DPPO's on the ratio
    approx_kl: Tensor  # old_logp - logp, whose mean over samples of the old policy is KL(old || new)


def _policy_loss(
    loss: Tensor,
    logp: Tensor,
    old_logp: Tensor,
    *,
    ratio: Tensor,
    clipped: Tensor | None = None,
    clipped_low: Tensor | None = None,
) -> PolicyLoss:
    never = torch.zeros_like(loss, dtype=torch.bool)
    return PolicyLoss(
        loss,
        ratio.detach(),
        never if clipped is None else clipped,
        never if clipped_low is None else clipped_low,
        (old_logp - logp).detach(),
    )


# A clipped ratio


def ppo_clip(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    ratio: Tensor | None = None,
) -> PolicyLoss:
    """L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); where A < 0, at most -A dual_clip.

    The clip is PPO's (Schulman et al., arXiv 1707.06347), with the two bounds of DAPO (Yu et al., arXiv 2503.14476);
    the dual clip is of Ye et al. (arXiv 1912.09729), None for none. Another `ratio`, a smoothed one say, takes the
    place of r everywhere, with its own gradient; `approx_kl` does not change.
    """
    assert dual_clip is None or dual_clip > 1, dual_clip
    if ratio is None:
        ratio = log_ratio(logp, old_logp).exp()
    loss, clipped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    clipped_low = torch.zeros_like(clipped)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        clipped_low = (advantages < 0) & (loss > bound)
        loss = torch.where(clipped_low, bound, loss)
    return _policy_loss(loss, logp, old_logp, ratio=ratio, clipped=clipped, clipped_low=clipped_low)


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
    averages tokens within a sequence, then sequences.
    """
    ratio = sequence_token_ratio(logp, old_logp, sequence_ids, num_sequences)
    loss, clipped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    return _policy_loss(loss, logp, old_logp, ratio=ratio, clipped=clipped)


def _clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clip(r)), and where the second is strictly larger."""
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(free, bounded), bounded > free


def geo_mean(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> PolicyLoss:
    """L = -A_i sg(R_i) exp(x_t - sg(x_t)) with R_i = exp(min(mean_{t in i} x_t, 10)).

    x_t = s min(s d, s clip(d, -clip_low, clip_high)), where s is the sign of the token's A, and A_i is the mean of A in
    the sequence. The mean of L over the sequence's tokens has the value and the gradient of -A_i R_i, the loss of GMPO
    (Zhao et al., arXiv 2507.20673), which averages sequences. The clip is on log-ratios, the bound of 10 is GSPO's.
    """
    difference, sign = logp - old_logp, advantages.sign()
    free, bounded = sign * difference, sign * difference.clamp(-clip_low, clip_high)
    kept = sign * torch.minimum(free, bounded)
    ratio = sequence_token_ratio(kept, torch.zeros_like(kept), sequence_ids, num_sequences)
    advantage = sequence_mean(advantages, sequence_ids, num_sequences)[sequence_ids].to(logp.dtype)
    return _policy_loss(-advantage * ratio, logp, old_logp, ratio=ratio, clipped=free > bounded)


def sapo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> PolicyLoss:
    """L = -A (4 / tau) sigmoid(tau (r - 1)); tau is one for A > 0, the other for A <= 0.

    A soft gate instead of a clip: SAPO (Gao et al., arXiv 2511.20347). The slope in r is -A where r = 1, and falls off
    on both sides. The paper averages tokens within a sequence, then sequences.
    """
    assert temperature_positive > 0 and temperature_negative > 0, (temperature_positive, temperature_negative)
    ratio = log_ratio(logp, old_logp).exp()
    positive, negative = ratio.new_tensor(temperature_positive), ratio.new_tensor(temperature_negative)
    temperature = torch.where(advantages > 0, positive, negative)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return _policy_loss(-advantages * gate, logp, old_logp, ratio=ratio)


# A weight without gradient, times the log-probability


def reinforce(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> PolicyLoss:
    """L = -A logp: Williams, 1992, and GPG (Chu et al., arXiv 2504.02546). `old_logp` is for the logs only."""
    return _policy_loss(-advantages * logp, logp, old_logp, ratio=log_ratio(logp, old_logp).exp())


def cispo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> PolicyLoss:
    """L = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp: no token loses its gradient.

    CISPO (MiniMax-M1, arXiv 2506.13585), with bounds that are offsets from 1, as in verl: a `clip_low` of 1 is no lower
    bound, and a `clip_high` of 4 caps the weight at 5, as ScaleRL does (Khatri et al., arXiv 2510.13786).
    """
    ratio = log_ratio(logp, old_logp).exp().detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return _policy_loss(-weight * advantages * logp, logp, old_logp, ratio=ratio, clipped=weight != ratio)


def dppo_tv(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.15,
    clip_high: float = 0.15,
    max_ratio: float = 20.0,
) -> PolicyLoss:
    """L = -A sg(min(r, max_ratio)) logp, or 0 for tokens that went too far in the direction of A.

    Too far is p - q > clip_high where A > 0, and q - p > clip_low elsewhere: the total variation of "this token or
    another", with p = exp(logp) and q = exp(old_logp). DPPO-Binary-TV (Qi et al., arXiv 2602.04879).
    """
    change = logp.detach().exp() - old_logp.detach().exp()
    too_far = torch.where(advantages > 0, change > clip_high, change < -clip_low)
    return _dppo(logp, old_logp, advantages, too_far, max_ratio)


def dppo_kl(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.05,
    clip_high: float = 0.05,
    max_ratio: float = 20.0,
) -> PolicyLoss:
    """`dppo_tv` with KL = q log(q / p) + (1 - q) log((1 - q) / (1 - p)) for the distance.

    1e-8 is added to 1 - q and 1 - p. Too far is KL > clip_high and p > q where A > 0, and KL > clip_low and p < q
    elsewhere. DPPO-Binary-KL (Qi et al., arXiv 2602.04879).
    """
    # A probability rounded above 1 would give NaN, and near 1 the difference from it loses all its digits.
    logp_now, logp_old = logp.detach().clamp(max=0).double(), old_logp.detach().clamp(max=0).double()
    others_now, others_old = (-torch.expm1(x) for x in (logp_now, logp_old))
    distance = logp_old.exp() * (logp_old - logp_now)
    distance = distance + others_old * ((others_old + 1e-8) / (others_now + 1e-8)).log()
    up, down = logp_now > logp_old, logp_now < logp_old
    too_far = torch.where(advantages > 0, up & (distance > clip_high), down & (distance > clip_low))
    return _dppo(logp, old_logp, advantages, too_far, max_ratio)


def _dppo(logp: Tensor, old_logp: Tensor, advantages: Tensor, too_far: Tensor, max_ratio: float) -> PolicyLoss:
    ratio = log_ratio(logp, old_logp).exp().detach()
    weight = ratio.clamp(max=max_ratio) * ~too_far
    truncated = (ratio > max_ratio) & ~too_far
    return _policy_loss(
        -advantages * weight * logp, logp, old_logp, ratio=ratio, clipped=too_far, clipped_low=truncated
    )


# A regression


def dro(logp: Tensor, old_logp: Tensor, advantages: Tensor, *, beta: float) -> PolicyLoss:
    """L = -A logp + beta / 2 d^2, without a bound on d: it pulls back to the old policy where A = 0 too.

    The policy's part of DRO (Richemond et al., arXiv 2405.19107), in which beta is tau, and the advantage is the reward
    less a value.
    """
    assert beta > 0, beta
    loss = -advantages * logp + beta / 2 * (logp - old_logp).square()
    return _policy_loss(loss, logp, old_logp, ratio=log_ratio(logp, old_logp).exp())
