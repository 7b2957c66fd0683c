"""Two heads, chunk by chunk, against the dense log-probabilities of both."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.distill import buckets, divergence
from megatron_rl.ops import logit_stream, reference
from megatron_rl.ops.divergence import Head, Pair, full_divergence, mixed_head, overlap, pair_figures, paired_stats
from megatron_rl.ops.vocab_shard import VocabShard
from tests.unit.test_linear_stats_topk import LargestStorage, draw

N, H, V = 23, 11, 157
WHOLE = VocabShard(0, V)
LABELS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))


def heads(dtype: torch.dtype = torch.float64, n: int = N, v: int = V, padding: int = 0) -> tuple[Head, Head]:
    """Student and teacher, near each other; NaN on the padding."""
    nan = torch.full((padding, H), torch.nan, dtype=torch.float64)
    hidden, weight = draw(n, H), draw(v, H, seed=1)
    near = (hidden + 0.3 * draw(n, H, seed=4), weight + 0.1 * draw(v, H, seed=5))
    student, teacher = (
        (h.to(dtype).requires_grad_(), torch.cat([w, nan]).to(dtype).requires_grad_())
        for h, w in ((hidden, weight), near)
    )
    return Head(*student, 0.9), Head(*teacher, 1.1)


def dense(head: Head, v: int = V) -> Tensor:
    return reference.log_probs(head.hidden, head.weight[:v], head.temperature)


def gradient(loss: Tensor, head: Head) -> tuple[Tensor, ...]:
    """Of a sum with weights that differ."""
    weights = torch.arange(1.0, 1 + len(loss), dtype=loss.dtype)
    return torch.autograd.grad((weights * loss).sum(), (head.hidden, head.weight))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 50, 1024])
@pytest.mark.parametrize("kept", [True, False])
def test_full_divergence(alpha: float, chunk: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setattr(logit_stream, "KEPT_BYTES", 0)
    student, teacher = heads(padding=4)
    result = full_divergence(student, teacher, LABELS, alpha=alpha, k=3, shard=WHOLE, chunk=chunk)
    s, t = dense(student), dense(teacher).detach()
    expected = divergence(s, t, alpha)
    torch.testing.assert_close(result.loss, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(gradient(result.loss, student), gradient(expected, student)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    for stats, logp in zip(result.pair, (s, t)):
        torch.testing.assert_close(stats.logp, logp.gather(1, LABELS[:, None])[:, 0])
        torch.testing.assert_close(stats.entropy, -(logp.exp() * logp).sum(1))
        assert stats.largest_ids is not None and torch.equal(stats.largest_ids, reference.largest(logp, 3))
    assert not result.pair.teacher.logp.requires_grad and not result.pair.teacher.entropy.requires_grad


@pytest.mark.parametrize("chunk", [1, 50, 1024])
@pytest.mark.parametrize("parts", [(1, 1, 1), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_statistics_of_the_full_divergence_are_differentiable(parts: tuple[int, int, int], chunk: int) -> None:
    """Any sum of the divergence, the label's log-probability and the entropy."""
    student, teacher = heads(padding=4)
    result = full_divergence(student, teacher, LABELS, alpha=0.3, shard=WHOLE, chunk=chunk)
    s, t = dense(student), dense(teacher).detach()
    of_dense = (divergence(s, t, 0.3), s.gather(1, LABELS[:, None])[:, 0], -(s.exp() * s).sum(1))
    of_result = (result.loss, result.pair.student.logp, result.pair.student.entropy)
    totals = [sum((n + 1) * v for n, v in enumerate(values) if parts[n]) for values in (of_result, of_dense)]
    for mine, theirs in zip(*(gradient(total, student) for total in totals)):  # type: ignore[arg-type]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_full_divergence_of_certain_teachers(alpha: float) -> None:
    """Probabilities that are 0 in float32 leave the loss and its gradient finite."""
    weight = torch.eye(4)
    student = Head(torch.zeros(2, 4).requires_grad_(), weight.clone().requires_grad_())
    teacher = Head(torch.tensor([[200.0, 0, 0, 0], [0, 0, 300, 0]]), weight)
    loss = full_divergence(student, teacher, torch.tensor([0, 1]), alpha=alpha, shard=VocabShard(0, 4)).loss
    grads = gradient(loss, student)
    assert loss.isfinite().all() and all(g.isfinite().all() for g in grads)
    if alpha == 0:
        torch.testing.assert_close(loss, torch.tensor(4.0).log().expand(2))


@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize("figures", [True, False])
def test_lists_of_either_head(support: Any, figures: bool) -> None:
    student, teacher = heads(padding=4)
    pair = paired_stats(student, teacher, LABELS, support=support, k=6, shard=WHOLE, figures=figures, chunk=40)
    s, t = dense(student), dense(teacher).detach()
    ids = reference.largest(s if support == "student" else t, 6)
    assert isinstance(pair, Pair) and pair.student.topk_ids is not None and pair.teacher.topk_ids is not None
    assert torch.equal(pair.student.topk_ids, ids) and torch.equal(pair.teacher.topk_ids, ids)
    found, expected = [], []
    for stats, logp in zip(pair, (s, t)):
        assert stats.topk_logp is not None and stats.tail_logp is not None
        found.append(buckets(stats.topk_logp, stats.tail_logp, "exact"))
        others = logp.scatter(1, ids, -torch.inf).logsumexp(1)
        expected.append(torch.cat([logp.gather(1, ids), others[:, None]], 1))
        if figures:
            assert stats.largest_ids is not None and torch.equal(stats.largest_ids, reference.largest(logp, 6))
    assert not found[1].requires_grad
    ours, theirs = divergence(*found, 0.5), divergence(*expected, 0.5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for mine, other in zip(gradient(ours, student), gradient(theirs, student)):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_all_ids_with_a_tail_are_the_full_divergence() -> None:
    student, teacher = heads()
    full = full_divergence(student, teacher, LABELS, alpha=0.5, shard=WHOLE)
    pair = paired_stats(student, teacher, LABELS, support="student", k=V, shard=WHOLE)
    s, t = (buckets(x.topk_logp, x.tail_logp, "exact") for x in pair)  # type: ignore[arg-type]
    torch.testing.assert_close(divergence(s, t, 0.5), full.loss, rtol=0, atol=1e-12)


def test_nothing_to_learn_from_oneself() -> None:
    student, _ = heads()
    for alpha in (0.0, 0.5, 1.0):
        loss = full_divergence(student, student, LABELS, alpha=alpha, shard=WHOLE).loss
        assert loss.abs().max() < 1e-14
        assert max(float(g.abs().max()) for g in gradient(loss, student)) < 1e-12


def test_mixed_head() -> None:
    """The mixture is of logits, before the temperature."""
    one, other = heads()
    other = other._replace(temperature=one.temperature)
    mixed = mixed_head(one, other, 0.3)
    logits = 0.7 * one.hidden @ one.weight.t() + 0.3 * other.hidden @ other.weight.t()
    torch.testing.assert_close(dense(mixed), (logits / one.temperature).log_softmax(-1), rtol=0, atol=1e-12)
    assert not mixed.hidden.requires_grad


@pytest.mark.parametrize("full", [True, False])
def test_figures(full: bool) -> None:
    student, teacher = heads()
    if full:
        pair = full_divergence(student, teacher, LABELS, alpha=0.5, k=4, shard=WHOLE).pair
    else:
        pair = paired_stats(student, teacher, LABELS, support="student", k=4, shard=WHOLE)
    found = pair_figures(pair)
    s, t = dense(student).detach(), dense(teacher).detach()
    mine, theirs = reference.largest(s, 4), reference.largest(t, 4)
    shared = [len({*a} & {*b}) / 4 for a, b in zip(mine.tolist(), theirs.tolist())]
    assert found.overlap.tolist() == shared and 0.1 < sum(shared) / N < 0.9
    assert torch.equal(found.agreement, s.argmax(1) == t.argmax(1))
    torch.testing.assert_close(found.gap, (t - s).gather(1, LABELS[:, None])[:, 0])
    torch.testing.assert_close(found.teacher_entropy, -(t.exp() * t).sum(1))
    if full:
        assert found.student_mass is None and found.teacher_mass is None
    else:
        torch.testing.assert_close(found.student_mass, s.exp().gather(1, mine).sum(1))
        torch.testing.assert_close(found.teacher_mass, t.exp().gather(1, mine).sum(1))
    assert not any(x.requires_grad for x in found if x is not None)


def test_overlap() -> None:
    ids = torch.tensor([[0, 1, 2, 3], [7, 5, 6, 4]])
    assert overlap(ids, torch.tensor([[3, 2, 1, 0], [8, 9, 10, 7]])).tolist() == [1, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_no_more_than_a_chunk_exists(dtype: torch.dtype, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_stream, "KEPT_BYTES", 0)
    n, v, chunk = 256, 1003, 64
    student, teacher = heads(dtype, n, v)
    labels = torch.zeros(n, dtype=torch.int64)
    with LargestStorage() as ours:
        result = full_divergence(student, teacher, labels, alpha=alpha, k=8, shard=VocabShard(0, v), chunk=chunk)
        result.loss.sum().backward()
    assert ours.numel == n * chunk


def test_no_tokens_still_give_a_gradient() -> None:
    student, teacher = heads(n=0)
    labels = torch.empty(0, dtype=torch.int64)
    result = full_divergence(student, teacher, labels, alpha=0.5, k=2, shard=WHOLE)
    assert result.loss.shape == (0,)
    result.loss.sum().backward()
    assert student.weight.grad is not None and torch.equal(student.weight.grad, torch.zeros_like(student.weight))
    assert teacher.weight.grad is None


def test_a_graph_that_is_kept_gives_the_same_gradient_again() -> None:
    student, teacher = heads()
    loss = full_divergence(student, teacher, LABELS, alpha=0.5, shard=WHOLE).loss
    runs = [torch.autograd.grad(loss.sum(), student[:2], retain_graph=True) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs))


def test_no_logits_of_a_teacher_are_kept() -> None:
    """Also where it is the student itself, whose weights take a gradient."""
    student, _ = heads()
    pair = paired_stats(student, student, LABELS, support="student", k=4, shard=WHOLE)
    assert not pair.teacher.logp.requires_grad and pair.student.logp.requires_grad
    for name in ("logp", "topk_logp", "tail_logp"):
        torch.testing.assert_close(getattr(pair.teacher, name), getattr(pair.student, name))
