"""Weights of tokens: hand-computed values, and degenerate inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.algorithms.reduction import MODES, token_weights

NAN = math.nan


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_close(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got, vector(*expected), rtol=1e-12, atol=1e-12)


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

    @given(
        lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
        mode=st.sampled_from(MODES),
        seed=st.integers(0, 2**31),
    )
    def test_a_batch_that_is_repeated_has_the_same_loss(self, lengths: list[int], mode: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        masks = [torch.rand(length, generator=generator) > 0.3 for length in lengths]
        values = [torch.randn(length, generator=generator, dtype=torch.float64) for length in lengths]

        def loss(times: int) -> float:
            weights = token_weights(masks * times, mode, horizon=7)
            return float(sum((w * v).sum() for w, v in zip(weights, values * times, strict=True)))

        assert loss(3) == pytest.approx(loss(1), rel=1e-12, abs=1e-12)
