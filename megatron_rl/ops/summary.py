"""A row of numbers for each token that says of its logits what any loss asks: one pass, and one collective.

With z = hidden weight^T / temperature, the statistics of a set of columns are

    m = max z,    s = sum e^(z - m),    z_y = z of the label (0 if it lies elsewhere),    t = sum (z - m) e^(z - m),

one row [m, s, z_y] or [m, s, z_y, t]. Rows merge over any partition of the vocabulary: over the chunks of a shard,
then, by one all-gather, over the shards. Where columns are listed (the k largest, or given ones), s runs over the
others only: their sum is the tail, which would be noise as a difference, 1 - sum of the listed probabilities. The lists
are k more columns of the row and k ids, and merge likewise. With lists and t the row ends with s over all columns,
which t needs to merge.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_rl.ops.dispatch import uses_triton
from megatron_rl.ops.logit_stream import exp_, exp_of, logit_chunks, wide_dtype
from megatron_rl.ops.shard_part import ShardPart
from megatron_rl.ops.topk import Given, Largest, Lost, Places, merge_largest
from megatron_rl.ops.vocab_shard import VocabShard

# e^-1e4 is 0 in every dtype, so a floor here changes no product (z - m) e^(z - m) but 0 * inf.
FLOOR = -1e4


class Summary(NamedTuple):
    """Of the logits over the whole vocabulary, per token [N], equal on all ranks of the shard."""

    top: Tensor  # m
    total: Tensor  # s over all columns
    rest: Tensor  # s over the columns that are not listed
    label: Tensor  # z_y
    moment: Tensor | None  # t, if asked for
    listed: Tensor | None  # [N, k] z at `indices`, or else of the k largest
    largest_ids: Tensor | None  # [N, k] int64, in order


def summarise(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: VocabShard,
    *,
    temperature: float,
    entropy: bool,
    k: int,
    indices: Tensor | None,
    chunk: int,
    kept: list[Tensor] | None,
) -> Summary:
    """The summary of softmax(hidden weight^T / temperature); arguments as for `linear_stats`."""
    local = (hidden, weight[: shard.size], labels - shard.start, None if indices is None else indices - shard.start)
    options: dict[str, Any] = {"temperature": temperature, "entropy": entropy, "k": k, "chunk": chunk, "kept": kept}
    if uses_triton(hidden):
        from megatron_rl.ops.triton.rows import shard_part

        return _merge_shards(shard, shard_part(*local, **options))
    return _merge_shards(shard, torch_part(*local, **options))


def torch_part(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    indices: Tensor | None,
    *,
    temperature: float,
    entropy: bool,
    k: int,
    chunk: int,
    kept: list[Tensor] | None,
) -> ShardPart:
    """`labels` [N] and `indices` [N, n] count from the shard's first row, and may lie outside."""
    wide = hidden.new_empty(hidden.shape[0], 0, dtype=wide_dtype(hidden.dtype))
    largest = Largest(wide, k) if k else None
    given = None if indices is None else Given(wide, Places(indices, weight.shape[0], chunk))
    chunks = logit_chunks(hidden, weight, temperature, chunk, kept)
    rows = _shard_rows(chunks, wide, labels, entropy, largest, given)
    part = ShardPart(rows, None, None, None if given is None else given.values)
    return part if largest is None else part.with_largest(largest.values, largest.ids, k)


def _shard_rows(
    chunks: Iterable[tuple[slice, Tensor]],
    wide: Tensor,
    labels: Tensor,
    entropy: bool,
    largest: Largest | None,
    given: Given | None,
) -> Tensor:
    """Statistics [N, 3 to 5] of one shard's columns. `labels` count from the shard's first row, and may lie outside."""
    least = torch.finfo(wide.dtype).min
    # The neutral row of the merge: a finite maximum where -inf would make nan.
    listing = largest is not None or given is not None
    rows = wide.new_zeros(wide.shape[0], 3 if not entropy else 5 if listing else 4)
    rows[:, 0] = least
    exponentials: Tensor | None = None  # as large as the first chunk
    for columns, logits in chunks:
        label_logit = at_labels(logits, labels - columns.start)
        top = logits.amax(1).clamp(min=least)
        taken = [entries.take(logits, columns) for entries in (largest, given) if entries is not None]
        logits.sub_(top[:, None])
        if entropy:
            exponentials = torch.empty_like(logits) if exponentials is None else exponentials
            exp = exp_of(logits.clamp_(min=FLOOR), out=exponentials[:, : logits.shape[1]])
            more = [logits.mul_(exp).sum(1)]
        else:
            exp, more = exp_(logits), []
        if taken:
            listed = (taken[-1].rows, taken[-1].columns)
            of_listed = top.new_zeros(len(top)).index_add_(0, listed[0], exp[listed]) if entropy else None
            exp[listed] = 0
        rest = exp.sum(1)
        more += [rest + of_listed] if taken and of_listed is not None else []
        rows = merge_rows(torch.stack([rows, torch.stack([top, rest, label_logit, *more], 1)]))
        if taken and taken[-1].lost is not None:
            _add_lost(rows, taken[-1].lost)
    lost = None if largest is None else largest.settle()
    if lost is not None and given is None:
        _add_lost(rows, lost)
    return rows


def _add_lost(rows: Tensor, lost: Lost) -> None:
    """What is not listed any more belongs to s again."""
    rows[lost.rows, 1] += (lost.values - rows[lost.rows, :1]).exp().sum(1)


def _merge_shards(shard: VocabShard, part: ShardPart) -> Summary:
    """One all-gather of the row, its lists, and the ids of the largest, whose bits travel as numbers."""
    rows, values, ids, given = part
    integers = torch.int64 if rows.dtype == torch.float64 else torch.int32
    parts = [rows]
    if values is not None and ids is not None:
        parts += [values, (ids + shard.start).clamp(max=2**31 - 1).to(integers).view(rows.dtype)]
    if given is not None:
        parts.append(given)
    gathered = list(shard.all_gather(torch.cat(parts, 1)).split([part.shape[1] for part in parts], -1))
    rows = merge_rows(gathered[0])
    listed = None
    rest = rows[:, 1]
    if ids is not None:
        listed, ids, losers = merge_largest(gathered[1], gathered[2].contiguous().view(integers).long())
        if given is None:
            rest = rest + (losers - rows[:, :1]).exp().sum(1)
    if given is not None:
        listed = gathered[-1].sum(0)
    total = rest if listed is None else rest + (listed - rows[:, :1]).exp().sum(1)
    moment = rows[:, 3] if rows.shape[1] > 3 else None
    return Summary(rows[:, 0], total, rest, rows[:, 2], moment, listed, ids)


def merge_rows(parts: Tensor) -> Tensor:
    """Statistics of a union [N, C] from those of its disjoint parts [P, N, C]."""
    tops, totals, label_logits = parts[..., :3].unbind(-1)
    top = tops.amax(0)
    shift = tops - top
    scale = shift.exp()
    columns = [top, (totals * scale).sum(0), label_logits.sum(0)]
    if parts.shape[-1] > 3:
        whole = parts[..., 4] if parts.shape[-1] == 5 else totals
        columns.append(((parts[..., 3] + shift * whole) * scale).sum(0))
    if parts.shape[-1] == 5:
        columns.append((parts[..., 4] * scale).sum(0))
    return torch.stack(columns, 1)


def at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits [N] at labels that count from the first of these columns; 0 where a label lies outside."""
    index, inside = within(labels, logits.shape[1])
    return logits.gather(1, index[:, None])[:, 0].where(inside, 0)


def within(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Labels made safe as indices below `width`, and which of them needed nothing for it."""
    inside = (labels >= 0) & (labels < width)
    return labels.where(inside, 0), inside
