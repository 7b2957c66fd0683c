"""Rewards for length: what a response loses for coming close to the longest one allowed."""

from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """-factor * clamp((n - (max_length - buffer)) / buffer, 0, 1) for responses of n tokens; [n_responses] float64.

    The soft overlong punishment of DAPO (Yu et al., arXiv 2503.14476), to be added to the reward. Nothing up to
    `max_length - buffer` tokens, the whole `factor` at `max_length`. The end-of-sequence token counts.
    """
    assert 0 < buffer <= max_length, (buffer, max_length)
    excess = (lengths.double() - (max_length - buffer)) / buffer
    return excess.clamp(0, 1) * -factor
