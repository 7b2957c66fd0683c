"""Advantages of sampled responses relative to their group, in float64 and without gradient."""

import torch
from torch import Tensor


def grpo(rewards: Tensor, group_ids: Tensor, *, normalize_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean_g) / (std_g + eps), the group statistics of GRPO (Shao et al., arXiv 2402.03300).

    `rewards` [n], `group_ids` [n] int64; the result is [n] float64. The standard deviation is unbiased, as in verl.
    Without `normalize_by_std` it is the A_i = r_i - mean_g of Dr. GRPO (Liu et al., arXiv 2503.20783).

    A NaN reward means that the response could not be judged: it is left out of the statistics, and its advantage is 0.
    A group whose judged rewards are all equal, or that has only one, teaches nothing: its advantages are exactly 0.
    """
    rewards = rewards.double()
    judged = ~rewards.isnan()
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        members = (group_ids == group) & judged
        values = rewards[members]
        # Decided by comparison: the mean of equal numbers may be rounded, and eps would not hide the difference.
        if values.numel() == 0 or values.min() == values.max():
            continue
        centred = values - values.mean()
        advantages[members] = centred / (values.std(correction=1) + eps) if normalize_by_std else centred
    return advantages
