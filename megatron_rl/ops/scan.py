"""Linear recurrences along packed sequences, without a loop over tokens.

    y_t = x_t + a y_{t-1},    0 <= a < 1,    y = 0 before the first token of each sequence

is computed by doubling (Hillis and Steele, "Data Parallel Algorithms", 1986): after the pass at distance d

    y_t = sum_{j < 2d} a^j x_{t-j},    from    y_t += a^d y_{t-d}    where t has at least d tokens before it.

Passes at d = 1, 2, 4, ... end with the longest sequence, or where a^d is too small to count. Only powers below 1 occur,
so nothing overflows, as the inverse powers of the closed form a^t sum_j a^-j x_j do.

The recurrence is linear, and its transpose runs the other way: dL/dx_t = g_t + a dL/dx_{t+1}.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from megatron_rl.ops.dispatch import uses_triton

Init = Literal["one", "first"]


def exponential_average(weights: Tensor, sequence_ids: Tensor, *, beta: float, init: Init = "one") -> Tensor:
    """w'_t = beta w_t + (1 - beta) w'_{t-1} over the tokens of each sequence, [N].

    Before its first token a sequence has w'_0 = 1 (`one`), or its first token keeps its value, w'_1 = w_1 (`first`).
    With `beta` 1 the weights are returned as they are.

    `weights` [N] are those of the tokens that bear loss, and no others: a token that is not there is passed over.
    `sequence_ids` [N] int64 are not decreasing. Differentiable through the history, any number of times; for the
    gradient G_t = g_t + (1 - beta) G_{t+1} of the recurrence, that of w_t is beta G_t (G_1 at the first token of
    `first`).
    """
    assert 0 < beta <= 1, beta
    assert init in ("one", "first"), init
    if beta == 1:
        return weights
    places = _places(sequence_ids)
    scaled = beta * weights
    start = weights if init == "first" else scaled + (1 - beta)
    return _DecayedSum.apply(start.where(places == 0, scaled), places, 1 - beta, False)


def decayed_sum(values: Tensor, sequence_ids: Tensor, decay: float, *, reverse: bool = False) -> Tensor:
    """y_t = x_t + decay y_{t-1} within each sequence, [N]; y_t = x_t + decay y_{t+1} in `reverse`.

    `sequence_ids` [N] int64 are not decreasing.
    """
    assert 0 <= decay < 1, decay
    return _DecayedSum.apply(values, _places(sequence_ids), decay, reverse)


class _DecayedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, decay: float, reverse: bool) -> Tensor:
        assert values.shape == places.shape, (values.shape, places.shape)
        assert values.dtype in (torch.float32, torch.float64), values.dtype
        ctx.save_for_backward(places)
        ctx.decay, ctx.reverse = decay, reverse
        if uses_triton(values):
            from megatron_rl.ops.triton import scan

            return scan.decayed_sum(values, places, decay, reverse)
        return _doubled(values, places, decay, reverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _DecayedSum.apply(grad, places, ctx.decay, not ctx.reverse), None, None, None


def _doubled(values: Tensor, places: Tensor, decay: float, reverse: bool) -> Tensor:
    limits = torch.finfo(values.dtype)
    # Smaller powers only make denormal numbers, which are slow.
    least = limits.tiny / limits.eps
    longest = int(places.max()) + 1 if places.numel() else 0
    total = values.clone()
    distance = 1
    while distance < longest and decay**distance > least:
        target, source = total[distance:], total[:-distance]
        if reverse:
            target, source = source, target
        # Not multiplied by the mask: a NaN stays in its own sequence.
        joined = source.where(places[distance:] >= distance, 0)
        target.add_(joined, alpha=decay**distance)
        distance *= 2
    return total


def _places(sequence_ids: Tensor) -> Tensor:
    """How many tokens of its own sequence stand before each token, [N] int32."""
    assert sequence_ids.ndim == 1, sequence_ids.shape
    assert bool((sequence_ids[1:] >= sequence_ids[:-1]).all()), "the tokens of a sequence are not in one piece"
    index = torch.arange(sequence_ids.shape[0], dtype=torch.int32, device=sequence_ids.device)
    continued = torch.zeros_like(sequence_ids, dtype=torch.bool)
    continued[1:] = sequence_ids[1:] == sequence_ids[:-1]
    return index - index.where(~continued, 0).cummax(0).values
