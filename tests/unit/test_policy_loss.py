"""Ratios, policy losses and distances to a reference: hand-computed values, slopes, edges and degenerate inputs."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.algorithms import policy_loss
from megatron_rl.algorithms.importance import log_ratio, sequence_mean, sequence_ratio, sequence_token_ratio
from megatron_rl.algorithms.kl import ESTIMATORS, GRADIENTS, kl
from megatron_rl.algorithms.policy_loss import PolicyLoss, gspo, ppo_clip


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_close(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got, vector(*expected), rtol=1e-12, atol=1e-12)


class TestRatios:
    def test_log_ratio_is_bounded(self) -> None:
        assert_close(log_ratio(vector(-1, -50, 0), vector(-2, 0, -50)), 1, -20, 20)

    def test_sequence_ratio_by_hand(self) -> None:
        """Sequence 1 is empty; sequence 2 has a mean of 100, bounded at 10."""
        logp, old = vector(-1, -2, -3, 0), vector(-1.5, -2.1, -3.3, -100)
        ids = torch.tensor([0, 0, 0, 2])
        assert_close(sequence_ratio(logp, old, ids, 3), math.exp(0.3), 1, math.exp(10))

    def test_sequence_mean(self) -> None:
        """Sequence 1 is empty."""
        values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
        mean = sequence_mean(values, torch.tensor([0, 2, 2]), 3)
        assert_close(mean, 1, 0, 4)
        assert not mean.requires_grad

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

    def test_no_gradient_beyond_the_bounds_of_the_log_ratio(self) -> None:
        logp = vector(19.999, 20.001, -19.999, -20.001).requires_grad_()
        terms = ppo_clip(logp, torch.zeros_like(logp), vector(-1, -1, 1, 1), dual_clip=None)
        got = slope(terms.loss, logp)
        assert_close(got, math.exp(19.999), 0, -math.exp(-19.999), 0)

    def test_another_ratio_takes_the_place_of_r(self) -> None:
        """r is 1 everywhere; the ratio given is not, and has a gradient of its own."""
        logp, scale = vector(-1, -2, -3, -4), vector(1.1, 1.5, 0.5, 5.0)
        leaf = logp.clone().requires_grad_()
        ratio = scale * (2 * (leaf - logp)).exp()
        terms = ppo_clip(leaf, logp, vector(2, 2, -1, -1), ratio=ratio)
        assert_close(terms.loss.detach(), -2.2, -2.4, 0.8, 3)
        assert_close(slope(terms.loss, leaf), -4.4, 0, 0, 0)
        assert_close(terms.ratio, *scale.tolist())
        assert terms.clipped.tolist() == [False, True, True, False]
        assert terms.clipped_low.tolist() == [False, False, False, True]
        assert not terms.approx_kl.any() and not terms.ratio.requires_grad

    def test_the_usual_ratio_changes_nothing(self) -> None:
        generator = torch.Generator().manual_seed(3)
        logp, old, advantages = torch.randn(3, 50, generator=generator, dtype=torch.float64)
        logp.requires_grad_()
        passed, usual = (ppo_clip(logp, old, advantages, ratio=ratio) for ratio in (log_ratio(logp, old).exp(), None))
        assert all(torch.equal(x, y) for x, y in zip(passed, usual))
        assert torch.equal(slope(passed.loss, logp), slope(usual.loss, logp))


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


def at(
    ratios: Tensor, advantages: Tensor, loss: Callable[..., PolicyLoss], **options: float
) -> tuple[PolicyLoss, Tensor]:
    """The loss of tokens whose old log-probability is -2, and d loss / d logp."""
    old = torch.full_like(ratios, -2.0)
    logp = (old + ratios.log()).requires_grad_()
    terms = loss(logp, old, advantages, **options)
    return terms, slope(terms.loss, logp)


class TestGeoMean:
    IDS = torch.tensor([0, 0, 0, 1, 3, 3])
    OLD = vector(-1, -2, -3, -1.5, -0.5, -0.7)

    def sequence_loss(self, logp: Tensor, advantages: Tensor, low: float = 0.4, high: float = 0.3) -> Tensor:
        """GMPO as the paper has it: the mean over the sequences that have tokens of -A_i times a geometric mean."""
        total = logp.new_zeros(())
        for i in (0, 1, 3):
            sign, mine = float(advantages[i].sign()), i == self.IDS
            powers = ((logp - self.OLD)[mine] * sign).exp()
            bounds = sorted((-low * sign, high * sign))
            kept = torch.minimum(powers, powers.clamp(math.exp(bounds[0]), math.exp(bounds[1])))
            total = total - advantages[i] * kept.prod() ** (sign / int(mine.sum()))
        return total / 3

    @pytest.mark.parametrize("signs", [(2.0, -1.0, 0.0, 3.0), (-2.0, 1.0, 0.0, -0.5)])
    def test_the_token_form_is_the_papers_sequence_loss(self, signs: tuple[float, ...]) -> None:
        """Sequence 2 is empty. Values and gradients, and the sequence loss by central differences."""
        advantages = vector(*signs)
        logp = (self.OLD + vector(0.1, -0.9, 0.8, 0.2, -0.35, 0.5)).requires_grad_()
        terms = policy_loss.geo_mean(logp, self.OLD, advantages[self.IDS], self.IDS, 4, clip_high=0.3)
        weights = 1 / (3 * torch.bincount(self.IDS).double()[self.IDS])
        token, sequence = (weights * terms.loss).sum(), self.sequence_loss(logp, advantages)
        torch.testing.assert_close(token, sequence, rtol=1e-12, atol=1e-12)
        got = slope(token, logp)
        torch.testing.assert_close(got, slope(sequence, logp), rtol=1e-12, atol=1e-12)
        step, numeric = 1e-6, torch.empty_like(got)
        for t in range(len(logp)):
            shift = torch.zeros_like(got).index_fill_(0, torch.tensor([t]), step)
            up, down = (self.sequence_loss(logp.detach() + sign * shift, advantages) for sign in (1, -1))
            numeric[t] = (up - down) / (2 * step)
        torch.testing.assert_close(got, numeric, rtol=1e-7, atol=1e-9)
        assert torch.equal(terms.clipped, got == 0)
        assert not terms.clipped_low.any()

    @pytest.mark.parametrize(
        ("edge", "advantage", "below", "above"),
        [(-0.4, 1.0, True, True), (-0.4, -1.0, False, True), (0.3, 1.0, True, False), (0.3, -1.0, True, True)],
    )
    def test_the_gradient_stops_on_one_side_of_an_edge(
        self, edge: float, advantage: float, below: bool, above: bool
    ) -> None:
        difference = vector(edge - 1e-9, edge + 1e-9).requires_grad_()
        advantages = torch.full((2,), advantage, dtype=torch.float64)
        terms = policy_loss.geo_mean(
            difference, torch.zeros(2).double(), advantages, torch.arange(2), 2, clip_low=0.4, clip_high=0.3
        )
        expected = -advantage * terms.ratio * vector(below, above)
        torch.testing.assert_close(slope(terms.loss, difference), expected, rtol=1e-12, atol=0)
        assert terms.clipped.tolist() == [not below, not above]

    def test_varying_advantages_count_with_their_mean(self) -> None:
        logp = (self.OLD + 0.1).requires_grad_()
        terms = policy_loss.geo_mean(logp, self.OLD, vector(1, 2, 6, 1, -1, 3), self.IDS, 4)
        expected = -vector(3, 3, 3, 1, 1, 1) * math.exp(0.1)
        torch.testing.assert_close(terms.loss.detach(), expected, rtol=1e-12, atol=1e-12)

    def test_one_token_sequences_clip_in_logarithms(self) -> None:
        ratios = vector(0.5, 1.1, 3.0)
        for sign in (1.0, -1.0):
            geo = partial(policy_loss.geo_mean, sequence_ids=torch.arange(3), num_sequences=3)
            terms, gradient = at(ratios, torch.full((3,), sign).double(), geo)
            clip = {"clip_low": 1 - math.exp(-0.4), "clip_high": math.exp(0.4) - 1}
            other, expected = at(ratios, torch.full((3,), sign).double(), ppo_clip, **clip, dual_clip=None)
            torch.testing.assert_close(terms.loss, other.loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)

    def test_a_sequence_far_off_is_bounded(self) -> None:
        logp = vector(0, 0).requires_grad_()
        old = vector(-900, -900)
        terms = policy_loss.geo_mean(logp, old, vector(-1, -1), torch.tensor([0, 0]), 1)
        assert_close(terms.loss.detach(), math.exp(10), math.exp(10))


class TestSapo:
    def test_by_hand(self) -> None:
        ratios, advantages = vector(1, 1, 2, 0.5, 1.5), vector(2, -2, 1, -1, 0)
        terms, gradient = at(ratios, advantages, policy_loss.sapo)
        gates = [1 / (1 + math.exp(-tau * (r - 1))) for tau, r in ((1, 1), (1.05, 1), (1, 2), (1.05, 0.5))]
        values = [-2 * gates[0] * 4, 2 * gates[1] * 4 / 1.05, -gates[2] * 4, gates[3] * 4 / 1.05, 0]
        assert_close(terms.loss.detach(), *values)
        slopes = [-2.0, 2.0, -4 * gates[2] * (1 - gates[2]) * 2, 4 * gates[3] * (1 - gates[3]) * 0.5, 0]
        assert_close(gradient, *slopes)
        assert_close(terms.ratio, *ratios.tolist())
        assert not terms.clipped.any() and not terms.clipped_low.any()

    def test_a_token_far_off_has_no_gradient(self) -> None:
        gradient = at(vector(1e-9, 1e9, 1e-9, 1e9), vector(1, 1, -1, -1), policy_loss.sapo)[1]
        assert gradient.abs().max() < 1e-8 and gradient[[1, 3]].tolist() == [0, 0]


class TestReinforce:
    def test_by_hand(self) -> None:
        terms, gradient = at(vector(1, 2, 0.5), vector(2, -1, 0), policy_loss.reinforce)
        assert_close(terms.loss.detach(), 4, math.log(2) - 2, 0)
        assert_close(gradient, -2, 1, 0)
        assert_close(terms.ratio, 1, 2, 0.5)


class TestCispo:
    def test_by_hand(self) -> None:
        """The bounds are 0.7 and 1.2; a weight that is cut stays, and so does its token's gradient."""
        ratios, advantages = vector(1, 1.1, 2, 0.5, 2, 0.5), vector(2, 2, 2, 2, -1, -1)
        terms, gradient = at(ratios, advantages, policy_loss.cispo, clip_low=0.3, clip_high=0.2)
        weights = vector(1, 1.1, 1.2, 0.7, 1.2, 0.7)
        assert_close(gradient, *(-weights * advantages).tolist())
        logp = ratios.log() - 2
        assert_close(terms.loss.detach(), *(-weights * advantages * logp).tolist())
        assert terms.clipped.tolist() == [False, False, True, True, True, True]
        assert_close(terms.ratio, *ratios.tolist())

    def test_by_default_there_is_a_cap_of_five(self) -> None:
        ratios = vector(1e-6, 0.1, 4.9, 5.1, 100)
        terms, gradient = at(ratios, torch.ones(5).double(), policy_loss.cispo)
        assert_close(gradient, -1e-6, -0.1, -4.9, -5, -5)
        assert terms.clipped.tolist() == [False, False, False, True, True]

    def test_on_policy_it_is_reinforce(self) -> None:
        ones, advantages = torch.ones(3).double(), vector(1, -2, 0)
        (cispo, got), (plain, expected) = (
            at(ones, advantages, loss) for loss in (policy_loss.cispo, policy_loss.reinforce)
        )
        assert torch.equal(cispo.loss, plain.loss) and torch.equal(got, expected)


class TestDppo:
    """The old probability is 0.5 in all of these, so the binary distances are functions of p alone."""

    def run(self, loss: Callable[..., PolicyLoss], p: Tensor, advantages: Tensor, **options: float) -> PolicyLoss:
        self.logp = p.log().requires_grad_()
        return loss(self.logp, torch.full_like(p, 0.5).log(), advantages, **options)

    @pytest.mark.parametrize(
        ("edge", "advantage", "below", "above"),
        [(0.7, 1.0, True, False), (0.7, -1.0, True, True), (0.4, -1.0, False, True), (0.4, 1.0, True, True)],
    )
    @pytest.mark.parametrize("kind", ["tv", "kl"])
    def test_a_token_stops_where_it_went_too_far(
        self, kind: str, edge: float, advantage: float, below: bool, above: bool
    ) -> None:
        def distance(p: float) -> float:
            return abs(p - 0.5) if kind == "tv" else 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))

        loss = policy_loss.dppo_tv if kind == "tv" else policy_loss.dppo_kl
        p, advantages = vector(edge - 1e-6, edge + 1e-6), torch.full((2,), advantage).double()
        terms = self.run(loss, p, advantages, clip_low=distance(0.4), clip_high=distance(0.7))
        weights = p / 0.5 * vector(below, above)
        torch.testing.assert_close(slope(terms.loss, self.logp), -advantages * weights, rtol=1e-12, atol=0)
        expected = -advantages * weights * p.log()
        torch.testing.assert_close(terms.loss.detach(), expected, rtol=1e-12, atol=0)
        assert terms.clipped.tolist() == [not below, not above]

    @pytest.mark.parametrize("loss", [policy_loss.dppo_tv, policy_loss.dppo_kl])
    def test_ratios_are_capped(self, loss: Callable[..., PolicyLoss]) -> None:
        """1e-3 of 1e-5: a small change of the distribution, and a large ratio."""
        logp = vector(1e-3).log().requires_grad_()
        terms = loss(logp, vector(1e-5).log(), vector(1.0))
        assert_close(slope(terms.loss, logp), -20)
        assert_close(terms.ratio, 100)
        assert terms.clipped_low.tolist() == [True] and terms.clipped.tolist() == [False]

    @pytest.mark.parametrize("loss", [policy_loss.dppo_tv, policy_loss.dppo_kl])
    def test_a_token_that_went_the_other_way_comes_back(self, loss: Callable[..., PolicyLoss]) -> None:
        p, advantages = vector(0.01, 0.99, 0.01, 0.99), vector(1, -1, -1, 1)
        terms = self.run(loss, p, advantages)
        assert terms.clipped.tolist() == [False, False, True, True]
        assert_close(slope(terms.loss, self.logp), -0.02, 1.98, 0, 0)

    @pytest.mark.parametrize("loss", [policy_loss.dppo_tv, policy_loss.dppo_kl])
    def test_a_ratio_is_not_capped_where_there_is_no_gradient(self, loss: Callable[..., PolicyLoss]) -> None:
        terms = self.run(loss, vector(0.99, 0.6), vector(1, -1), max_ratio=1.1)
        assert terms.clipped.tolist() == [True, False] and terms.clipped_low.tolist() == [False, True]

    def test_certain_tokens_have_a_distance(self) -> None:
        """Probabilities of one, or rounded above it, in single precision too."""
        logp = torch.tensor([0.0, 1e-7, -20.0, 0.0, 1e-7], requires_grad=True)
        old = torch.tensor([0.0, -1e-7, 0.0, -20.0, -20.0])
        terms = policy_loss.dppo_kl(logp, old, torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0]))
        assert terms.loss.isfinite().all()
        assert terms.clipped.tolist() == [False, False, True, True, True]


class TestDro:
    def test_by_hand(self) -> None:
        terms, gradient = at(vector(1, math.e, math.exp(-2)), vector(2, -1, 0), partial(policy_loss.dro, beta=0.5))
        assert_close(terms.loss.detach(), 4, -1 + 0.25, 1)
        assert_close(gradient, -2, 1 + 0.5, -1)
        assert not terms.clipped.any()


class TestFiniteDifferences:
    """Of losses without weights that are held fixed; kinks are stepped over."""

    @pytest.mark.parametrize("name", ["sapo", "reinforce", "dro", "ppo_clip"])
    def test_slopes(self, name: str) -> None:
        generator = torch.Generator().manual_seed(4)
        old, difference, advantages = torch.randn(3, 200, generator=generator, dtype=torch.float64)
        for edge in (0.8, 1.2, 3.0):
            difference = torch.where((difference - math.log(edge)).abs() < 1e-3, difference + 0.01, difference)
        loss = partial(getattr(policy_loss, name), **({"beta": 0.7} if name == "dro" else {}))
        logp, step = (old + difference).requires_grad_(), 1e-6
        up, down = (loss(logp.detach() + sign * step, old, advantages).loss for sign in (1, -1))
        got = slope(loss(logp, old, advantages).loss, logp)
        torch.testing.assert_close(got, (up - down) / (2 * step), rtol=1e-7, atol=1e-7)


SEQUENCE_LOSSES = {
    "gspo": partial(gspo, clip_low=0.2, clip_high=0.3),
    "geo_mean": policy_loss.geo_mean,
}
TOKEN_LOSSES = {
    "ppo_clip": ppo_clip,
    "sapo": policy_loss.sapo,
    "reinforce": policy_loss.reinforce,
    "cispo": policy_loss.cispo,
    "dppo_tv": policy_loss.dppo_tv,
    "dppo_kl": policy_loss.dppo_kl,
    "dro": partial(policy_loss.dro, beta=0.1),
}
LOSSES = sorted(SEQUENCE_LOSSES | TOKEN_LOSSES)


def run(name: str, logp: Tensor, old: Tensor, advantages: Tensor, ids: Tensor) -> PolicyLoss:
    if name in TOKEN_LOSSES:
        return TOKEN_LOSSES[name](logp, old, advantages)
    names, ids = ids.unique(return_inverse=True)
    return SEQUENCE_LOSSES[name](logp, old, advantages, ids, len(names))


@pytest.mark.parametrize("name", LOSSES)
class TestEveryLoss:
    def test_no_tokens(self, name: str) -> None:
        logp = vector().requires_grad_()
        terms = run(name, logp, vector(), vector(), torch.empty(0, dtype=torch.int64))
        assert all(x.shape == (0,) for x in terms)
        assert slope(terms.loss, logp).shape == (0,)

    def test_zero_advantages_teach_nothing(self, name: str) -> None:
        generator = torch.Generator().manual_seed(5)
        logp, old = torch.randn(2, 20, generator=generator, dtype=torch.float64)
        old = logp.clone() if name == "dro" else old
        logp.requires_grad_()
        terms = run(name, logp, old, torch.zeros(20).double(), torch.arange(20) // 7)
        assert not slope(terms.loss, logp).any()

    def test_one_token(self, name: str) -> None:
        """On the policy itself every loss has the gradient -A, and marks nothing."""
        logp = vector(-1.5).requires_grad_()
        terms = run(name, logp, vector(-1.5), vector(2.0), torch.tensor([0]))
        assert_close(slope(terms.loss, logp), -2)
        assert_close(terms.ratio, 1)
        assert not terms.clipped.any() and not terms.clipped_low.any() and not terms.approx_kl.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
    def test_far_policies_stay_finite(self, name: str, advantage: float, dtype: torch.dtype) -> None:
        logp = torch.tensor([0.0, -900.0, -1.0, -30.0], dtype=dtype, requires_grad=True)
        old = torch.tensor([-900.0, 0.0, -30.0, -1.0], dtype=dtype)
        for ids in (torch.arange(4), torch.zeros(4, dtype=torch.int64)):
            terms = run(name, logp, old, torch.full((4,), advantage, dtype=dtype), ids)
            assert terms.loss.isfinite().all() and slope(terms.loss, logp).isfinite().all()
            assert terms.loss.dtype == dtype
            assert terms.approx_kl.tolist() == [-900, 900, -29, 29]

    def test_only_the_loss_has_a_gradient(self, name: str) -> None:
        logp = vector(-1, -2).requires_grad_()
        terms = run(name, logp, vector(-1.1, -2.5), vector(1, -1), torch.tensor([0, 0]))
        assert terms.loss.requires_grad and not any(x.requires_grad for x in terms[1:])
        assert terms.clipped.dtype == terms.clipped_low.dtype == torch.bool

    @settings(max_examples=30, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
        cuts=st.integers(1, 3),
        seed=st.integers(0, 2**31),
        spread=st.sampled_from([0.05, 0.5, 3.0]),
    )
    def test_the_cut_and_the_order_do_not_matter(
        self, name: str, lengths: list[int], cuts: int, seed: int, spread: float
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        difference, advantages, weights = torch.randn(3, len(ids), generator=generator, dtype=torch.float64)
        old = -torch.rand(len(ids), generator=generator, dtype=torch.float64) * 3
        logp = (old + spread * difference).requires_grad_()

        def share(rows: Tensor) -> Tensor:
            return (weights[rows] * run(name, logp[rows], old[rows], advantages[rows], ids[rows]).loss).sum()

        whole = share(torch.arange(len(ids)))
        order = torch.randperm(len(ids), generator=generator)
        part = torch.randint(cuts, (len(lengths),), generator=generator)[ids]
        for other in (share(order), torch.stack([share(order[part[order] == k]) for k in range(cuts)]).sum()):
            torch.testing.assert_close(other, whole, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(slope(other, logp), slope(whole, logp), rtol=1e-12, atol=1e-12)


class TestKl:
    """Estimators of the distance to a reference, with d = ref_logp - logp."""

    LOGP, REF = vector(-1.0, -2.0, -0.5), vector(-1.5, -1.0, -0.5)

    def test_by_hand(self) -> None:
        assert_close(kl(self.LOGP, self.REF, "k1"), 0.5, -1.0, 0.0)
        assert_close(kl(self.LOGP, self.REF, "k2"), 0.125, 0.5, 0.0)
        assert_close(kl(self.LOGP, self.REF, "k3"), math.exp(-0.5) - 0.5, math.e - 2, 0.0)
        assert_close(kl(self.LOGP, self.REF, "abs"), 0.5, 1.0, 0.0)

    @pytest.mark.parametrize(
        ("estimator", "slopes"),
        [
            ("k1", (1.0, 1.0, 1.0)),
            ("k2", (0.5, -1.0, 0.0)),
            ("k3", (1 - math.exp(-0.5), 1 - math.e, 0.0)),
            ("abs", (1.0, -1.0, 0.0)),
        ],
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

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_gradients_by_hand(self, estimator: str) -> None:
        """k and k' give all four; the values change under `is_ratio` only."""
        leaf, old = self.LOGP.clone().requires_grad_(), vector(-1.1, -1.5, -0.5)
        k = kl(leaf, self.REF, estimator)
        naive, ratio = slope(k, leaf), (self.LOGP - old).exp()
        expected = {
            "naive": (k, naive),
            "straight_through_k2": (k, self.LOGP - self.REF),
            "score_function": (k, naive + k),
            "is_ratio": (ratio * k, ratio * (naive + k)),
        }
        assert set(expected) == set(GRADIENTS)
        for gradient, (value, slopes) in expected.items():
            got = kl(leaf, self.REF, estimator, gradient=gradient, old_logp=old)
            torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(slope(got, leaf), slopes.detach(), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_is_ratio_by_finite_differences(self, estimator: str) -> None:
        old, step, logp = vector(-1.1, -1.5, -0.9), 1e-6, vector(-1.0, -2.0, -0.6)
        up, down = (kl(logp + sign * step, self.REF, estimator, gradient="is_ratio", old_logp=old) for sign in (1, -1))
        leaf = logp.requires_grad_()
        got = slope(kl(leaf, self.REF, estimator, gradient="is_ratio", old_logp=old), leaf)
        torch.testing.assert_close(got, (up - down) / (2 * step), rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize(
        ("estimator", "gradient", "unbiased"),
        [
            ("k1", "naive", False),
            ("k2", "naive", True),
            ("k3", "naive", False),
            ("k1", "straight_through_k2", True),
            ("k3", "straight_through_k2", True),
            ("abs", "straight_through_k2", True),
            ("k1", "score_function", True),
            ("k2", "score_function", False),
            ("k3", "score_function", True),
            ("k1", "is_ratio", True),
            ("k3", "is_ratio", True),
        ],
    )
    def test_which_gradients_are_that_of_the_kl(self, estimator: str, gradient: str, unbiased: bool) -> None:
        """The mean over all tokens of a distribution, each weighted with the probability that it is drawn."""
        logits = vector(0.3, -0.5, 1.2).requires_grad_()
        reference, old = vector(0.2, 0.3, 0.5).log(), vector(0.6, 0.3, 0.1).log()
        logp = torch.log_softmax(logits, 0)
        exact = slope((logp.exp() * (logp - reference)).sum(), logits)
        drawn = (old if gradient == "is_ratio" else logp.detach()).exp()
        estimate = (drawn * kl(logp, reference, estimator, gradient=gradient, old_logp=old)).sum()
        assert torch.allclose(slope(estimate, logits), exact, rtol=1e-10, atol=1e-12) == unbiased

    def test_far_policies_stay_finite(self) -> None:
        logp, ref = torch.tensor([0.0, -900.0], requires_grad=True), torch.tensor([-900.0, 0.0])
        for estimator in ESTIMATORS:
            for gradient in GRADIENTS:
                values = kl(logp, ref, estimator, gradient=gradient, old_logp=ref)
                assert values.isfinite().all() and slope(values, logp).isfinite().all()

    def test_a_ratio_beyond_its_bounds_has_no_slope(self) -> None:
        logp = vector(19.999, 20.001).requires_grad_()
        values = kl(logp, vector(19.999, 20.001) - 1, "k1", gradient="is_ratio", old_logp=vector(0, 0))
        assert_close(slope(values, logp) / values.detach(), 2, 1)
