"""Log-probabilities and entropy straight from hidden states, with the vocabulary sharded and never materialised.

The lm-head and the softmax are one operator. It streams the vocabulary in chunks through one buffer [N, chunk], keeps a
row of statistics per token (`ops/summary.py`), and forgets the logits; the backward pass computes them again.

With the row's m, s (over all columns), z_y and t, and p = softmax(z) over the true vocabulary,

    log p_y = (z_y - m) - log s,    H = log s - u,    u = t / s = E_p[z - m],    p_tail = sum of p_v, v not listed.

From upstream g_y, g_H, g_tail, and g_j for the listed columns j, the gradient is one formula for any loss:

    dL/dz_v = [v = y] g_y + [v listed] g_v + [v not listed] g_tail p_v / p_tail - p_v G - g_H p_v (z_v - m - u),
    G = g_y + sum_j g_j + g_tail.

All of it but p_v is known on every rank, so the backward pass has no collective.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.ops.dispatch import uses_triton
from megatron_rl.ops.logit_stream import exp_, head_gradients, keeping, logit_chunks, product_chunks, vocabulary_chunk
from megatron_rl.ops.summary import FLOOR, Summary, summarise, within
from megatron_rl.ops.topk import Places
from megatron_rl.ops.vocab_shard import VocabShard


class LinearStats(NamedTuple):
    """Per token, in nats; None where not asked for."""

    logp: Tensor  # [N] of the label
    entropy: Tensor | None = None  # [N]
    topk_logp: Tensor | None = None  # [N, k] at `topk_ids`
    topk_ids: Tensor | None = None  # [N, k] int64: the given ones, or else the largest
    tail_logp: Tensor | None = None  # [N] log of the probability of all ids but these
    largest_ids: Tensor | None = None  # [N, k] int64: the k most likely, in order


def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    entropy: bool = True,
    k: int = 0,
    indices: Tensor | None = None,
    chunk: int | None = None,
    main_grad: Tensor | None = None,
) -> LinearStats:
    """Statistics of softmax(hidden weight^T / temperature) over the whole vocabulary, equal on all ranks of the shard.

    Shapes: `hidden` [N, H], the same on every rank; `weight` [rows, H], whose rows beyond `shard.size` are padding and
    are never read; `labels` [N] int64, ids in the true vocabulary. Results are float64 for float64, otherwise float32.

    `k`, at most the vocabulary's size, asks for the k most likely ids: by value, then by the smaller id. `indices`
    [N, n] int64 are ids to be listed instead, all different in a row; with both, the k most likely are `largest_ids`
    only.
    The tail is a sum over what is not listed, at least the smallest normal number.

    Gradients: `weight`'s is complete, with zeros on the padding. `hidden`'s is this shard's part of a sum over the
    shards: reach this function through a region operator whose backward reduces it. Call it with N = 0 too, on all
    ranks alike: the weight then gets a gradient of zeros. Ids carry none.

    With `main_grad` [rows, H], float64 for float64, otherwise float32, the backward pass adds the weight's gradient to
    that tensor, and `weight` itself gets none.

    `chunk` is the number of vocabulary columns in memory at once, `vocabulary_chunk` if not given; the forward pass of
    the kernels for GPUs has whole rows of 1024 tokens instead.
    """
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    assert labels.shape == hidden.shape[:1], (labels.shape, hidden.shape)
    assert weight.shape[0] >= shard.size, (weight.shape, shard)
    assert shard.group is not None or k <= shard.size, (k, shard)
    chunk = chunk or vocabulary_chunk(hidden.device)
    learning = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    kept = keeping(hidden, weight[: shard.size], learning)
    logp, h, topk_logp, tail_logp, ids = _LinearStats.apply(
        hidden, weight, labels, indices, shard, temperature, entropy, k, chunk, main_grad, kept
    )
    return LinearStats(logp, h, topk_logp, ids if indices is None else indices, tail_logp, ids)


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        indices: Tensor | None,
        shard: VocabShard,
        temperature: float,
        entropy: bool,
        k: int,
        chunk: int,
        main_grad: Tensor | None,
        kept: list[Tensor] | None,
    ) -> tuple[Tensor | None, ...]:
        summary = summarise(
            hidden,
            weight,
            labels,
            shard,
            temperature=temperature,
            entropy=entropy,
            k=k,
            indices=indices,
            chunk=chunk,
            kept=kept,
        )
        ids = summary.largest_ids if indices is None else indices
        ctx.save_for_backward(hidden, weight, labels, ids, *summary[:-1])
        ctx.shard, ctx.temperature, ctx.chunk, ctx.kept = shard, temperature, chunk, kept
        ctx.main_grad = main_grad  # not saved: others may add to it before the backward pass
        ctx.set_materialize_grads(False)
        if summary.largest_ids is not None:
            ctx.mark_non_differentiable(summary.largest_ids)
        stats = stats_of(summary)
        return stats.logp, stats.entropy, stats.topk_logp, stats.tail_logp, summary.largest_ids

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_logp: Tensor | None,
        grad_entropy: Tensor | None,
        grad_topk: Tensor | None,
        grad_tail: Tensor | None,
        _: None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, ids, *numbers = ctx.saved_tensors
        summary = Summary._make([*numbers, None])
        # d(hidden weight^T) = dz / temperature, and dz is linear in the upstream gradients.
        grads = [None if g is None else g / ctx.temperature for g in (grad_logp, grad_entropy, grad_topk, grad_tail)]
        slope = _Slope(summary, ids, *grads, shard=ctx.shard, chunk=ctx.chunk)
        local_labels = labels - ctx.shard.start
        chunks = slope.chunks(hidden, weight[: ctx.shard.size], local_labels, ctx.temperature, ctx.kept)
        grad_hidden, grad_weight = head_gradients(chunks, hidden, weight, ctx.shard.size, ctx.main_grad)
        ctx.kept = None
        return grad_hidden, grad_weight, *[None] * 9


def stats_of(summary: Summary) -> LinearStats:
    """The statistics that a summary holds, without `topk_ids`, and without a gradient."""
    log_total = summary.total.log()
    logp = (summary.label - summary.top) - log_total
    entropy = None if summary.moment is None else log_total - summary.moment / summary.total
    topk_logp = tail_logp = None
    if summary.listed is not None:
        topk_logp = (summary.listed - summary.top[:, None]) - log_total[:, None]
        tail_logp = (summary.rest / summary.total).clamp(min=torch.finfo(logp.dtype).tiny).log()
    return LinearStats(logp, entropy, topk_logp, None, tail_logp, summary.largest_ids)


class _Slope:
    """The gradient of the logits, from the upstream gradients of the outputs."""

    def __init__(
        self,
        summary: Summary,
        ids: Tensor | None,
        grad_logp: Tensor | None,
        grad_entropy: Tensor | None,
        grad_topk: Tensor | None,
        grad_tail: Tensor | None,
        *,
        shard: VocabShard,
        chunk: int,
    ) -> None:
        total = summary.total
        self.top, self.grad_logp = summary.top, torch.zeros_like(total) if grad_logp is None else grad_logp
        self.size, self.chunk = shard.size, chunk
        common = self.grad_logp
        self.ids: Tensor | None = None
        self.listed: Tensor | None = None
        if grad_topk is not None or grad_tail is not None:
            assert ids is not None and summary.listed is not None
            topk = torch.zeros_like(summary.listed) if grad_topk is None else grad_topk
            # At its bound the tail is a constant.
            bounded = summary.rest / total <= torch.finfo(total.dtype).tiny
            tail = torch.zeros_like(total) if grad_tail is None else grad_tail.where(~bounded, 0)
            common = common + topk.sum(1) + tail
            self.ids = ids - shard.start
        # Outside the list the gradient is e^(z - m) (offset - slope (z - m)).
        self.offset, self.slope = -common / total, None
        if grad_entropy is not None:
            assert summary.moment is not None
            self.slope = grad_entropy / total
            self.offset = self.offset + self.slope * (summary.moment / total)
        if self.ids is not None:
            assert summary.listed is not None
            shifted = (summary.listed - self.top[:, None]).clamp(min=FLOOR)
            factor = self.offset[:, None] - (0 if self.slope is None else self.slope[:, None] * shifted)
            self.listed = topk + shifted.exp() * factor
            self.offset = self.offset + (tail / summary.rest).where(~bounded, 0)

    def chunks(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, kept: list[Tensor] | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """(columns, gradient [N, columns] of the logits) over the shard; `labels` count from its first row."""
        if uses_triton(hidden):
            yield from self._through_triton(hidden, weight, labels, temperature, kept)
            return
        places = None if self.ids is None else Places(self.ids, self.size, self.chunk)
        for columns, logits in logit_chunks(hidden, weight, temperature, self.chunk, kept):
            yield columns, self._of_(logits, columns, labels, places)

    def _of_(self, logits: Tensor, columns: slice, labels: Tensor, places: Places | None) -> Tensor:
        """The gradient [N, columns] of the logits, in their place."""
        shifted = logits.sub_(self.top[:, None])
        if self.slope is None:
            grad = exp_(shifted).mul_(self.offset[:, None])
        else:
            shifted.clamp_(min=FLOOR)
            factor = torch.addcmul(self.offset[:, None], shifted, self.slope[:, None], value=-1)
            grad = exp_(shifted).mul_(factor)
        if places is not None:
            assert self.listed is not None
            rows, listed, inside = places.within(columns)
            # Written, not added: a listed column has no part in the tail.
            grad[rows, inside] = self.listed[rows, listed]
        index, inside = within(labels - columns.start, grad.shape[1])
        return grad.scatter_add_(1, index[:, None], self.grad_logp.where(inside, 0)[:, None])

    def _through_triton(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, kept: list[Tensor] | None
    ) -> Iterator[tuple[slice, Tensor]]:
        from megatron_rl.ops.triton.dlogits import dlogits_

        numbers = (self.top, self.offset, self.slope, self.grad_logp, self.ids, self.listed)
        top, offset, slope, grad_logp, ids, listed = (None if x is None else x.contiguous() for x in numbers)
        assert top is not None and offset is not None and grad_logp is not None
        for columns, logits in product_chunks(hidden, weight, self.chunk, kept):
            grad = dlogits_(
                logits,
                scale=1 / temperature,
                top=top,
                offset=offset,
                slope=slope,
                labels=labels - columns.start,
                grad_logp=grad_logp,
                ids=None if ids is None else ids - columns.start,
                listed=listed,
            )
            yield columns, grad
