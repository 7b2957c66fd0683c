"""The gradient of a chunk of logits in its place, as `ops/linear_stats.py` defines it."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns that a program holds at once
LIST_BLOCK = 128  # listed ids that it holds at once
WARPS = 4


def dlogits_(
    logits: Tensor,
    *,
    scale: float,
    top: Tensor,
    offset: Tensor,
    slope: Tensor | None,
    labels: Tensor,
    grad_logp: Tensor,
    ids: Tensor | None,
    listed: Tensor | None,
) -> Tensor:
    """The logits [N, V], not scaled, become their gradient, in their dtype.

    With z the scaled logits it is e^(z - top) (offset - slope (z - top)), then `listed` [N, k] in the columns `ids`
    [N, k], and `grad_logp` on top at the label. All others are [N]; ids and labels count from the first column, and may
    lie outside.
    """
    if not logits.numel():
        return logits
    arguments: dict[str, Any] = {"scale": scale}
    dlogits_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        top,
        offset,
        offset if slope is None else slope,
        labels,
        grad_logp,
        labels if ids is None else ids,
        top if listed is None else listed,
        logits.shape[1],
        0 if ids is None else ids.shape[1],
        **arguments,
        ENTROPY=slope is not None,
        LISTING=ids is not None and ids.shape[1] > 0,
        BLOCK=BLOCK,
        LIST_BLOCK=LIST_BLOCK,
        num_warps=WARPS,
    )
    return logits


@triton.jit
def _gradient(logits, columns, top, offset, slope, label, grad_logp, ENTROPY: tl.constexpr):
    shifted = logits - top
    factor = offset
    if ENTROPY:
        shifted = tl.maximum(shifted, -1e4)
        factor = offset - slope * shifted
    return tl.exp(shifted) * factor + tl.where(columns == label, grad_logp, 0.0)


@triton.jit
def dlogits_kernel(
    logits_ptr,
    stride,
    top_ptr,
    offset_ptr,
    slope_ptr,
    labels_ptr,
    grad_logp_ptr,
    ids_ptr,
    listed_ptr,
    size,
    k,
    scale: tl.float64,
    ENTROPY: tl.constexpr,
    LISTING: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    wide = top_ptr.dtype.element_ty
    narrow = logits_ptr.dtype.element_ty
    scale = tl.full((), scale, wide)
    logits_ptr += row * stride
    top = tl.load(top_ptr + row)
    offset = tl.load(offset_ptr + row)
    slope = tl.load(slope_ptr + row)
    label = tl.load(labels_ptr + row)
    grad_logp = tl.load(grad_logp_ptr + row)
    in_blocks = size // BLOCK * BLOCK
    for start in range(0, in_blocks, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + columns).to(wide) * scale
        grad = _gradient(logits, columns, top, offset, slope, label, grad_logp, ENTROPY)
        tl.store(logits_ptr + columns, grad.to(narrow))
    if in_blocks < size:
        columns = in_blocks + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + columns, mask=columns < size, other=-float("inf")).to(wide) * scale
        grad = _gradient(logits, columns, top, offset, slope, label, grad_logp, ENTROPY)
        tl.store(logits_ptr + columns, grad.to(narrow), mask=columns < size)
    if LISTING:
        # Written over, not added: a listed column has no part in the tail.
        tl.debug_barrier()
        for start in range(0, k, LIST_BLOCK):
            places = start + tl.arange(0, LIST_BLOCK)
            ids = tl.load(ids_ptr + row * k + places, mask=places < k, other=-1)
            listed = tl.load(listed_ptr + row * k + places, mask=places < k, other=0.0)
            listed += tl.where(ids == label, grad_logp, 0.0)
            tl.store(logits_ptr + ids, listed.to(narrow), mask=(ids >= 0) & (ids < size))
