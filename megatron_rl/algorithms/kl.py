"""Estimators of KL(policy || reference) from tokens that the policy drew, one value per token.

With d = ref_logp - logp (Schulman, "Approximating KL Divergence", 2020):

    k1 = -d                unbiased, high variance, may be negative
    k2 = d^2 / 2           biased, never negative; its gradient is that of the KL where the policy drew the token
    k3 = exp(d) - 1 - d    unbiased, never negative

Flat [N] tensors over the tokens that bear loss. As a loss k1 is useless: its gradient is that of logp alone.
"""

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0
_MAX_K3 = 10.0


def kl(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """The estimate per token [N]; differentiable in `logp`.

    k3 takes d within [-20, 20] and is bounded at 10, as in verl; beyond either bound it has no gradient.
    """
    difference = ref_logp - logp
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    assert estimator == "k3", estimator
    bounded = difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (torch.expm1(bounded) - bounded).clamp(max=_MAX_K3)
