"""Advantages of responses and of tokens: hand-computed values, degenerate inputs, and what must not matter."""

import math
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.algorithms import advantages
from megatron_rl.algorithms.advantages import gae, grpo, reinforce_plus_plus, remax_to_go, returns_to_go, whiten

NAN = math.nan


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_close(got: Tensor, *expected: float) -> None:
    close(got, vector(*expected))


def lengths_of(rewards: Tensor) -> Tensor:
    """Some lengths that belong to the responses wherever they stand: an empty response too."""
    return (rewards.nan_to_num() * 4).abs().long() % 3


BY_GROUP: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": grpo,
    "dr_grpo": lambda rewards, groups: grpo(rewards, groups, normalize_by_std=False),
    "rloo": advantages.rloo,
    "opo": lambda rewards, groups: advantages.opo(rewards, groups, lengths_of(rewards)),
    "gpg": advantages.gpg,
    "pass_at_k": advantages.pass_at_k,
    "pass_at_k_unscaled": lambda rewards, groups: advantages.pass_at_k(rewards, groups, normalize_by_std=False),
}
every_estimator = pytest.mark.parametrize("estimate", BY_GROUP.values(), ids=BY_GROUP.keys())

# Responses as (reward, group), with rewards on a grid that has ties, and some that could not be judged.
RESPONSES = st.lists(
    st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 0.3, 0.7, 1.0, 1.25, NAN]), st.integers(0, 4)), max_size=24
)


class TestAdvantages:
    def test_by_hand(self) -> None:
        """Groups interleave. {1, 2, 6}: mean 3, unbiased variance (4 + 1 + 9) / 2. {0, 1}: mean 1/2, std 1/sqrt(2)."""
        rewards, groups = vector(1, 0, 2, 1, 6), torch.tensor([7, 3, 7, 3, 7])
        assert_close(grpo(rewards, groups, normalize_by_std=False), -2, -0.5, -1, 0.5, 3)
        wide, narrow = math.sqrt(7) + 1e-6, math.sqrt(0.5) + 1e-6
        assert_close(grpo(rewards, groups), -2 / wide, -0.5 / narrow, -1 / wide, 0.5 / narrow, 3 / wide)

    @every_estimator
    @pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1e9])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_equal_rewards_give_exactly_zero(
        self, estimate: Callable[[Tensor, Tensor], Tensor], value: float, dtype: torch.dtype
    ) -> None:
        for size in (1, 2, 8, 16):
            rewards = torch.full((size,), value, dtype=dtype)
            assert torch.equal(estimate(rewards, torch.zeros(size, dtype=torch.int64)), torch.zeros(size).double())

    def test_unjudged_samples_leave_the_statistics(self) -> None:
        """Group 0 keeps {1, 3}; group 1 keeps one sample, group 2 none."""
        rewards, groups = vector(1, NAN, 3, 5, NAN, NAN), torch.tensor([0, 0, 0, 1, 1, 2])
        assert_close(grpo(rewards, groups, normalize_by_std=False), -1, 0, 1, 0, 0, 0)
        assert_close(grpo(rewards, groups, eps=0), -math.sqrt(0.5), 0, math.sqrt(0.5), 0, 0, 0)

    @every_estimator
    def test_nothing(self, estimate: Callable[[Tensor, Tensor], Tensor]) -> None:
        assert estimate(vector(), ids()).shape == (0,)

    @every_estimator
    @settings(max_examples=60, deadline=None)
    @given(responses=RESPONSES, seed=st.integers(0, 99))
    def test_order_does_not_matter(
        self, estimate: Callable[[Tensor, Tensor], Tensor], responses: list[tuple[float, int]], seed: int
    ) -> None:
        rewards, groups = vector(*(r for r, _ in responses)), ids(*(g for _, g in responses))
        order = torch.randperm(len(responses), generator=torch.Generator().manual_seed(seed))
        close(estimate(rewards[order], groups[order]), estimate(rewards, groups)[order])

    @every_estimator
    @settings(max_examples=60, deadline=None)
    @given(responses=RESPONSES)
    def test_unjudged_as_if_absent(
        self, estimate: Callable[[Tensor, Tensor], Tensor], responses: list[tuple[float, int]]
    ) -> None:
        rewards, groups = vector(*(r for r, _ in responses)), ids(*(g for _, g in responses))
        judged = ~rewards.isnan()
        got = estimate(rewards, groups)
        assert got.dtype == torch.float64 and not got.isnan().any()
        assert not got[~judged].any()
        close(got[judged], estimate(rewards[judged], groups[judged]))

    @pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "gpg"])
    @settings(max_examples=60, deadline=None)
    @given(responses=RESPONSES)
    def test_a_group_sums_to_zero(self, name: str, responses: list[tuple[float, int]]) -> None:
        rewards, groups = vector(*(r for r, _ in responses)), ids(*(g for _, g in responses))
        sums = torch.zeros(5).double().index_add_(0, groups, BY_GROUP[name](rewards, groups))
        close(sums, torch.zeros(5).double())

    @every_estimator
    def test_no_gradient(self, estimate: Callable[[Tensor, Tensor], Tensor]) -> None:
        rewards = vector(1, 0, 2).float().requires_grad_()
        got = estimate(rewards, ids(0, 0, 0))
        assert not got.requires_grad and got.any()


class TestOthersByHand:
    """Groups {1, 2, 6} and {0, 1}, which interleave; a lone response of reward 5."""

    REWARDS, GROUPS = vector(1, 0, 2, 1, 6, 5), ids(7, 3, 7, 3, 7, 0)

    def test_rloo(self) -> None:
        """The means of the others: 4, 3.5, 1.5 and 1, 0."""
        assert_close(advantages.rloo(self.REWARDS, self.GROUPS), -3, -1, -1.5, 1, 4.5, 0)

    def test_opo(self) -> None:
        """Baselines (1 * 1 + 0 * 2 + 3 * 6) / 4 and (2 * 0 + 6 * 1) / 8; the empty response has an advantage too."""
        got = advantages.opo(self.REWARDS, self.GROUPS, ids(1, 2, 0, 6, 3, 9))
        assert_close(got, 1 - 4.75, -0.75, 2 - 4.75, 0.25, 6 - 4.75, 0)

    def test_opo_of_equal_lengths_is_dr_grpo(self) -> None:
        got = advantages.opo(self.REWARDS, self.GROUPS, torch.full((6,), 17))
        close(got, grpo(self.REWARDS, self.GROUPS, normalize_by_std=False))

    def test_opo_without_any_token(self) -> None:
        assert_close(advantages.opo(self.REWARDS, self.GROUPS, ids(0, 2, 0, 6, 0, 0)), 0, -0.75, 0, 0.25, 0, 0)

    def test_gpg(self) -> None:
        """Five of six rewards are not 0; of the five judged ones below, two."""
        expected = grpo(self.REWARDS, self.GROUPS, normalize_by_std=False) * 6 / 5
        close(advantages.gpg(self.REWARDS, self.GROUPS), expected)
        got = advantages.gpg(vector(1, 0, NAN, 0, 0, 1), ids(0, 0, 0, 1, 1, 1))
        assert_close(got, 1.25, -1.25, 0, -5 / 6, -5 / 6, 5 / 3)
        assert not advantages.gpg(torch.zeros(4), ids(0, 0, 1, 1)).any()

    def test_pass_at_k(self) -> None:
        got = advantages.pass_at_k(self.REWARDS, self.GROUPS, normalize_by_std=False)
        assert_close(got, 0, 0, 0, 1, 4, 0)
        wide, narrow = math.sqrt(7) + 1e-6, math.sqrt(0.5) + 1e-6
        assert_close(advantages.pass_at_k(self.REWARDS, self.GROUPS), 0, 0, 0, 1 / narrow, 4 / wide, 0)

    def test_pass_at_k_of_a_tie(self) -> None:
        """A second success adds nothing to the maximum."""
        assert not advantages.pass_at_k(vector(1, 0, 1), ids(0, 0, 0)).any()

    def test_remax(self) -> None:
        """One response per prompt is enough, and one that could not be judged, greedy or not, teaches nothing."""
        assert_close(advantages.remax(vector(1, 0, NAN, 1), vector(0.25, 0.25, 0, NAN)), 0.75, -0.25, 0, 0)


class TestReturnsToGo:
    def test_by_hand(self) -> None:
        """Sequence 1 is empty; ids need not be sorted. 1 + 0.5 (2 + 0.5 * 4) = 3."""
        got = returns_to_go(vector(1, 2, 4, 8, 0, 6), ids(2, 2, 2, 0, 3, 3), gamma=0.5)
        assert_close(got, 3, 4, 4, 8, 3, 6)

    def test_a_sequence_that_could_not_be_judged(self) -> None:
        """Not even its tokens after the NaN, which themselves have a return."""
        got = returns_to_go(vector(1, NAN, 4, 8, 1), ids(0, 0, 0, 1, 1))
        assert_close(got, 0, 0, 0, 9, 1)

    def test_a_sequence_in_pieces_is_a_mistake(self) -> None:
        with pytest.raises(AssertionError, match="in pieces"):
            returns_to_go(vector(1, 2, 3), ids(0, 1, 0))

    @settings(max_examples=60, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 40), max_size=5),
        gamma=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        lam=st.sampled_from([0.0, 0.95, 1.0]),
    )
    def test_against_the_recursion(self, lengths: list[int], gamma: float, lam: float) -> None:
        owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        rewards, values = torch.randn(2, len(owners), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        to_go, estimates = [], []
        after, value_after, estimate, owner = 0.0, 0.0, 0.0, -1
        for reward, value, i in zip(*(x.flip(0).tolist() for x in (rewards, values, owners))):
            if i != owner:
                after, value_after, estimate, owner = 0.0, 0.0, 0.0, i
            after = reward + gamma * after
            estimate = reward + gamma * value_after - value + gamma * lam * estimate
            value_after = value
            to_go.append(after)
            estimates.append(estimate)
        close(returns_to_go(rewards, owners, gamma=gamma), vector(*to_go[::-1]))
        got, returns = gae(rewards, values, owners, gamma=gamma, lam=lam)
        close(got, vector(*estimates[::-1]))
        close(returns, vector(*estimates[::-1]) + values)

    def test_long_sequences_are_fast(self) -> None:
        owners = torch.arange(4).repeat_interleave(50_000)
        start = time.perf_counter()
        got = returns_to_go(torch.ones(200_000), owners, gamma=1.0)
        assert time.perf_counter() - start < 5
        close(got, torch.arange(50_000, 0, -1).double().repeat(4))


class TestWhiten:
    def test_by_hand(self) -> None:
        """{1, 2, 6}: mean 3, unbiased variance 7. The counts are 3 + 1e-8."""
        count = 3 + 1e-8
        mean = 9 / count
        variance = sum((x - mean) ** 2 for x in (1, 2, 6)) / count * 3 / 2
        scale = math.sqrt(variance + 1e-8)
        assert_close(whiten(vector(1, 2, 6)), *((x - mean) / scale for x in (1, 2, 6)))
        close(whiten(vector(1, 2, 6)), vector(-2, -1, 3) / math.sqrt(7), 1e-8)

    def test_only_judged_tokens_count(self) -> None:
        got = whiten(vector(1, 100, 2, NAN, 6), judged=torch.tensor([True, False, True, False, True]))
        assert torch.equal(got[[0, 2, 4]], whiten(vector(1, 2, 6)))
        assert not got[[1, 3]].any()

    @pytest.mark.parametrize("value", [0.1, 0.3, 1e9])
    def test_equal_values_give_exactly_zero(self, value: float) -> None:
        for size in (0, 1, 2, 7, 1000):
            assert torch.equal(whiten(torch.full((size,), value)), torch.zeros(size).double())

    def test_none_judged(self) -> None:
        assert_close(whiten(vector(1, 2), judged=torch.zeros(2, dtype=torch.bool)), 0, 0)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(-50, 50), min_size=2, max_size=40).filter(lambda values: len(set(values)) > 1))
    def test_mean_and_deviation(self, numbers: list[int]) -> None:
        got = whiten(vector(*numbers))
        assert float(got.mean()) == pytest.approx(0, abs=1e-6)
        assert float(got.std()) == pytest.approx(1, abs=1e-6)
        close(whiten(3 * vector(*numbers) + 5), got, 1e-6)


class TestReinforcePlusPlus:
    def test_by_hand(self) -> None:
        """Rewards at the last tokens; returns 0.25, 0.5, 1 and 0, 0."""
        got = reinforce_plus_plus(vector(0, 0, 1, 0, 0), ids(0, 0, 0, 1, 1), gamma=0.5)
        assert torch.equal(got, whiten(vector(0.25, 0.5, 1, 0, 0)))

    def test_what_could_not_be_judged(self) -> None:
        got = reinforce_plus_plus(vector(0, 1, 3, NAN, 0, 0), ids(0, 0, 2, 2, 1, 1))
        assert torch.equal(got[[0, 1, 4, 5]], whiten(vector(1, 1, 0, 0)))
        assert not got[2:4].any()

    def test_equal_returns_teach_nothing(self) -> None:
        assert not reinforce_plus_plus(vector(0, 0.3, 0.3, 0, 0, 0.3), ids(0, 0, 1, 2, 2, 2)).any()
        assert_close(reinforce_plus_plus(vector(1), ids(0)), 0)
        assert reinforce_plus_plus(vector(), ids()).shape == (0,)

    def test_order_of_sequences_does_not_matter(self) -> None:
        rewards, owners = vector(0, 1, 2, 3, 0, 5), ids(0, 0, 1, 1, 1, 2)
        order = ids(5, 2, 3, 4, 0, 1)
        got = reinforce_plus_plus(rewards[order], owners[order], gamma=0.9)
        close(got, reinforce_plus_plus(rewards, owners, gamma=0.9)[order])

    def test_baseline_by_hand(self) -> None:
        """Centred rewards -1, 1, and 0 for those of equal rewards; the empty response 1 counts in its group."""
        rewards, groups = vector(0, 2, 3, 3), ids(0, 0, 1, 1)
        got = advantages.reinforce_plus_plus_baseline(rewards, groups, ids(0, 0, 0, 2, 3))
        assert torch.equal(got, whiten(vector(-1, -1, -1, 0, 0)))

    def test_baseline_of_what_could_not_be_judged(self) -> None:
        rewards, groups = vector(0, NAN, 2, 7, NAN), ids(0, 0, 0, 1, 1)
        got = advantages.reinforce_plus_plus_baseline(rewards, groups, ids(0, 1, 2, 2, 3, 4))
        assert torch.equal(got[[0, 2, 3, 4]], whiten(vector(-1, 1, 1, 0)))
        assert not got[[1, 5]].any()

    def test_baseline_where_no_group_teaches(self) -> None:
        rewards = vector(*[0.1] * 3, *[0.7] * 3)
        owners = ids(0, 1, 1, 2, 3, 4, 4, 4, 5)
        assert not advantages.reinforce_plus_plus_baseline(rewards, ids(0, 0, 0, 1, 1, 1), owners).any()


class TestRemaxToGo:
    def test_by_hand(self) -> None:
        """Returns 3, 4, 4 and 8 with a discount of a half."""
        got = remax_to_go(vector(1, 2, 4, 8), ids(0, 0, 0, 1), vector(1, 10), gamma=0.5)
        assert_close(got, 2, 3, 3, -2)

    def test_of_last_rewards_it_is_remax(self) -> None:
        rewards, baselines, owners = vector(1, NAN, 0), vector(0.25, 0.75, 1), ids(0, 0, 1, 2, 2, 2)
        got = remax_to_go(vector(0, 1, NAN, 0, 0, 0), owners, baselines)
        close(got, advantages.remax(rewards, baselines)[owners])

    def test_without_a_greedy_reward(self) -> None:
        assert_close(remax_to_go(vector(1, 2, 3), ids(0, 0, 1), vector(NAN, 1)), 0, 0, 2)


class TestGae:
    REWARDS, VALUES, OWNERS = vector(0, 0, 1, 2), vector(0.5, 0.25, 1, 4), ids(0, 0, 0, 1)

    def test_by_hand(self) -> None:
        """Errors -0.375, 0.25, 0 and -2 with gamma a half; they add up with a factor of a quarter."""
        got, returns = gae(self.REWARDS, self.VALUES, self.OWNERS, gamma=0.5, lam=0.5)
        assert_close(got, -0.3125, 0.25, 0, -2)
        close(returns, got + self.VALUES)

    def test_with_lambda_one_the_returns_are_those_to_go(self) -> None:
        """Whatever the values are."""
        got, returns = gae(self.REWARDS, self.VALUES, self.OWNERS, gamma=0.9, lam=1.0)
        to_go = returns_to_go(self.REWARDS, self.OWNERS, gamma=0.9)
        close(returns, to_go)
        close(got, to_go - self.VALUES)

    def test_what_could_not_be_judged(self) -> None:
        rewards = vector(0, 0, NAN, 2)
        got, returns = gae(rewards, self.VALUES, self.OWNERS)
        assert_close(got, 0, 0, 0, -2)
        assert_close(returns, 0.5, 0.25, 1, 2)
        assert advantages.judged_tokens(rewards, self.OWNERS).tolist() == [False, False, False, True]

    def test_edges(self) -> None:
        got, returns = gae(vector(), vector(), ids())
        assert got.shape == returns.shape == (0,)
        values = vector(2).requires_grad_()
        got, returns = gae(vector(3), values, ids(5))
        assert_close(got, 1)
        assert_close(returns, 3)
        assert not got.requires_grad and not returns.requires_grad
