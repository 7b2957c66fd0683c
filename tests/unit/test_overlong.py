"""The penalty for length: nothing, a slope, all of it."""

import pytest
import torch

from megatron_rl.algorithms.overlong import overlong_penalty


def test_by_hand() -> None:
    """Free up to 12 tokens, 1/8 of the factor for each one more, and never more than the factor."""
    lengths = torch.tensor([0, 1, 12, 13, 16, 20, 21, 1000])
    expected = torch.tensor([0, 0, 0, -0.125, -0.5, -1, -1, -1], dtype=torch.float64)
    assert torch.equal(overlong_penalty(lengths, max_length=20, buffer=8), expected)
    assert torch.equal(overlong_penalty(lengths, max_length=20, buffer=8, factor=0.5), expected / 2)


def test_the_buffer_may_be_the_whole_length() -> None:
    expected = torch.tensor([0, -0.25, -1], dtype=torch.float64)
    assert torch.equal(overlong_penalty(torch.tensor([0, 1, 4]), max_length=4, buffer=4), expected)


def test_nothing() -> None:
    assert overlong_penalty(torch.tensor([], dtype=torch.int64), max_length=4, buffer=2).shape == (0,)


@pytest.mark.parametrize("buffer", [0, 5])
def test_refuses_a_buffer_that_is_no_part_of_the_length(buffer: int) -> None:
    with pytest.raises(AssertionError):
        overlong_penalty(torch.tensor([1]), max_length=4, buffer=buffer)
