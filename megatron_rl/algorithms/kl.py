"""Estimators of KL(policy || reference) from tokens that the policy drew, one value per token.

With d = ref_logp - logp (Schulman, "Approximating KL Divergence", 2020):

    k1  = -d                unbiased, high variance, may be negative
    k2  = d^2 / 2           biased, never negative; its gradient is that of the KL where the policy drew the token
    k3  = exp(d) - 1 - d    unbiased, never negative
    abs = |d|               biased, never negative

The mean of an estimate's gradient is not the gradient of its mean, because the policy also decides which tokens are
drawn. For an estimate k with the slope k' in logp, the value and the factor of grad logp in the gradient are

    naive                  k      k'            what autograd gives; for k1 it is 1, and blind to the reference
    straight_through_k2    k      -d            that of k2, unbiased on the policy's own tokens; the "+" of verl
    score_function         k      k' + k        unbiased on the policy's own tokens, if k is
    is_ratio               r k    r (k' + k)    unbiased on tokens of the old policy, if k is on the policy's own

with r = exp(clamp(logp - old_logp, -20, 20)), which has no slope beyond its bounds. Tang and Munos (arXiv 2506.09477)
discuss the first three, the last is of DeepSeek-V3.2 (arXiv 2512.02556).

Flat [N] tensors over the tokens that bear loss.
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.importance import log_ratio

ESTIMATORS = ("k1", "k2", "k3", "abs")
GRADIENTS = ("naive", "straight_through_k2", "score_function", "is_ratio")

_MAX_LOG_RATIO = 20.0
_MAX_K3 = 10.0


def kl(
    logp: Tensor,
    ref_logp: Tensor,
    estimator: str,
    *,
    gradient: str = "naive",
    old_logp: Tensor | None = None,
) -> Tensor:
    """The estimate per token [N]; differentiable in `logp`, as `gradient` says. `is_ratio` alone needs `old_logp`.

    k3 takes d within [-20, 20] and is bounded at 10, as in verl; beyond either bound k3' is 0.
    """
    assert gradient in GRADIENTS, gradient
    estimate = _estimate(ref_logp - logp, estimator)
    if gradient == "straight_through_k2":
        k2 = _estimate(ref_logp - logp, "k2")
        return estimate.detach() + (k2 - k2.detach())
    if gradient == "score_function":
        return estimate * (logp - logp.detach()).exp()
    if gradient == "is_ratio":
        assert old_logp is not None, "is_ratio weighs tokens of the old policy"
        return estimate * log_ratio(logp, old_logp).exp()
    return estimate


def _estimate(difference: Tensor, estimator: str) -> Tensor:
    assert estimator in ESTIMATORS, estimator
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "abs":
        return difference.abs()
    bounded = difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (torch.expm1(bounded) - bounded).clamp(max=_MAX_K3)
