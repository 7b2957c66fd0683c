"""The logits of an lm-head, a chunk of the vocabulary at a time.

Cut Cross-Entropy (Wijmans et al., arXiv 2411.09009) streams them twice, once for each direction. Where all logits of
the shard are small (KEPT_BYTES) they are kept instead, which saves a matrix product and changes no number.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

KEPT_BYTES = 64 * 2**20
VOCABULARY_CHUNK = 1024  # columns of the lm-head that are computed at once
_LOG2_E = 1 / math.log(2)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is computed from logits: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def keeping(hidden: Tensor, weight: Tensor, needed: bool) -> list[Tensor] | None:
    """An empty list, to keep the logits in, where they are needed again and small enough; None where not."""
    size = hidden.shape[0] * weight.shape[0] * hidden.element_size()
    return [] if needed and size <= KEPT_BYTES else None


def logit_chunks(
    hidden: Tensor, weight: Tensor, temperature: float, chunk: int, kept: list[Tensor] | None
) -> Iterator[tuple[slice, Tensor]]:
    """(columns, logits [N, columns] / temperature) over the vocabulary; the next chunk overwrites the logits.

    The product has the inputs' dtype, as an lm-head's has; what follows is at least float32. An empty list `kept` is
    filled with the products; a full one stands in for them.
    """
    num_rows = weight.shape[0]
    wide = hidden.new_empty(hidden.shape[0], min(chunk, num_rows), dtype=wide_dtype(hidden.dtype))
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


def exp_(exponents: Tensor) -> Tensor:
    """e^x in place. As a power of two, which on the CPU takes torch less than half the time."""
    return exponents.mul_(_LOG2_E).exp2_()


def add_mm_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where the total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        if left.is_cpu:
            # Without bfloat16 instructions torch is about twenty times as fast with the right factor by columns.
            right = right.t().contiguous().t()
        total.add_(left @ right)
