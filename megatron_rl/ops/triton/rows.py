"""The statistics of whole rows of logits, as `ops/summary.py` defines them.

A group of tokens has its logits over the shard's columns in one buffer, by one matrix product. One kernel takes maxima
of blocks, from which the k largest are found; another reads each row once for its statistics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rl.ops.logit_stream import token_chunks, wide_dtype
from megatron_rl.ops.shard_part import ShardPart
from megatron_rl.ops.topk import first_places

BLOCK = 4096  # columns that a program holds at once
LIST_BLOCK = 128  # listed ids that it holds at once
WARPS = 8


def shard_part(
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
    """What `summary.torch_part` gives; `labels` and `indices` count from the shard's first row."""
    num_tokens, size, scale = hidden.shape[0], weight.shape[0], 1 / temperature
    wide = wide_dtype(hidden.dtype)
    labels, indices = labels.contiguous(), None if indices is None else indices.contiguous()
    rows = torch.empty(num_tokens, 5, dtype=wide, device=hidden.device)
    ids = torch.empty(num_tokens, min(k, size), dtype=torch.int64, device=hidden.device)
    largest = torch.empty_like(ids, dtype=wide)
    # What is listed, and lifted out of the sum; in an empty list there is nothing to lift.
    listed_ids = ids if indices is None else indices
    listed = largest if indices is None else torch.empty_like(indices, dtype=wide)
    for tokens, logits in token_chunks(hidden, weight, chunk, kept):
        if ids.shape[1]:
            ids[tokens] = largest_ids(logits, ids.shape[1])
            largest[tokens] = logits.gather(1, ids[tokens]).to(wide)
        row_statistics(
            logits, labels[tokens], rows[tokens], listed_ids[tokens], listed[tokens], scale=scale, entropy=entropy
        )
    width = 3 if not entropy else 5 if k or indices is not None else 4
    part = ShardPart(rows[:, :width], None, None, None if indices is None else listed * scale)
    return part.with_largest(largest * scale, ids, k) if k else part


def largest_ids(logits: Tensor, k: int) -> Tensor:
    """Columns [N, k] of the k largest logits of each row [N, V], by value and then by the smaller column; k <= V.

    Under that order each of them is in one of the k blocks with the largest maxima: an entry of another block is
    beaten by k maxima.
    """
    size = logits.shape[1]
    width = 16
    while width < 64 and width * width * k < size:
        width *= 2
    maxima = block_maxima(logits, width)
    blocks = first_places(maxima, min(k, maxima.shape[1])).sort(1).values
    columns = (blocks[:, :, None] * width + torch.arange(width, device=logits.device)).flatten(1)
    candidates = logits.gather(1, columns.clamp(max=size - 1)).to(maxima.dtype)
    # Beyond the last column there is nothing: a place there loses to -inf too, for it comes last.
    candidates = candidates.where(columns < size, -torch.inf)
    return columns.gather(1, first_places(candidates, k))


def block_maxima(logits: Tensor, width: int) -> Tensor:
    """The maxima [N, ceil(V / width)] of blocks of so many columns, a power of two."""
    rows, size = logits.shape
    maxima = torch.empty(rows, triton.cdiv(size, width), dtype=wide_dtype(logits.dtype), device=logits.device)
    if maxima.numel():
        grid = (rows, triton.cdiv(size, BLOCK))
        block_maxima_kernel[grid](
            logits, logits.stride(0), maxima, maxima.stride(0), size, WIDTH=width, BLOCK=BLOCK, num_warps=WARPS
        )
    return maxima


def row_statistics(
    logits: Tensor,
    labels: Tensor,
    rows: Tensor,
    ids: Tensor,
    listed: Tensor,
    *,
    scale: float,
    entropy: bool,
) -> None:
    """Fills `rows` [N, 5] with m, s, z_y, t and s over all columns of the scaled logits [N, V].

    s is without the columns `ids` [N, k], whose logits, not scaled, go to `listed` [N, k]; 0 for an id elsewhere.
    """
    if not len(logits):
        return
    arguments: dict[str, Any] = {"scale": scale, "least": torch.finfo(rows.dtype).min}
    row_statistics_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        labels,
        rows,
        ids,
        listed,
        logits.shape[1],
        ids.shape[1],
        **arguments,
        ENTROPY=entropy,
        LISTING=ids.shape[1] > 0,
        BLOCK=BLOCK,
        LIST_BLOCK=LIST_BLOCK,
        num_warps=WARPS,
    )


@triton.jit
def block_maxima_kernel(logits_ptr, stride, maxima_ptr, maxima_stride, size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    wide = maxima_ptr.dtype.element_ty
    if start + BLOCK <= size:
        logits = tl.load(logits_ptr + row * stride + columns).to(wide)
    else:
        logits = tl.load(logits_ptr + row * stride + columns, mask=columns < size, other=-float("inf")).to(wide)
    maxima = tl.max(tl.reshape(logits, (BLOCK // WIDTH, WIDTH)), 1)
    places = start // WIDTH + tl.arange(0, BLOCK // WIDTH)
    tl.store(maxima_ptr + row * maxima_stride + places, maxima, mask=places < tl.cdiv(size, WIDTH))


@triton.jit
def _joined(top, rest, moment, whole, logits, ENTROPY: tl.constexpr, LISTED: tl.constexpr):
    """The row (m, s, t, s over all) of a set of columns after more of them; into s go those that are not listed."""
    new_top = tl.maximum(top, tl.max(logits, 0))
    shift = top - new_top
    scale = tl.exp(shift)
    # As the torch path does: no product changes by the floor but 0 * inf.
    shifted = tl.maximum(logits - new_top, -1e4)
    exp = tl.exp(shifted)
    total = tl.sum(exp, 0)
    if ENTROPY:
        moment = (moment + shift * whole) * scale + tl.sum(shifted * exp, 0)
    rest = rest * scale
    if not LISTED:
        rest += total
    return new_top, rest, moment, whole * scale + total


@triton.jit
def row_statistics_kernel(
    logits_ptr,
    stride,
    labels_ptr,
    rows_ptr,
    ids_ptr,
    listed_ptr,
    size,
    k,
    scale: tl.float64,
    least: tl.float64,
    ENTROPY: tl.constexpr,
    LISTING: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):
    """One row. Listed logits are lifted out of it, so that the sum of the others is no difference, and put back."""
    row = tl.program_id(0).to(tl.int64)
    wide = rows_ptr.dtype.element_ty
    scale = tl.full((), scale, wide)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    label_logit = tl.load(logits_ptr + label, mask=(label >= 0) & (label < size), other=0.0).to(wide) * scale
    top = tl.full((), least, wide)
    rest = tl.zeros((), wide)
    moment = tl.zeros((), wide)
    whole = tl.zeros((), wide)
    if LISTING:
        for start in range(0, k, LIST_BLOCK):
            places = row * k + start + tl.arange(0, LIST_BLOCK)
            in_list = start + tl.arange(0, LIST_BLOCK) < k
            ids = tl.load(ids_ptr + places, mask=in_list, other=-1)
            here = (ids >= 0) & (ids < size)
            listed = tl.load(logits_ptr + ids, mask=here, other=-float("inf")).to(wide)
            tl.store(listed_ptr + places, tl.where(here, listed, 0.0), mask=in_list)
            top, rest, moment, whole = _joined(top, rest, moment, whole, listed * scale, ENTROPY, True)
            # Every thread has read before one writes.
            tl.debug_barrier()
            nothing = tl.full((LIST_BLOCK,), -float("inf"), wide)
            tl.store(logits_ptr + ids, nothing.to(logits_ptr.dtype.element_ty), mask=here)
        tl.debug_barrier()
    columns = tl.arange(0, BLOCK)
    in_blocks = size // BLOCK * BLOCK
    for start in range(0, in_blocks, BLOCK):
        logits = tl.load(logits_ptr + start + columns).to(wide) * scale
        top, rest, moment, whole = _joined(top, rest, moment, whole, logits, ENTROPY, False)
    if in_blocks < size:
        inside = in_blocks + columns < size
        logits = tl.load(logits_ptr + in_blocks + columns, mask=inside, other=-float("inf")).to(wide) * scale
        top, rest, moment, whole = _joined(top, rest, moment, whole, logits, ENTROPY, False)
    if LISTING:
        tl.debug_barrier()
        for start in range(0, k, LIST_BLOCK):
            places = row * k + start + tl.arange(0, LIST_BLOCK)
            ids = tl.load(ids_ptr + places, mask=start + tl.arange(0, LIST_BLOCK) < k, other=-1)
            here = (ids >= 0) & (ids < size)
            listed = tl.load(listed_ptr + places, mask=here)
            tl.store(logits_ptr + ids, listed.to(logits_ptr.dtype.element_ty), mask=here)
    rows_ptr += row * 5
    tl.store(rows_ptr, top)
    tl.store(rows_ptr + 1, rest)
    tl.store(rows_ptr + 2, label_logit)
    tl.store(rows_ptr + 3, moment)
    tl.store(rows_ptr + 4, whole)
