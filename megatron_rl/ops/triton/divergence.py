"""The divergence of two chunks of logits over the vocabulary, as `ops/divergence.py` defines it."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rl.ops.logit_stream import product_chunks

BLOCK = 1024  # columns that a program holds at once
WARPS = 4


class Logits(NamedTuple):
    """A chunk of one head's logits, and what makes log-probabilities of them: z scale - log_total."""

    values: Tensor  # [N, V]
    scale: float
    log_total: Tensor  # [N]


def logit_pairs(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    log_total: Tensor,
    teacher_log_total: Tensor,
) -> Iterator[tuple[slice, Logits, Logits]]:
    """(columns, student, teacher) over the shard."""
    size = ctx.shard.size
    student = product_chunks(hidden, weight[:size], ctx.chunk, ctx.kept[0])
    teacher = product_chunks(teacher_hidden, teacher_weight[:size], ctx.chunk, ctx.kept[1])
    scales = [1 / temperature for temperature in ctx.temperatures]
    for (columns, s), (_, t) in zip(student, teacher, strict=True):
        yield columns, Logits(s, scales[0], log_total), Logits(t, scales[1], teacher_log_total)


def shard_sums(ctx: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    """[N, 2]: the shard's part of the divergence, and of sum_v dL / dlog s_v."""
    log_total = tensors[-1]
    sums = log_total.new_zeros(len(log_total), 2)
    for _, student, teacher in logit_pairs(ctx, *tensors):
        add_sums_(sums, student, teacher, ctx.alpha)
    return sums


def gradients(
    ctx: Any, tensors: tuple[Tensor, ...], labels: Tensor, entropy: Tensor, grads: list[Tensor | None]
) -> Iterator[tuple[slice, Tensor]]:
    """(columns, gradient [N, columns] of the student's logits)."""
    upstream = [torch.zeros_like(entropy) if grad is None else grad.contiguous() for grad in grads]
    slopes = ctx.slopes.contiguous()
    for columns, student, teacher in logit_pairs(ctx, *tensors):
        yield columns, slope_(student, teacher, ctx.alpha, slopes, entropy, labels - columns.start, *upstream)


def _common(student: Logits, teacher: Logits, alpha: float) -> tuple[list[Any], dict[str, Any]]:
    heads = [x for head in (student, teacher) for x in (head.values, head.values.stride(0), head.log_total, head.scale)]
    # log 0 is of a case that does not read it.
    logs = [math.log(x) if x > 0 else 0.0 for x in (1 - alpha, alpha)]
    case = "teacher" if alpha == 0 else "student" if alpha == 1 else "mixture"
    return [*heads, student.values.shape[1], alpha, *logs], {"CASE": case, "BLOCK": BLOCK, "num_warps": WARPS}


def add_sums_(sums: Tensor, student: Logits, teacher: Logits, alpha: float) -> None:
    """Adds a chunk's part of the divergence, and of sum_v dL / dlog s_v, to `sums` [N, 2]."""
    if student.values.numel():
        arguments, options = _common(student, teacher, alpha)
        sums_kernel[(len(sums),)](sums, *arguments, **options)


def slope_(
    student: Logits,
    teacher: Logits,
    alpha: float,
    slopes: Tensor,
    entropy: Tensor,
    labels: Tensor,
    grad_loss: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor,
) -> Tensor:
    """The student's logits become their gradient, in their dtype.

    `slopes`, `entropy` and the upstream gradients of divergence, log-probability and entropy, over the temperature,
    are [N]; `labels` [N] count from the chunk's first column.
    """
    if student.values.numel():
        arguments, options = _common(student, teacher, alpha)
        numbers = (slopes, entropy, labels, grad_loss, grad_logp, grad_entropy)
        slope_kernel[(len(slopes),)](*numbers, *arguments, **options)
    return student.values


@triton.jit
def _log_probs(logits_ptr, columns, size, scale, log_total, MASKED: tl.constexpr):
    """Not below the floor, which is where a column that does not exist is: it weighs nothing."""
    if MASKED:
        logits = tl.load(logits_ptr + columns, mask=columns < size, other=-float("inf")).to(log_total.dtype)
    else:
        logits = tl.load(logits_ptr + columns).to(log_total.dtype)
    return tl.maximum(logits * scale - log_total, -1e4)


@triton.jit
def _mixture(student, teacher, log_student, log_teacher):
    """log((1 - alpha) s + alpha t)."""
    a = student + log_student
    b = teacher + log_teacher
    top = tl.maximum(a, b)
    return top + tl.log(1.0 + tl.exp(tl.minimum(a, b) - top))


@triton.jit
def _sums(student, teacher, alpha, log_student, log_teacher, CASE: tl.constexpr):
    s = tl.exp(student)
    t = tl.exp(teacher)
    if CASE == "teacher":
        slopes = -tl.sum(t, 0)
        divergence = tl.sum(t * (teacher - student), 0)
    elif CASE == "student":
        divergence = tl.sum(s * (student - teacher), 0)
        slopes = divergence + tl.sum(s, 0)
    else:
        mixture = _mixture(student, teacher, log_student, log_teacher)
        slopes = (1 - alpha) * tl.sum(s * (student - mixture), 0)
        divergence = slopes + alpha * tl.sum(t * (teacher - mixture), 0)
    return divergence, slopes


@triton.jit
def _slope(student, teacher, slopes, alpha, log_student, log_teacher, CASE: tl.constexpr):
    if CASE == "teacher":
        slope = -tl.exp(student) * slopes - tl.exp(teacher)
    elif CASE == "student":
        slope = tl.exp(student) * (student - teacher + 1 - slopes)
    else:
        mixture = _mixture(student, teacher, log_student, log_teacher)
        slope = tl.exp(student) * ((1 - alpha) * (student - mixture) - slopes)
    return slope


@triton.jit
def sums_kernel(
    sums_ptr,
    student_ptr,
    student_stride,
    student_total_ptr,
    student_scale: tl.float64,
    teacher_ptr,
    teacher_stride,
    teacher_total_ptr,
    teacher_scale: tl.float64,
    size,
    alpha: tl.float64,
    log_student: tl.float64,
    log_teacher: tl.float64,
    CASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    wide = sums_ptr.dtype.element_ty
    student_scale = tl.full((), student_scale, wide)
    teacher_scale = tl.full((), teacher_scale, wide)
    alpha = tl.full((), alpha, wide)
    log_student = tl.full((), log_student, wide)
    log_teacher = tl.full((), log_teacher, wide)
    student_total = tl.load(student_total_ptr + row)
    teacher_total = tl.load(teacher_total_ptr + row)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    divergence = tl.load(sums_ptr + row * 2)
    slopes = tl.load(sums_ptr + row * 2 + 1)
    in_blocks = size // BLOCK * BLOCK
    for start in range(0, in_blocks, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        student = _log_probs(student_ptr, columns, size, student_scale, student_total, False)
        teacher = _log_probs(teacher_ptr, columns, size, teacher_scale, teacher_total, False)
        parts = _sums(student, teacher, alpha, log_student, log_teacher, CASE)
        divergence += parts[0]
        slopes += parts[1]
    if in_blocks < size:
        columns = in_blocks + tl.arange(0, BLOCK)
        student = _log_probs(student_ptr, columns, size, student_scale, student_total, True)
        teacher = _log_probs(teacher_ptr, columns, size, teacher_scale, teacher_total, True)
        parts = _sums(student, teacher, alpha, log_student, log_teacher, CASE)
        divergence += parts[0]
        slopes += parts[1]
    # Every thread has read the row's sums before one writes them.
    tl.debug_barrier()
    tl.store(sums_ptr + row * 2, divergence)
    tl.store(sums_ptr + row * 2 + 1, slopes)


@triton.jit
def slope_kernel(
    slopes_ptr,
    entropy_ptr,
    labels_ptr,
    grad_loss_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    student_ptr,
    student_stride,
    student_total_ptr,
    student_scale: tl.float64,
    teacher_ptr,
    teacher_stride,
    teacher_total_ptr,
    teacher_scale: tl.float64,
    size,
    alpha: tl.float64,
    log_student: tl.float64,
    log_teacher: tl.float64,
    CASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row."""
    row = tl.program_id(0).to(tl.int64)
    wide = slopes_ptr.dtype.element_ty
    narrow = student_ptr.dtype.element_ty
    student_scale = tl.full((), student_scale, wide)
    teacher_scale = tl.full((), teacher_scale, wide)
    alpha = tl.full((), alpha, wide)
    log_student = tl.full((), log_student, wide)
    log_teacher = tl.full((), log_teacher, wide)
    student_total = tl.load(student_total_ptr + row)
    teacher_total = tl.load(teacher_total_ptr + row)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    slopes = tl.load(slopes_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    label = tl.load(labels_ptr + row)
    grad_loss = tl.load(grad_loss_ptr + row)
    grad_logp = tl.load(grad_logp_ptr + row)
    grad_entropy = tl.load(grad_entropy_ptr + row)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        student = _log_probs(student_ptr, columns, size, student_scale, student_total, True)
        teacher = _log_probs(teacher_ptr, columns, size, teacher_scale, teacher_total, True)
        grad = grad_loss * _slope(student, teacher, slopes, alpha, log_student, log_teacher, CASE)
        grad -= tl.exp(student) * (grad_logp + grad_entropy * (student + entropy))
        grad += tl.where(columns == label, grad_logp, 0.0)
        tl.store(student_ptr + columns, grad.to(narrow), mask=columns < size)
