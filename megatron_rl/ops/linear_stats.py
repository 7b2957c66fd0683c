"""Log-probability and entropy straight from hidden states, with the vocabulary sharded and never materialised.

The lm-head and the softmax are one operator. It streams the vocabulary in chunks through one buffer [N, chunk], keeps a
row of statistics per token, and forgets the logits; the backward pass computes them again. The idea is that of Cut
Cross-Entropy (Wijmans et al., arXiv 2411.09009), here with a sharded vocabulary and the entropy. Where all logits of
the shard are small (KEPT_BYTES) they are kept instead, which saves a matrix product and changes no number.

With z = hidden weight^T / temperature, the statistics of a set of columns are

    m = max z,    s = sum e^(z - m),    z_y = z of the label (0 if it lies elsewhere),    t = sum (z - m) e^(z - m),

one row [m, s, z_y] or [m, s, z_y, t]. Rows merge over any partition of the vocabulary: over the chunks of a shard,
then, by one all-gather, over the shards. (A top-k adds k columns to the row, and merges likewise.) Then

    log p_y = (z_y - m) - log s,    H = log s - u,    u = t / s = E_p[z - m],

    dL/dz_v = g_logp ([v = y] - p_v) - g_H p_v (z_v - m - u),

so whatever the loss, the gradient needs the merged row and the upstream gradients, all known on every rank, and the
backward pass has no collective.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.ops.vocab_shard import VocabShard

# e^-1e4 is 0 in every dtype, so a floor here changes no product (z - m) e^(z - m) but 0 * inf.
_FLOOR = -1e4

KEPT_BYTES = 64 * 2**20


class LinearStats(NamedTuple):
    """Per token [N]: log-probability of the label, and entropy (None if not asked for), in nats."""

    logp: Tensor
    entropy: Tensor | None


def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    entropy: bool = True,
    chunk: int = 1024,
) -> LinearStats:
    """Statistics of softmax(hidden weight^T / temperature) over the whole vocabulary, equal on all ranks of the shard.

    Shapes: `hidden` [N, H], the same on every rank; `weight` [rows, H], whose rows beyond `shard.size` are padding and
    are never read; `labels` [N] int64, ids in the true vocabulary. Results are float64 for float64, otherwise float32.

    Gradients: `weight`'s is complete, with zeros on the padding. `hidden`'s is this shard's part of a sum over the
    shards: reach this function through a region operator whose backward reduces it. Call it with N = 0 too, on all
    ranks alike: the weight then gets a gradient of zeros.

    `chunk` is the number of vocabulary columns in memory at once.
    """
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    assert labels.shape == hidden.shape[:1], (labels.shape, hidden.shape)
    assert weight.shape[0] >= shard.size, (weight.shape, shard)
    return LinearStats(*_LinearStats.apply(hidden, weight, labels, shard, temperature, entropy, chunk))


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: VocabShard,
        temperature: float,
        entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor | None]:
        size = hidden.shape[0] * shard.size * hidden.element_size()
        kept: list[Tensor] | None = [] if size <= KEPT_BYTES and any(ctx.needs_input_grad) else None
        logits = _logit_chunks(hidden, weight[: shard.size], temperature, chunk, kept)
        local = _shard_rows(logits, hidden, labels - shard.start, entropy)
        rows = _merge(shard.all_gather(local))
        ctx.save_for_backward(hidden, weight, labels, rows)
        ctx.shard, ctx.temperature, ctx.chunk, ctx.kept = shard, temperature, chunk, kept
        ctx.set_materialize_grads(False)
        top, total, label_logit = rows[:, :3].unbind(1)
        logp = (label_logit - top) - total.log()
        return logp, total.log() - rows[:, 3] / total if entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, rows = ctx.saved_tensors
        local_labels = labels - ctx.shard.start
        # d(hidden weight^T) = dz / temperature, and dz is linear in the upstream gradients.
        grad_logp = torch.zeros_like(rows[:, 0]) if grad_logp is None else grad_logp / ctx.temperature
        grad_entropy = None if grad_entropy is None else grad_entropy / ctx.temperature
        grad_hidden = torch.zeros_like(hidden, dtype=rows.dtype)
        grad_weight = torch.empty_like(weight)
        grad_weight[ctx.shard.size :] = 0
        for columns, logits in _logit_chunks(hidden, weight[: ctx.shard.size], ctx.temperature, ctx.chunk, ctx.kept):
            grad = _logit_grad_(logits, rows, local_labels - columns.start, grad_logp, grad_entropy).to(hidden.dtype)
            # All tokens at once, so each row of the weight's gradient is rounded once.
            torch.mm(grad.t(), hidden, out=grad_weight[columns])
            _add_mm_(grad_hidden, grad, weight[columns])
        ctx.kept = None
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None


def _logit_chunks(
    hidden: Tensor, weight: Tensor, temperature: float, chunk: int, kept: list[Tensor] | None
) -> Iterator[tuple[slice, Tensor]]:
    """(columns, logits [N, columns] / temperature) over the vocabulary; the next chunk overwrites the logits.

    The product has the inputs' dtype, as an lm-head's has; what follows is at least float32. An empty list `kept` is
    filled with the products; a full one stands in for them.
    """
    num_rows = weight.shape[0]
    wide = hidden.new_empty(
        hidden.shape[0], min(chunk, num_rows), dtype=torch.promote_types(hidden.dtype, torch.float32)
    )
    narrow = wide if wide.dtype == hidden.dtype else torch.empty_like(wide, dtype=hidden.dtype)
    known = list(kept or [])
    for place, start in enumerate(range(0, num_rows, chunk)):
        columns = slice(start, min(start + chunk, num_rows))
        logits = wide[:, : columns.stop - start]
        if known:
            logits.copy_(known[place])
        elif kept is not None:
            kept.append(hidden @ weight[columns].t())
            logits.copy_(kept[-1])
        else:
            product = torch.mm(hidden, weight[columns].t(), out=narrow[:, : logits.shape[1]])
            if product.dtype != logits.dtype:
                logits.copy_(product)
        if temperature != 1.0:
            logits.mul_(1 / temperature)
        yield columns, logits


def _shard_rows(chunks: Iterable[tuple[slice, Tensor]], hidden: Tensor, labels: Tensor, entropy: bool) -> Tensor:
    """Statistics [N, 3 or 4] of one shard's columns. `labels` count from the shard's first row, and may lie outside."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # The neutral row of the merge: a finite maximum where -inf would make nan.
    rows = torch.zeros(hidden.shape[0], 4 if entropy else 3, dtype=dtype, device=hidden.device)
    rows[:, 0] = torch.finfo(dtype).min
    for columns, logits in chunks:
        index, inside = _within(labels - columns.start, logits.shape[1])
        label_logit = logits.gather(1, index[:, None])[:, 0].where(inside, 0)
        top = logits.amax(1).clamp(min=torch.finfo(dtype).min)
        logits.sub_(top[:, None])
        if entropy:
            exp = logits.clamp_(min=_FLOOR).exp()
            part = [top, exp.sum(1), label_logit, logits.mul_(exp).sum(1)]
        else:
            part = [top, logits.exp_().sum(1), label_logit]
        rows = _merge(torch.stack([rows, torch.stack(part, 1)]))
    return rows


def _merge(parts: Tensor) -> Tensor:
    """Statistics of a union [N, C] from those of its disjoint parts [P, N, C]."""
    tops, totals, label_logits = parts[..., :3].unbind(-1)
    top = tops.amax(0)
    shift = tops - top
    scale = shift.exp()
    columns = [top, (totals * scale).sum(0), label_logits.sum(0)]
    if parts.shape[-1] == 4:
        columns.append(((parts[..., 3] + shift * totals) * scale).sum(0))
    return torch.stack(columns, 1)


def _logit_grad_(
    logits: Tensor, rows: Tensor, labels: Tensor, grad_logp: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """The gradient [N, columns] of the logits, in their place. `labels` count from the first of these columns."""
    top, total = rows[:, 0], rows[:, 1]
    shifted = logits.sub_(top[:, None])
    if grad_entropy is None:
        grad = shifted.exp_().mul_((-grad_logp / total)[:, None])
    else:
        shifted.clamp_(min=_FLOOR)
        slope = grad_entropy / total
        offset = slope * (rows[:, 3] / total) - grad_logp / total
        factor = torch.addcmul(offset[:, None], shifted, slope[:, None], value=-1)
        grad = shifted.exp_().mul_(factor)
    index, inside = _within(labels, logits.shape[1])
    return grad.scatter_add_(1, index[:, None], grad_logp.where(inside, 0)[:, None])


def _within(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Labels made safe as indices below `width`, and which of them needed nothing for it."""
    inside = (labels >= 0) & (labels < width)
    return labels.where(inside, 0), inside


def _add_mm_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where the total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
