"""PPO's loss of a value function, and how much of the returns it explains."""

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-5


class ValueLoss(NamedTuple):
    """Per token [N]."""

    loss: Tensor
    clipped: Tensor  # bool: the clipped value is the worse one


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> ValueLoss:
    """max((V - R)^2, (V_c - R)^2) / 2 [N], with V_c = clamp(V, V_old - clip, V_old + clip).

    As in the code of PPO (Schulman et al., arXiv 1707.06347); `clip` None for none. A value that left the band on the
    far side of its return, seen from the old value, has no gradient.
    """
    error = (values - returns).square()
    if clip is None:
        return ValueLoss(error / 2, torch.zeros_like(error, dtype=torch.bool))
    near = values.clamp(old_values - clip, old_values + clip)  # exactly the value itself where it is in the band
    clipped = (near - returns).square()
    return ValueLoss(torch.maximum(error, clipped) / 2, clipped > error)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(R - V) / (var(R) + 1e-5): 1 for a perfect value function, 0 for a constant one."""
    if returns.numel() < 2:
        return 0.0
    rest, whole = (returns - values).double().var(correction=1), returns.double().var(correction=1)
    return float(1 - rest / (whole + EPSILON))
