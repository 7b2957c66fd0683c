"""Advantages, ratios, clipped losses and weights: hand-computed values, slopes, edges and degenerate inputs."""

import math

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import grpo
from megatron_rl.algorithms.importance import log_ratio, sequence_ratio, sequence_token_ratio
from megatron_rl.algorithms.kl import kl
from megatron_rl.algorithms.policy_loss import PolicyLoss, gspo, ppo_clip
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


class TestRatios:
    def test_log_ratio_is_bounded(self) -> None:
        assert_close(log_ratio(vector(-1, -50, 0), vector(-2, 0, -50)), 1, -20, 20)

    def test_sequence_ratio_by_hand(self) -> None:
        """Sequence 1 is empty; sequence 2 has a mean of 100, bounded at 10."""
        logp, old = vector(-1, -2, -3, 0), vector(-1.5, -2.1, -3.3, -100)
        ids = torch.tensor([0, 0, 0, 2])
        assert_close(sequence_ratio(logp, old, ids, 3), math.exp(0.3), 1, math.exp(10))

    def test_token_form_has_the_sequence_gradient(self) -> None:
        """With one advantage per sequence, mean over tokens of the token form = the sequence's own surrogate."""
        old, ids = vector(-1, -2, -3, -1.5, -0.5), torch.tensor([0, 0, 0, 1, 1])
        logp = (old + vector(0.1, -0.2, 0.4, 0.3, -0.1)).requires_grad_()
        advantages, lengths = vector(2, -3), vector(3, 2)
        token = advantages[ids] * sequence_token_ratio(logp, old, ids, 2) / lengths[ids]
        mean = torch.stack([(logp - old)[:3].mean(), (logp - old)[3:].mean()])
        sequence = advantages * mean.exp()
        assert float(token.detach().sum()) == pytest.approx(float(sequence.detach().sum()), abs=1e-12)
        (got,) = torch.autograd.grad(token.sum(), logp)
        (expected,) = torch.autograd.grad(sequence.sum(), logp)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def slope(loss: Tensor, logp: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), logp, retain_graph=True)[0]


def ppo(ratios: Tensor, advantages: Tensor, **options: float | None) -> tuple[PolicyLoss, Tensor]:
    """The loss at these ratios, and d loss / d logp."""
    logp = ratios.log().requires_grad_()
    terms = ppo_clip(logp, torch.zeros_like(logp), advantages, **options)
    return terms, slope(terms.loss, logp)


class TestPpoClip:
    def test_by_hand(self) -> None:
        ratios = vector(1.0, 1.1, 1.5, 0.5, 1.0, 1.5, 0.5, 5.0)
        advantages = vector(2, 2, 2, 2, -1, -1, -1, -1)
        terms, gradient = ppo(ratios, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
        assert_close(terms.loss.detach(), -2, -2.2, -2.56, -1, 1, 1.5, 0.8, 3)
        assert_close(gradient, -2, -2.2, 0, -1, 1, 1.5, 0, 0)
        assert terms.clipped.tolist() == [False, False, True, False, False, False, True, False]
        assert terms.clipped_low.tolist() == [False] * 7 + [True]
        assert_close(terms.ratio, *ratios.tolist())
        assert_close(terms.approx_kl, *(-ratios.log()).tolist())
        assert not any(x.requires_grad for x in terms[1:])

    def test_without_dual_clip_a_bad_token_pulls_without_bound(self) -> None:
        terms, gradient = ppo(vector(5.0), vector(-1.0), dual_clip=None)
        assert_close(terms.loss.detach(), 5)
        assert_close(gradient, 5)
        assert not terms.clipped_low.any()

    @pytest.mark.parametrize(
        ("edge", "advantage", "below", "above"),
        [
            (0.8, 1.0, True, True),
            (0.8, -1.0, False, True),
            (1.3, 1.0, True, False),
            (1.3, -1.0, True, True),
            (3.0, -1.0, True, False),
            (3.0, 1.0, False, False),
        ],
    )
    def test_the_gradient_stops_on_one_side_of_an_edge(
        self, edge: float, advantage: float, below: bool, above: bool
    ) -> None:
        ratios = vector(edge * (1 - 1e-9), edge * (1 + 1e-9))
        terms, gradient = ppo(ratios, torch.full_like(ratios, advantage), clip_low=0.2, clip_high=0.3)
        expected = -advantage * ratios * vector(below, above)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
        stopped = terms.clipped | terms.clipped_low
        assert stopped.tolist() == [not below, not above]

    def test_finite_differences_away_from_the_edges(self) -> None:
        generator = torch.Generator().manual_seed(0)
        old = torch.randn(200, generator=generator, dtype=torch.float64)
        difference = torch.randn(200, generator=generator, dtype=torch.float64)
        for edge in (0.8, 1.2, 3.0):
            difference = torch.where((difference - math.log(edge)).abs() < 1e-3, difference + 0.01, difference)
        advantages = torch.randn(200, generator=generator, dtype=torch.float64)
        logp = (old + difference).requires_grad_()
        terms = ppo_clip(logp, old, advantages)
        step = 1e-6
        up, down = (ppo_clip(logp.detach() + sign * step, old, advantages).loss for sign in (1, -1))
        torch.testing.assert_close(slope(terms.loss, logp), (up - down) / (2 * step), rtol=1e-7, atol=1e-7)
        assert terms.clipped.any() and terms.clipped_low.any()

    def test_on_policy_it_is_the_policy_gradient(self) -> None:
        logp = vector(-1, -2, -3).requires_grad_()
        advantages = vector(1, -2, 0)
        terms = ppo_clip(logp, logp.detach(), advantages)
        assert_close(terms.loss.detach(), -1, 2, 0)
        assert_close(slope(terms.loss, logp), -1, 2, 0)
        assert not terms.clipped.any() and not terms.approx_kl.any()

    def test_far_policies_stay_finite_and_report_the_raw_distance(self) -> None:
        logp = torch.tensor([0.0, -900.0], requires_grad=True)
        old = torch.tensor([-900.0, 0.0])
        terms = ppo_clip(logp, old, torch.tensor([-1.0, 1.0]), dual_clip=None)
        assert terms.loss.isfinite().all() and not slope(terms.loss, logp).any()
        assert terms.approx_kl.tolist() == [-900.0, 900.0]

    def test_no_tokens(self) -> None:
        logp = vector().requires_grad_()
        assert all(x.shape == (0,) for x in ppo_clip(logp, vector(), vector()))
        ids = torch.empty(0, dtype=torch.int64)
        assert all(x.shape == (0,) for x in gspo(logp, vector(), vector(), ids, 0))


class TestGspo:
    def test_by_hand(self) -> None:
        """Log-ratios average 0.02, -0.02 and 0.0001: the first is beyond 1.01, the second below 0.99."""
        ids = torch.tensor([0, 0, 1, 2, 2])
        old = vector(-1, -1, -2, -3, -3)
        logp = (old + vector(0.05, -0.01, -0.02, 0.0, 0.0002)).requires_grad_()
        s = [math.exp(0.02), math.exp(-0.02), math.exp(0.0001)]
        for sign in (1.0, -1.0):
            advantages = torch.full((5,), sign, dtype=torch.float64)
            terms = gspo(logp, old, advantages, ids, 3, clip_low=0.01, clip_high=0.01)
            first, second = (1.01, s[1]) if sign > 0 else (s[0], 0.99)
            assert_close(terms.loss.detach(), *[-sign * x for x in (first, first, second, s[2], s[2])])
            assert terms.clipped.tolist() == [sign > 0, sign > 0, sign < 0, False, False]
            expected = -sign * terms.ratio * (~terms.clipped)
            assert_close(slope(terms.loss, logp), *expected.tolist())
        assert_close(terms.ratio, s[0], s[0], s[1], s[2], s[2])
        assert_close(terms.approx_kl, -0.05, 0.01, 0.02, 0.0, -0.0002)
        assert not terms.clipped_low.any()

    def test_one_token_sequences_are_ppo_without_dual_clip(self) -> None:
        generator = torch.Generator().manual_seed(1)
        logp, old, advantages = torch.randn(3, 50, generator=generator, dtype=torch.float64)
        logp.requires_grad_()
        sequence = gspo(logp, old, advantages, torch.arange(50), 50, clip_low=0.2, clip_high=0.3)
        token = ppo_clip(logp, old, advantages, clip_low=0.2, clip_high=0.3, dual_clip=None)
        for x, y in zip(sequence, token):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope(sequence.loss, logp), slope(token.loss, logp), rtol=1e-12, atol=1e-12)


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


class TestKl:
    """Estimators of the distance to a reference, with d = ref_logp - logp."""

    LOGP, REF = vector(-1.0, -2.0, -0.5), vector(-1.5, -1.0, -0.5)

    def test_by_hand(self) -> None:
        assert_close(kl(self.LOGP, self.REF, "k1"), 0.5, -1.0, 0.0)
        assert_close(kl(self.LOGP, self.REF, "k2"), 0.125, 0.5, 0.0)
        assert_close(kl(self.LOGP, self.REF, "k3"), math.exp(-0.5) - 0.5, math.e - 2, 0.0)

    @pytest.mark.parametrize(
        ("estimator", "slopes"),
        [("k1", (1.0, 1.0, 1.0)), ("k2", (0.5, -1.0, 0.0)), ("k3", (1 - math.exp(-0.5), 1 - math.e, 0.0))],
    )
    def test_slopes(self, estimator: str, slopes: tuple[float, ...]) -> None:
        """Closed forms, and central differences."""
        leaf = self.LOGP.clone().requires_grad_()
        kl(leaf, self.REF, estimator).sum().backward()
        assert leaf.grad is not None
        assert_close(leaf.grad, *slopes)
        step = 1e-5
        numeric = (kl(self.LOGP + step, self.REF, estimator) - kl(self.LOGP - step, self.REF, estimator)) / (2 * step)
        torch.testing.assert_close(leaf.grad, numeric, rtol=1e-8, atol=1e-9)

    def test_k3_is_bounded_and_flat_beyond_its_bounds(self) -> None:
        """exp(d) - 1 - d passes 10 near d = 2.61; towards minus infinity it grows as -d and reaches 10 at -11."""
        leaf = vector(0.0, 0.0, 0.0, 0.0, 0.0).requires_grad_()
        values = kl(leaf, vector(2.6, 2.62, 50.0, -10.9, -50.0), "k3")
        values.sum().backward()
        values = values.detach()
        assert_close(values[1:3], 10, 10)
        assert values[0] < 10 and float(values[3]) == pytest.approx(9.9, abs=1e-4) and values[4] == 10
        assert leaf.grad is not None and leaf.grad[[1, 2, 4]].tolist() == [0, 0, 0]
        assert float(leaf.grad[0]) == pytest.approx(1 - math.exp(2.6)) and float(leaf.grad[3]) == pytest.approx(
            1 - math.exp(-10.9)
        )

    def test_means_over_samples_of_the_policy(self) -> None:
        """E[k1] = E[k3] = KL(policy || reference), exactly, for a distribution summed over all its tokens."""
        policy, reference = vector(0.5, 0.3, 0.2), vector(0.2, 0.3, 0.5)
        true = (policy * (policy / reference).log()).sum()
        for estimator in ("k1", "k3"):
            mean = (policy * kl(policy.log(), reference.log(), estimator)).sum()
            torch.testing.assert_close(mean, true, rtol=1e-12, atol=0)
        assert kl(vector(), vector(), "k3").numel() == 0
