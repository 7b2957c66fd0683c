"""Advantages and weights: hand-computed values, and degenerate inputs."""

import math

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import grpo
from megatron_rl.algorithms.reduction import token_weights

NAN = math.nan


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_close(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got, vector(*expected), rtol=1e-12, atol=1e-12)


class TestAdvantages:
    def test_by_hand(self) -> None:
        """Groups interleave. {1, 2, 6}: mean 3, unbiased variance (4 + 1 + 9) / 2. {0, 1}: mean 1/2, std 1/sqrt(2)."""
        rewards, groups = vector(1, 0, 2, 1, 6), torch.tensor([7, 3, 7, 3, 7])
        assert_close(grpo(rewards, groups, normalize_by_std=False), -2, -0.5, -1, 0.5, 3)
        wide, narrow = math.sqrt(7) + 1e-6, math.sqrt(0.5) + 1e-6
        assert_close(grpo(rewards, groups), -2 / wide, -0.5 / narrow, -1 / wide, 0.5 / narrow, 3 / wide)

    @pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1e9])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_equal_rewards_give_exactly_zero(self, value: float, dtype: torch.dtype) -> None:
        for size in (1, 2, 8, 16):
            rewards = torch.full((size,), value, dtype=dtype)
            assert torch.equal(grpo(rewards, torch.zeros(size, dtype=torch.int64)), torch.zeros(size).double())

    def test_unjudged_samples_leave_the_statistics(self) -> None:
        """Group 0 keeps {1, 3}; group 1 keeps one sample, group 2 none."""
        rewards, groups = vector(1, NAN, 3, 5, NAN, NAN), torch.tensor([0, 0, 0, 1, 1, 2])
        assert_close(grpo(rewards, groups, normalize_by_std=False), -1, 0, 1, 0, 0, 0)
        assert_close(grpo(rewards, groups, eps=0), -math.sqrt(0.5), 0, math.sqrt(0.5), 0, 0, 0)

    def test_nothing(self) -> None:
        assert grpo(vector(), torch.empty(0, dtype=torch.int64)).shape == (0,)


class TestReduction:
    MASKS = (
        torch.tensor([True, False, True]),
        torch.tensor([False, False]),
        torch.tensor([True, True, True, True]),
        torch.tensor([], dtype=torch.bool),
    )

    @pytest.mark.parametrize(
        ("mode", "first", "third"),
        [
            ("token-mean", 1 / 6, 1 / 6),
            ("seq-mean-token-mean", 1 / 4, 1 / 8),
            ("seq-mean-token-sum", 1 / 2, 1 / 2),
            ("seq-mean-token-sum-norm", 1 / 20, 1 / 20),
        ],
    )
    def test_by_hand(self, mode: str, first: float, third: float) -> None:
        weights = token_weights(self.MASKS, mode, horizon=10)
        assert_close(torch.cat(weights), first, 0, first, 0, 0, third, third, third, third)
        assert [len(w) for w in weights] == [3, 2, 4, 0] and all(w.dtype == torch.float64 for w in weights)

    @pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
    def test_means_sum_to_one(self, mode: str) -> None:
        generator = torch.Generator().manual_seed(2)
        masks = [torch.rand(n, generator=generator) < 0.6 for n in (1, 5, 17, 130, 3)]
        assert float(torch.cat(token_weights(masks, mode)).sum()) == pytest.approx(1, abs=1e-12)

    @pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
    def test_no_token_left(self, mode: str) -> None:
        weights = token_weights([torch.zeros(3, dtype=torch.bool)] * 2, mode, horizon=4)
        assert all(torch.equal(w, torch.zeros(3).double()) for w in weights)
        assert token_weights([], mode, horizon=4) == []

    def test_refusals_name_what_is_wrong(self) -> None:
        with pytest.raises(ValueError, match=r"'mean'.*token-mean, seq-mean-token-mean"):
            token_weights(self.MASKS, "mean")
        for horizon in (None, 0):
            with pytest.raises(ValueError, match=f"horizon, which is {horizon}"):
                token_weights(self.MASKS, "seq-mean-token-sum-norm", horizon=horizon)
