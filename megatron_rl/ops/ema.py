"""An exponential moving average of model weights, in place on the shards that a rank holds.

    theta_T <- d theta_T + (1 - d) theta_S

The average is kept in float32 or wider: with bfloat16 alone a step below 2^-9 of a weight is lost, so that an average
with 1 - d = 0.01 would hardly move. It is taken per shard, and needs no communication.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.ops.dispatch import uses_triton


def decay(
    num_updates: int,
    *,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
    min_value: float = 0.0,
    max_value: float = 0.9999,
    update_after: int = 0,
) -> float:
    """d of the next update, where `num_updates` were done before: clamp(1 - (1 + n / inv_gamma)^-power, min, max).

    n = num_updates - update_after - 1, and up to n = 0 the average is a copy (d = 0), whatever `min_value` is: these
    are update_after + 2 updates. The schedule is that of Diffusion Policy (Chi et al., arXiv 2303.04137).
    """
    assert num_updates >= 0 and inv_gamma > 0 and power > 0, (num_updates, inv_gamma, power)
    assert 0 <= min_value <= max_value <= 1, (min_value, max_value)
    steps = num_updates - update_after - 1
    if steps <= 0:
        return 0.0
    return min(max(1 - (1 + steps / inv_gamma) ** -power, min_value), max_value)


@torch.no_grad()
def ema_update_(
    averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, *, copies: Sequence[Tensor] | None = None
) -> None:
    """averages <- decay averages + (1 - decay) weights, one by one; exactly the weights at decay 0, unchanged at 1.

    The averages are float32 or float64, and the weights have their shapes and dtypes: shards of flat buffers, or
    parameters. `copies` of the same shapes, float32 or narrower, are what a model computes with; they become the
    averages, rounded.
    """
    assert 0 <= decay <= 1, decay
    for average, weight in zip(averages, weights, strict=True):
        assert average.dtype == weight.dtype and average.dtype in (torch.float32, torch.float64), average.dtype
        assert average.shape == weight.shape, (average.shape, weight.shape)
    for average, copy in zip(averages, copies or averages, strict=True):
        assert average.shape == copy.shape, (average.shape, copy.shape)
        assert copies is None or copy.dtype != torch.float64, copy.dtype
    if not averages:
        return
    if uses_triton(averages[0]):
        from megatron_rl.ops.triton import average as kernels

        kernels.ema_update_(averages, weights, copies, decay)
        return
    torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
    if copies is not None:
        torch._foreach_copy_(list(copies), list(averages))
