"""Advantages of sampled responses and their tokens, in float64 and without gradient.

What is about responses takes tensors [n], `rewards` and `group_ids` (int64, the same for all answers to one prompt),
and gives [n]. What is about tokens takes flat tensors [N] over the tokens that bear loss, those of the whole batch, and
`sequence_ids` [N] int64, and gives [N]. The tokens of a sequence lie together and in order; a token without loss is
absent, so that gaps are bridged. Where both occur, `sequence_ids` are positions in the tensors [n].

A NaN reward means that the response could not be judged: it is left out of all statistics, and its advantages are 0. In
estimators that compare within a group, a group whose judged rewards are all equal, or that has only one, teaches
nothing: its advantages are exactly 0. Responses without tokens count in their group like any other.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_WHITENING_EPSILON = 1e-8


# One per response


def grpo(rewards: Tensor, group_ids: Tensor, *, normalize_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean_g) / (std_g + eps), the group statistics of GRPO (Shao et al., arXiv 2402.03300).

    The standard deviation is unbiased, as in verl. Without `normalize_by_std` it is the A_i = r_i - mean_g of Dr. GRPO
    (Liu et al., arXiv 2503.20783).
    """
    rewards = rewards.detach().double()
    advantages = torch.zeros_like(rewards)
    for members in _instructive(rewards, group_ids):
        values = rewards[members]
        centred = values - values.mean()
        advantages[members] = centred / (values.std(correction=1) + eps) if normalize_by_std else centred
    return advantages


def rloo(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = r_i - mean of the others of the group = (n_g r_i - sum_g) / (n_g - 1).

    REINFORCE leave-one-out (Ahmadian et al., arXiv 2402.14740).
    """
    rewards = rewards.detach().double()
    advantages = torch.zeros_like(rewards)
    for members in _instructive(rewards, group_ids):
        values, count = rewards[members], len(members)
        advantages[members] = (count * values - values.sum()) / (count - 1)
    return advantages


def opo(rewards: Tensor, group_ids: Tensor, lengths: Tensor) -> Tensor:
    """A_i = r_i - sum_g(l r) / sum_g(l), with the lengths l [n] in tokens that bear loss.

    OPO (Hao et al., arXiv 2505.23585): the baseline of least variance, if gradients of tokens are alike in size and
    independent. A group without any token has advantages 0.
    """
    rewards, lengths = rewards.detach().double(), lengths.double()
    advantages = torch.zeros_like(rewards)
    for members in _instructive(rewards, group_ids):
        values, weights = rewards[members], lengths[members]
        if weights.sum() > 0:
            advantages[members] = values - (weights * values).sum() / weights.sum()
    return advantages


def gpg(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_i = (n / n_nonzero) (r_i - mean_g), where n_nonzero of the n judged rewards of the batch are not 0.

    Group policy gradient (Chu et al., arXiv 2504.02546), with the factor of verl. The paper's is n over the number of
    responses whose group has rewards that differ.
    """
    rewards = rewards.detach().double()
    judged = rewards[~rewards.isnan()]
    scale = judged.numel() / max(int(judged.count_nonzero()), 1)
    return scale * grpo(rewards, group_ids, normalize_by_std=False)


def pass_at_k(rewards: Tensor, group_ids: Tensor, *, normalize_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - second_g) / (std_g + eps) for the best response of the group, 0 for the others and for a tie.

    With the group as the k tries, what the maximum loses without the response (Tang et al., arXiv 2503.19595). The
    division is verl's, by the unbiased standard deviation.
    """
    rewards = rewards.detach().double()
    advantages = torch.zeros_like(rewards)
    for members in _instructive(rewards, group_ids):
        values = rewards[members]
        best, second = values.topk(2).values
        lead = best - second
        scale = values.std(correction=1) + eps if normalize_by_std else 1.0
        advantages[members[values.argmax()]] = lead / scale
    return advantages


def remax(rewards: Tensor, baselines: Tensor) -> Tensor:
    """A_i = r_i - b_i, where b [n] are the rewards of greedy responses to the same prompts.

    ReMax (Li et al., arXiv 2310.10505). It compares with no group, so that a single response may have an advantage.
    """
    advantages = rewards.detach().double() - baselines.detach().double()
    return advantages.where(~advantages.isnan(), 0.0)


def _instructive(rewards: Tensor, group_ids: Tensor) -> Iterator[Tensor]:
    """Positions of the judged responses, for every group in which their rewards differ."""
    judged = ~rewards.isnan()
    for group in group_ids.unique():
        (members,) = ((group_ids == group) & judged).nonzero(as_tuple=True)
        values = rewards[members]
        # Decided by comparison: the mean of equal numbers may be rounded, and eps would not hide the difference.
        if len(members) and values.min() < values.max():
            yield members


# One per token


def reinforce_plus_plus(token_rewards: Tensor, sequence_ids: Tensor, *, gamma: float = 1.0) -> Tensor:
    """A_t = whiten(R)_t with the returns R_t = sum_{s >= t} gamma^(s - t) r_s.

    REINFORCE++ (Hu et al., arXiv 2501.03262): the baseline and the scale are those of all tokens of the batch.
    """
    returns = returns_to_go(token_rewards, sequence_ids, gamma=gamma)
    return whiten(returns, judged=judged_tokens(token_rewards, sequence_ids))


def reinforce_plus_plus_baseline(rewards: Tensor, group_ids: Tensor, sequence_ids: Tensor) -> Tensor:
    """A_t = whiten(r_i - mean_g)_t for every token t of response i.

    The variant with a group baseline of REINFORCE++ (Hu et al., arXiv 2501.03262). A response of which its group
    teaches nothing enters the whitening with 0, and leaves it with minus the mean of all tokens, scaled.
    """
    centred = grpo(rewards, group_ids, normalize_by_std=False)
    return whiten(centred[sequence_ids], judged=~rewards.isnan()[sequence_ids])


def remax_to_go(token_rewards: Tensor, sequence_ids: Tensor, baselines: Tensor, *, gamma: float = 1.0) -> Tensor:
    """A_t = R_t - b_i with the returns R_t = sum_{s >= t} gamma^(s - t) r_s, where b [n] are greedy rewards.

    ReMax (Li et al., arXiv 2310.10505) for rewards of tokens. It is `remax` if the last token has all of the reward and
    gamma is 1.
    """
    own = baselines.detach().double()[sequence_ids]
    advantages = returns_to_go(token_rewards, sequence_ids, gamma=gamma) - own
    return advantages.where(judged_tokens(token_rewards, sequence_ids) & ~own.isnan(), 0.0)


def gae(
    token_rewards: Tensor, values: Tensor, sequence_ids: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A_t = sum_{s >= t} (gamma lam)^(s - t) (r_s + gamma V_{s+1} - V_s), and the returns A_t + V_t.

    Generalized advantage estimation (Schulman et al., arXiv 1506.02438). `values` are of the state before each token;
    after the last one V is 0. The advantages are not whitened: `whiten(advantages, judged=...)` is for the caller. A
    sequence that could not be judged has returns equal to its values, from which nothing is learned either.
    """
    values = values.detach().double()
    judged = judged_tokens(token_rewards, sequence_ids)
    following = torch.zeros_like(values)
    following[:-1] = values[1:].where(sequence_ids[1:] == sequence_ids[:-1], 0.0)
    errors = token_rewards.detach().double() + gamma * following - values
    advantages = _discounted_sum(errors.where(judged, 0.0), sequence_ids, gamma * lam)
    return advantages, advantages + values


def returns_to_go(token_rewards: Tensor, sequence_ids: Tensor, *, gamma: float = 1.0) -> Tensor:
    """R_t = sum_{s >= t} gamma^(s - t) r_s within a sequence [N]; 0 in a sequence that could not be judged."""
    rewards = token_rewards.detach().double().where(judged_tokens(token_rewards, sequence_ids), 0.0)
    return _discounted_sum(rewards, sequence_ids, gamma)


def judged_tokens(token_rewards: Tensor, sequence_ids: Tensor) -> Tensor:
    """Tokens of sequences without a NaN reward; bool [N]."""
    return ~torch.isin(sequence_ids, sequence_ids[token_rewards.isnan()])


def whiten(values: Tensor, *, judged: Tensor | None = None) -> Tensor:
    """y = (x - mu) / sqrt(var + 1e-8) [N], for the tokens of a whole batch.

    mu = sum(x) / (N + 1e-8), var = sum((x - mu)^2) / (N + 1e-8) * N / (N - 1), as in verl. With `judged` [N] bool only
    those tokens count, and the others are 0. Equal values, also if there is only one, give exactly 0.
    """
    values = values.detach().double()
    counted = values if judged is None else values[judged]
    count = counted.numel()
    if count == 0 or counted.min() == counted.max():
        return torch.zeros_like(values)
    mean = counted.sum() / (count + _WHITENING_EPSILON)
    variance = (counted - mean).square().sum() / (count + _WHITENING_EPSILON) * count / (count - 1)
    whitened = (values - mean) * (variance + _WHITENING_EPSILON).rsqrt()
    return whitened if judged is None else whitened.where(judged, 0.0)


def _discounted_sum(values: Tensor, sequence_ids: Tensor, factor: float) -> Tensor:
    """y_t = x_t + factor y_{t+1} within a sequence [N]."""
    assert len(sequence_ids.unique_consecutive()) == len(sequence_ids.unique()), "a sequence lies in pieces"
    total, reach = values.clone(), 1
    # Every pass doubles how far ahead each token has summed, so that long sequences take few passes.
    while reach < len(total) and bool((same := sequence_ids[reach:] == sequence_ids[:-reach]).any()):
        total[:-reach] += (factor**reach * total[reach:]).where(same, 0.0)
        reach *= 2
    return total
