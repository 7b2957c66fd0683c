"""Self-distillation: how far the policy is from a teacher that was shown more, one value per token.

SDPO (Hübotter et al., arXiv 2601.20802) gives the teacher, a slower copy of the policy, feedback or a solution in its
prompt and lets it read the policy's own response. The policy (the student) learns the teacher's next-token distribution
there. Log-probabilities of both at the same k ids come from the vocabulary operator; this module makes a loss of them.

Flat tensors over the tokens that bear loss. The loss of a batch is `sum(weights * loss)`, with the weights of
`algorithms/reduction.py`, which the weights of responses and of tokens at the end of this module may multiply.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_rl.algorithms.importance import log_ratio

Tail = Literal["exact", "clamped", "none"]

# Probabilities below e^-1e4 are 0 in every dtype; the floor keeps 0 (log 0 - log 0) at 0.
_FLOOR = -1e4
_MAX_LOG_MASS = -1e-7


def divergence(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """The divergence [N] of two distributions over the same buckets, given as log-probabilities [N, B].

    With s and t the probabilities of student and teacher,

        alpha = 0       sum t (log t - log s)    the forward KL
        alpha = 1       sum s (log s - log t)    the reverse KL
        otherwise       (1 - alpha) KL(s || m) + alpha KL(t || m),    m = (1 - alpha) s + alpha t

    The last is the generalised Jensen-Shannon divergence (Agarwal et al., arXiv 2306.13649). It tends to 0 where alpha
    tends to 0 or 1, so the ends are not its limits, and learning rates do not carry over.
    """
    return divergence_terms(student, teacher, alpha).sum(-1)


def divergence_terms(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """The summands [N, B] of the divergence; one of them, that of the tail say, can be negative."""
    assert 0 <= alpha <= 1, alpha
    student, teacher = student.clamp(min=_FLOOR), teacher.clamp(min=_FLOOR)
    if alpha == 0:
        return _kl(teacher, student)
    if alpha == 1:
        return _kl(student, teacher)
    logs = torch.tensor([1 - alpha, alpha], dtype=torch.float64).log().tolist()
    mixture = torch.logaddexp(student + logs[0], teacher + logs[1])
    return (1 - alpha) * _kl(student, mixture) + alpha * _kl(teacher, mixture)


def _kl(left: Tensor, right: Tensor) -> Tensor:
    return left.exp() * (left - right)


def buckets(topk_logp: Tensor, tail_logp: Tensor, tail: Tail) -> Tensor:
    """Log-probabilities [N, k or k + 1] of buckets that make up a whole, from those at k ids and of the tail [N].

    exact      one more bucket, `tail_logp`: a sum over all other ids
    clamped    one more bucket, log(1 - exp(min(log sum_k p_k, -1e-7))), as the code of the paper has it: in float32
               it is noise where the tail is small, and where the k ids hold more than 1 - 1e-7 it is -16.1 and
               without a gradient
    none       p_k / sum_k p_k: the other ids are as if they were not there
    """
    mass = topk_logp.logsumexp(-1, keepdim=True)
    if tail == "none":
        return topk_logp - mass
    if tail == "exact":
        return torch.cat([topk_logp, tail_logp[:, None]], 1)
    assert tail == "clamped", tail
    return torch.cat([topk_logp, (-torch.expm1(mass.clamp(max=_MAX_LOG_MASS))).log()], 1)


def sampled_token(logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """sg(logp - teacher_logp) logp, [N]: a policy gradient with the advantage teacher_logp - logp.

    On the policy's own tokens its gradient is that of KL(student || teacher), unbiased; its value is no divergence, and
    can be negative.
    """
    return (logp - teacher_logp).detach() * logp


class DistillationLoss(NamedTuple):
    """Per token [N]; only `loss` is differentiable."""

    loss: Tensor
    ratio: Tensor  # the importance weight, clipped
    clipped: Tensor  # bool: it was larger


def off_policy(
    loss: Tensor,
    logp: Tensor,
    old_logp: Tensor,
    *,
    is_clip: float | None = 2.0,
    rollout_weights: Tensor | None = None,
) -> DistillationLoss:
    """The loss [N] weighted for tokens that an older policy drew.

    sg(min(r, is_clip)) loss, with r = exp(clamp(logp - old_logp, -20, 20)) of the drawn token: an upper clip only, and
    exactly 1 on the policy itself. None for no such weight. `rollout_weights`, those of the rollout correction for an
    engine that draws from another distribution than the trainer has, are one more factor.
    """
    ratio = log_ratio(logp, old_logp).exp().detach()
    clipped = torch.zeros_like(ratio, dtype=torch.bool)
    if is_clip is not None:
        clipped = ratio > is_clip
        ratio = ratio.clamp(max=is_clip)
        loss = ratio * loss
    if rollout_weights is not None:
        loss = loss * rollout_weights.detach()
    return DistillationLoss(loss, ratio, clipped)


def pass_rate_weights(rewards: Tensor, group_ids: Tensor, targets: Tensor, *, threshold: float) -> Tensor:
    """What each response's distillation counts, [n] float64: most where its question is answered right now and then.

        w_i = s_i / mean of s over the targets,    s_i = sqrt(p (1 - p))

    with p the share of the group's judged responses whose reward is at least the threshold: SC-SDPO (Liu et al., arXiv
    2605.27765). `rewards` and `group_ids` are as in algorithms/advantages.py, `targets` [n] bool says which responses
    have a teacher. Over those, of the whole rollout batch, the mean of the weights is 1. A question that is always
    answered right, or never, weighs 0; if all of them do, all weights are 0, and there is nothing to distil.
    """
    rewards = rewards.detach().double()
    judged = ~rewards.isnan()
    successes, counts = (
        torch.zeros(int(group_ids.max()) + 1, dtype=torch.float64).index_add_(0, group_ids, flags.double())
        for flags in (judged & (rewards >= threshold), judged)
    )
    rate = (successes / counts.clamp(min=1))[group_ids]
    spread = (rate * (1 - rate)).sqrt()
    total = spread[targets].sum()
    return spread * targets.sum() / total if total > 0 else torch.zeros_like(spread)


def entropy_weights(entropy: Tensor, beta: float) -> Tensor:
    """exp(-beta H), [N], of the teacher's entropy H in nats over the whole vocabulary, without a gradient.

    A teacher that is unsure says little: after the idea of SRPO (Li et al., arXiv 2604.02288) and EGRSD (arXiv
    2605.13255). The weights are not normalised, so that none depends on another token: the loss gets smaller, and a
    learning rate may be raised.
    """
    return (-beta * entropy.detach()).exp()
