"""Distillation losses from log-probabilities: by hand, by other formulas, and at their edges."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from megatron_rl.algorithms.distill import (
    Tail,
    buckets,
    divergence,
    divergence_terms,
    entropy_weights,
    off_policy,
    pass_rate_weights,
    sampled_token,
)

ALPHAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    s, t = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    reverse = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert divergence(s, t, 0.0).item() == pytest.approx(forward)
    assert divergence(s, t, 1.0).item() == pytest.approx(reverse)
    # alpha 0.25: m = (0.4375, 0.5625)
    of_s = 0.5 * math.log(0.5 / 0.4375) + 0.5 * math.log(0.5 / 0.5625)
    of_t = 0.25 * math.log(0.25 / 0.4375) + 0.75 * math.log(0.75 / 0.5625)
    assert divergence(s, t, 0.25).item() == pytest.approx(0.75 * of_s + 0.25 * of_t)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_properties(alpha: float) -> None:
    """Positive, 0 with no gradient on the teacher itself, and swapped roles swap alpha."""
    s, t = draw(50, 7).log_softmax(-1), draw(50, 7, seed=1).log_softmax(-1)
    assert (divergence(s, t, alpha) > 0).all()
    torch.testing.assert_close(divergence(s, t, alpha), divergence(t, s, 1 - alpha))
    logits = draw(50, 7).requires_grad_()
    same = divergence(logits.log_softmax(-1), s, alpha)
    same.sum().backward()
    assert logits.grad is not None
    assert same.abs().max() < 1e-15 and logits.grad.abs().max() < 1e-15


def test_terms() -> None:
    s, t = draw(50, 7).log_softmax(-1), draw(50, 7, seed=1).log_softmax(-1)
    for alpha in ALPHAS:
        terms = divergence_terms(s, t, alpha)
        assert terms.shape == (50, 7) and torch.equal(terms.sum(-1), divergence(s, t, alpha))
    torch.testing.assert_close(divergence_terms(s, t, 1.0)[:, 6], s[:, 6].exp() * (s - t)[:, 6])


def test_the_ends_are_no_limits() -> None:
    s, t = draw(50, 7).log_softmax(-1), draw(50, 7, seed=1).log_softmax(-1)
    for end, near in ((0.0, 1e-6), (1.0, 1 - 1e-6)):
        assert (divergence(s, t, near) < 1e-4).all() and divergence(s, t, end).mean() > 0.1
    torch.testing.assert_close(divergence(s, t, 0.0), kl_div(s, t, reduction="none", log_target=True).sum(-1))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", ["exact", "clamped", "none"])
def test_gradient_of_buckets(alpha: float, tail: Tail) -> None:
    """The bucket form that a sharded implementation computes, against autograd through the whole softmax."""
    logits, teacher = draw(20, 11).requires_grad_(), draw(20, 11, seed=1).log_softmax(-1)
    logp = logits.log_softmax(-1)
    rest = logp[:, 4:].logsumexp(-1)
    s, t = buckets(logp[:, :4], rest, tail), buckets(teacher[:, :4], teacher[:, 4:].logsumexp(-1), tail)
    torch.testing.assert_close(s.exp().sum(-1), torch.ones(20, dtype=torch.float64))
    (found,) = torch.autograd.grad(divergence(s, t, alpha).sum(), logits)
    s, p = s.detach(), logp.detach().exp()
    if alpha == 0:
        g = -t.exp()
    elif alpha == 1:
        g = s.exp() * (s - t + 1)
    else:
        g = (1 - alpha) * s.exp() * (s - ((1 - alpha) * s.exp() + alpha * t.exp()).log())
    expected = torch.zeros_like(p)
    if tail == "none":
        expected[:, :4] = g - s.exp() * g.sum(-1, keepdim=True)
    else:
        expected[:, :4] = g[:, :4]
        expected[:, 4:] = g[:, 4:] * p[:, 4:] / p[:, 4:].sum(-1, keepdim=True)
        expected -= p * g.sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)


def test_clamped_tail() -> None:
    """Where the ids hold nearly all, it is -16.1 and a constant; elsewhere it is the exact one."""
    logp = torch.tensor([[0.0, -20.0], [-1.0, -2.0]], dtype=torch.float64).log_softmax(-1)[:, :1].clone()
    logp[1] = -1.0
    logp.requires_grad_()
    tail = buckets(logp, torch.zeros(2), "clamped")[:, -1]
    assert tail[0].item() == pytest.approx(math.log(1e-7), rel=1e-6)
    assert tail[1].item() == pytest.approx(math.log(1 - math.exp(-1)))
    tail.sum().backward()
    assert logp.grad is not None and logp.grad[0].item() == 0 and logp.grad[1].item() < 0


@pytest.mark.parametrize("alpha", ALPHAS)
def test_probability_zero_is_finite_where_it_is_common(alpha: float) -> None:
    s = torch.tensor([[math.log(0.5), math.log(0.5), -math.inf]]).requires_grad_()
    t = torch.tensor([[math.log(0.25), math.log(0.75), -math.inf]])
    loss = divergence(s, t, alpha)
    loss.sum().backward()
    assert s.grad is not None
    torch.testing.assert_close(loss, divergence(s[:, :2], t[:, :2], alpha))
    assert s.grad.isfinite().all() and s.grad[0, 2] == 0


def test_sampled_token_has_the_gradient_of_the_reverse_kl() -> None:
    """Summed over all tokens with their probabilities."""
    logits, teacher = draw(1, 5).requires_grad_(), draw(1, 5, seed=1).log_softmax(-1)
    logp = logits.log_softmax(-1)
    mean = (logp.detach().exp() * sampled_token(logp, teacher)).sum()
    (found,) = torch.autograd.grad(mean, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(divergence(logp, teacher, 1.0).sum(), logits)
    torch.testing.assert_close(found, expected)
    assert sampled_token(torch.tensor(-1.0), torch.tensor(-2.0)).item() == -1.0


def test_off_policy_weights() -> None:
    loss = torch.ones(4, dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, -1.0, -1.0, -40.0], dtype=torch.float64)
    logp = (old + torch.tensor([0.0, math.log(1.5), math.log(5), 30], dtype=torch.float64)).requires_grad_()
    result = off_policy(loss, logp, old, is_clip=2.0)
    torch.testing.assert_close(result.loss, torch.tensor([1.0, 1.5, 2, 2], dtype=torch.float64))
    assert result.clipped.tolist() == [False, False, True, True]
    # The weight has no gradient; that of the loss is the weight.
    (to_loss,) = torch.autograd.grad(result.loss.sum(), loss)
    assert torch.equal(to_loss, result.ratio)
    assert torch.autograd.grad(result.loss.sum(), logp, allow_unused=True, retain_graph=True) == (None,)
    down = off_policy(loss, old - 30, old, is_clip=2.0)
    assert down.ratio[0].item() == pytest.approx(math.exp(-20)) and not down.clipped.any()
    weights = torch.tensor([0.5, 1, 1, 0], dtype=torch.float64, requires_grad=True)
    both = off_policy(loss, logp, old, is_clip=2.0, rollout_weights=weights)
    torch.testing.assert_close(both.loss, result.loss * weights)
    (to_loss,) = torch.autograd.grad(both.loss.sum(), loss)
    assert torch.equal(to_loss, (result.ratio * weights).detach())
    bare = off_policy(loss, logp, old, is_clip=None)
    assert torch.equal(bare.loss, loss) and not bare.clipped.any()


def test_weights_by_pass_rate() -> None:
    """Groups of 1 in 4, 2 in 2 (and one not judged), 1 in 2; of eight responses with a teacher the mean is 1."""
    nan = math.nan
    rewards = torch.tensor([1, 0, 0, 0.4, 1, nan, 1, 0.5, 0], dtype=torch.float64)
    group_ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    targets = torch.ones(9, dtype=torch.bool)
    targets[0] = False
    weights = pass_rate_weights(rewards, group_ids, targets, threshold=0.5)
    quarter, half = math.sqrt(3) / 4, 1 / 2
    mean = (3 * quarter + 3 * 0 + 2 * half) / 8
    torch.testing.assert_close(weights, torch.tensor([quarter] * 4 + [0] * 3 + [half] * 2, dtype=torch.float64) / mean)
    assert weights[targets].mean().item() == pytest.approx(1)


@pytest.mark.parametrize(("rewards", "held"), [([1.0, 1, 0, 0], True), ([1.0, 0, 1, 0], False)])
def test_no_pass_rate_tells_anything(rewards: list[float], held: bool) -> None:
    """All right and all wrong, or no response with a teacher: nothing to distil, and no division by 0."""
    targets = torch.full((4,), held)
    weights = pass_rate_weights(torch.tensor(rewards), torch.tensor([0, 0, 1, 1]), targets, threshold=1.0)
    assert weights.tolist() == [0, 0, 0, 0]


def test_weights_by_entropy() -> None:
    entropy = torch.tensor([0.0, math.log(2), math.log(9)], dtype=torch.float64, requires_grad=True)
    weights = entropy_weights(entropy, 0.5)
    torch.testing.assert_close(weights, torch.tensor([1, 0.5**0.5, 1 / 3], dtype=torch.float64))
    assert not weights.requires_grad
