"""Two lm-heads on the same tokens: what a student is told by a teacher, with the vocabulary sharded and in chunks.

A teacher's logits exist nowhere but in a chunk: it comes as hidden states and a head, like the student. No gradient
goes to it. On a list of ids, the student's or the teacher's most likely, `paired_stats` gives the log-probabilities of
both, and a loss is made of them elsewhere; over the full vocabulary the sum itself is streamed, in `full_divergence`.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.ops.dispatch import uses_triton
from megatron_rl.ops.linear_stats import LinearStats, linear_stats, stats_of
from megatron_rl.ops.logit_stream import exp_, exp_of, head_gradients, keeping, logit_chunks, vocabulary_chunk
from megatron_rl.ops.summary import FLOOR, summarise, within
from megatron_rl.ops.vocab_shard import VocabShard

Support = Literal["student", "teacher"]


class Head(NamedTuple):
    """A distribution over the vocabulary: softmax(hidden weight^T / temperature)."""

    hidden: Tensor  # [N, H], the same on every rank
    weight: Tensor  # [rows, H], this rank's rows of the lm-head
    temperature: float = 1.0
    main_grad: Tensor | None = None  # as for `linear_stats`


def mixed_head(first: Head, second: Head, coefficient: float) -> Head:
    """The head whose logits, before the common temperature, are (1 - coefficient) z_first + coefficient z_second.

    The geometric mixture of SDPO's trust region (Hübotter et al., arXiv 2601.20802). It is one head on the hidden
    states side by side, and takes the memory of both. No gradient goes through it.
    """
    assert first.temperature == second.temperature, (first.temperature, second.temperature)
    with torch.no_grad():
        hidden = torch.cat([first.hidden * (1 - coefficient), second.hidden * coefficient], 1)
        return Head(hidden, torch.cat([first.weight, second.weight], 1), first.temperature)


class Pair(NamedTuple):
    """Statistics of student and teacher; where ids are listed, of the same ids in the same order."""

    student: LinearStats
    teacher: LinearStats  # no gradient


def paired_stats(
    student: Head,
    teacher: Head,
    labels: Tensor,
    *,
    support: Support,
    k: int,
    shard: VocabShard,
    figures: bool = True,
    chunk: int | None = None,
) -> Pair:
    """Both heads' statistics at the k ids that are most likely to the `support`; differentiable in the student.

    `labels` [N] and the rest as for `linear_stats`. With `figures`, what only metrics ask for: entropies, and
    `largest_ids` of both.
    """
    options: dict[str, Any] = {"shard": shard, "entropy": figures, "chunk": chunk}
    learning = {**options, "temperature": student.temperature, "main_grad": student.main_grad}
    own = k if figures else 0
    if support == "student":
        learner = linear_stats(student.hidden, student.weight, labels, k=k, **learning)
        return Pair(learner, _teacher_stats(teacher, labels, k=own, indices=learner.topk_ids, **options))
    guide = _teacher_stats(teacher, labels, k=k, indices=None, **options)
    learner = linear_stats(student.hidden, student.weight, labels, k=own, indices=guide.topk_ids, **learning)
    return Pair(learner, guide)


@torch.no_grad()
def _teacher_stats(teacher: Head, labels: Tensor, **options: Any) -> LinearStats:
    # Detached, so that no logits are kept for a gradient.
    hidden, weight = teacher.hidden.detach(), teacher.weight.detach()
    return linear_stats(hidden, weight, labels, temperature=teacher.temperature, **options)


def overlap(ids: Tensor, others: Tensor) -> Tensor:
    """The share [N] of `ids` [N, k] that are among `others` [N, k]; ids of a row are all different."""
    both = torch.cat([ids, others], 1).sort(dim=1).values
    return (both[:, 1:] == both[:, :-1]).sum(1) / ids.shape[1]


class Figures(NamedTuple):
    """What metrics say of a pair, per token [N], without a gradient."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    overlap: Tensor  # the share of the student's k most likely ids that are among the teacher's
    agreement: Tensor  # bool: the most likely id is the same
    gap: Tensor  # log t - log s of the label
    student_mass: Tensor | None  # of the listed ids, where there are any
    teacher_mass: Tensor | None


@torch.no_grad()
def pair_figures(pair: Pair) -> Figures:
    """Of a pair that was made with `figures`, or, over the full vocabulary, with `k`."""
    student, teacher = pair
    assert student.entropy is not None and teacher.entropy is not None
    assert student.largest_ids is not None and teacher.largest_ids is not None
    masses = [None if stats.topk_logp is None else stats.topk_logp.exp().sum(1) for stats in pair]
    return Figures(
        student.entropy.detach(),
        teacher.entropy,
        overlap(student.largest_ids, teacher.largest_ids),
        student.largest_ids[:, 0] == teacher.largest_ids[:, 0],
        teacher.logp - student.logp,
        *masses,
    )


class FullDivergence(NamedTuple):
    loss: Tensor  # [N]
    pair: Pair  # without lists, but for `largest_ids`


def full_divergence(
    student: Head,
    teacher: Head,
    labels: Tensor,
    *,
    alpha: float,
    k: int = 0,
    shard: VocabShard,
    chunk: int | None = None,
) -> FullDivergence:
    """The divergence over the whole vocabulary, and statistics of both heads; differentiable in the student.

    With s and t the distributions of student and teacher,

        alpha = 0       KL(t || s)
        alpha = 1       KL(s || t)
        otherwise       (1 - alpha) KL(s || m) + alpha KL(t || m),    m = (1 - alpha) s + alpha t

    (the generalised Jensen-Shannon divergence of Agarwal et al., arXiv 2306.13649; at its ends it is 0, and not the
    KL that stands there). With G_v = dL / dlog s_v the gradient is dL/dz_v = G_v - s_v sum G, so the backward pass asks
    for one more number per token and no collective. The student's log-probability and entropy add what they add in
    `linear_stats`: [v = y] g_y - s_v (g_y + g_H (log s_v + H)). `k` as the metrics want it.
    """
    assert 0 <= alpha <= 1, alpha
    loss, *numbers = _FullDivergence.apply(
        student.hidden,
        student.weight,
        teacher.hidden.detach(),
        teacher.weight.detach(),
        labels,
        shard,
        (student.temperature, teacher.temperature),
        alpha,
        k,
        chunk or vocabulary_chunk(student.hidden.device),
        student.main_grad,
    )
    stats = [LinearStats(numbers[i], numbers[i + 1], largest_ids=numbers[i + 2]) for i in (0, 3)]
    return FullDivergence(loss, Pair(*stats))


class _FullDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        shard: VocabShard,
        temperatures: tuple[float, float],
        alpha: float,
        k: int,
        chunk: int,
        main_grad: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        heads = [(hidden, weight[: shard.size]), (teacher_hidden, teacher_weight[: shard.size])]
        kept = [keeping(h, w, True) for h, w in heads]
        summaries = [
            summarise(*head, labels, shard, temperature=t, entropy=True, k=k, indices=None, chunk=chunk, kept=logits)
            for head, t, logits in zip(heads, temperatures, kept)
        ]
        log_totals = [summary.top + summary.total.log() for summary in summaries]
        stats = [stats_of(summary) for summary in summaries]
        ctx.save_for_backward(
            hidden, weight, teacher_hidden, teacher_weight, *log_totals, labels - shard.start, stats[0].entropy
        )
        ctx.shard, ctx.temperatures, ctx.alpha, ctx.chunk, ctx.kept = shard, temperatures, alpha, chunk, kept
        ctx.main_grad = main_grad  # not saved: others may add to it before the backward pass
        tensors = (hidden, weight, teacher_hidden, teacher_weight, *log_totals)
        if uses_triton(hidden):
            from megatron_rl.ops.triton import divergence as kernels

            sums = kernels.shard_sums(ctx, tensors)
        else:
            sums = _shard_sums(ctx, tensors)
        loss, ctx.slopes = shard.all_gather(sums).sum(0).unbind(1)
        results = [x for s in stats for x in (s.logp, s.entropy, s.largest_ids)]
        ctx.mark_non_differentiable(*[x for x in results[2:] if x is not None])
        ctx.set_materialize_grads(False)
        return loss.clone(), *results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, *rest, labels, entropy = ctx.saved_tensors
        grads = [None if g is None else g / ctx.temperatures[0] for g in (grad_loss, grad_logp, grad_entropy)]
        arguments = (ctx, (hidden, weight, *rest), labels, entropy, grads)
        if uses_triton(hidden):
            from megatron_rl.ops.triton import divergence as kernels

            chunks = kernels.gradients(*arguments)
        else:
            chunks = _gradients(*arguments)
        grad_hidden, grad_weight = head_gradients(chunks, hidden, weight, ctx.shard.size, ctx.main_grad)
        ctx.kept = [None, None]
        return grad_hidden, grad_weight, *[None] * 9


def _shard_sums(ctx: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    """[N, 2]: the shard's part of the divergence, and of sum_v dL / dlog s_v."""
    log_total = tensors[-1]
    sums = log_total.new_zeros(len(log_total), 2)
    for _, student, teacher in _log_prob_chunks(ctx, *tensors):
        sums += _sums(student, teacher, ctx.alpha)
    return sums


def _gradients(
    ctx: Any, tensors: tuple[Tensor, ...], labels: Tensor, entropy: Tensor, grads: list[Tensor | None]
) -> Iterator[tuple[slice, Tensor]]:
    """(columns, gradient [N, columns] of the student's logits)."""
    of_loss, of_logp, of_entropy = (None if g is None else g[:, None] for g in grads)
    for columns, student, teacher in _log_prob_chunks(ctx, *tensors):
        wide: Any = 0
        if of_logp is not None or of_entropy is not None:
            wide = _slope_of_stats(student, of_logp, of_entropy, entropy[:, None], labels - columns.start)
        if of_loss is not None:
            wide = _slope(student, teacher, ctx.alpha, ctx.slopes[:, None]).mul_(of_loss).add_(wide)
        yield columns, wide


def _log_prob_chunks(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    log_total: Tensor,
    teacher_log_total: Tensor,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(columns, log s, log t), each [N, columns], no less than the floor."""
    size = ctx.shard.size
    student = logit_chunks(hidden, weight[:size], ctx.temperatures[0], ctx.chunk, ctx.kept[0])
    teacher = logit_chunks(teacher_hidden, teacher_weight[:size], ctx.temperatures[1], ctx.chunk, ctx.kept[1])
    for (columns, s), (_, t) in zip(student, teacher, strict=True):
        s.sub_(log_total[:, None]).clamp_(min=FLOOR)
        t.sub_(teacher_log_total[:, None]).clamp_(min=FLOOR)
        yield columns, s, t


def _slope_of_stats(
    student: Tensor, grad_logp: Tensor | None, grad_entropy: Tensor | None, entropy: Tensor, labels: Tensor
) -> Tensor:
    """dL/dz [N, columns] from the gradients [N, 1] of log-probability and entropy; `labels` count from the columns'."""
    grad = torch.zeros_like(student)
    if grad_entropy is not None:
        grad.sub_((student + entropy).mul_(grad_entropy))
    if grad_logp is not None:
        grad.sub_(grad_logp)
    grad.mul_(student.exp())
    if grad_logp is not None:
        rows, inside = within(labels, student.shape[1])
        grad.scatter_add_(1, rows[:, None], grad_logp.where(inside[:, None], 0))
    return grad


def _mixture(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    logs = torch.tensor([1 - alpha, alpha], dtype=torch.float64).log().tolist()
    return torch.logaddexp(student + logs[0], teacher + logs[1])


def _sums(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """[N, 2]: the columns' part of the loss, and of sum_v dL / dlog s_v."""
    if alpha == 0:
        t = exp_of(teacher)
        return torch.stack([(t * (teacher - student)).sum(1), -t.sum(1)], 1)
    s = exp_of(student)
    if alpha == 1:
        kl = (s * (student - teacher)).sum(1)
        return torch.stack([kl, kl + s.sum(1)], 1)
    mixture = _mixture(student, teacher, alpha)
    of_student = (1 - alpha) * s.mul_(student - mixture).sum(1)
    of_teacher = alpha * mixture.sub_(teacher).neg_().mul_(exp_(teacher)).sum(1)
    return torch.stack([of_student + of_teacher, of_student], 1)


def _slope(student: Tensor, teacher: Tensor, alpha: float, slopes: Tensor) -> Tensor:
    """dL/dz [N, columns] of the student's logits, before the temperature; `slopes` [N, 1] is sum_v dL / dlog s_v."""
    if alpha == 0:
        return exp_(student).mul_(-slopes).sub_(exp_(teacher))
    factor = (
        (student - teacher + 1).sub_(slopes)
        if alpha == 1
        else (student - _mixture(student, teacher, alpha)).mul_(1 - alpha).sub_(slopes)
    )
    return factor.mul_(exp_(student))
