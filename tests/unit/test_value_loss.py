"""PPO's value loss by hand, and how much of the returns is explained."""

import pytest
import torch

from megatron_rl.algorithms.value_loss import explained_variance, value_loss


def test_clipped_values_by_hand() -> None:
    """Inside the band; beyond it towards the return; beyond it and past the return; and away from it."""
    old, returns = torch.zeros(4).double(), torch.tensor([1.0, 1.0, 0.1, -1.0]).double()
    values = torch.tensor([0.1, 0.5, 0.5, 0.5]).double().requires_grad_()
    terms = value_loss(values, old, returns, clip=0.2)
    assert terms.loss.tolist() == pytest.approx([0.405, 0.32, 0.08, 1.125])
    assert terms.clipped.tolist() == [False, True, False, False]
    terms.loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == pytest.approx([-0.9, 0.0, 0.4, 1.5])


def test_without_a_clip_it_is_half_the_square() -> None:
    terms = value_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([5.0]), clip=None)
    assert terms.loss.tolist() == [4.5] and terms.clipped.tolist() == [False]


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.zeros(3), returns) == pytest.approx(0.0, abs=1e-5)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0, abs=1e-4)
    assert explained_variance(returns[:1], returns[:1]) == 0.0
