"""The logits of an lm-head, a chunk of the vocabulary at a time.

Cut Cross-Entropy (Wijmans et al., arXiv 2411.09009) streams them twice, once for each direction. Where all logits of
the shard are small (KEPT_BYTES) they are kept instead, which saves a matrix product and changes no number.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_rl.ops.products import add_mm_, factor_dtype, mm

KEPT_BYTES = 128 * 2**20
CPU_CHUNK, GPU_CHUNK = 512, 1024  # columns of the lm-head that are computed at once
TOKENS = 1024  # whose whole rows are in memory at once, on a GPU
_LOG2_E = 1 / math.log(2)


def vocabulary_chunk(device: torch.device) -> int:
    """A CPU is as fast with few columns; a GPU adds up the hidden states' gradient more often for them."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is computed from logits: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def keeping(hidden: Tensor, weight: Tensor, needed: bool) -> list[Tensor] | None:
    """An empty list, to keep the logits in, where they are needed again and small enough; None where not."""
    size = hidden.shape[0] * weight.shape[0] * hidden.element_size()
    return [] if needed and size <= KEPT_BYTES else None


def product_chunks(
    hidden: Tensor, weight: Tensor, chunk: int, kept: list[Tensor] | None
) -> Iterator[tuple[slice, Tensor]]:
    """(columns, hidden weight^T [N, columns]) over the vocabulary, in the inputs' dtype.

    An empty list `kept` is filled with the products; a full one stands in for them. Without a list the next chunk
    overwrites the product.
    """
    num_rows, factor = weight.shape[0], hidden.to(factor_dtype(hidden))
    buffer = hidden.new_empty(hidden.shape[0], min(chunk, num_rows)) if kept is None else None
    known = list(kept or [])
    for place, start in enumerate(range(0, num_rows, chunk)):
        columns = slice(start, min(start + chunk, num_rows))
        if buffer is not None:
            yield columns, mm(factor, weight[columns].t(), out=buffer[:, : columns.stop - start])
        elif known:
            yield columns, known[place]
        else:
            assert kept is not None
            kept.append(mm(factor, weight[columns].t(), out=hidden.new_empty(len(hidden), columns.stop - start)))
            yield columns, kept[-1]


def logit_chunks(
    hidden: Tensor, weight: Tensor, temperature: float, chunk: int, kept: list[Tensor] | None
) -> Iterator[tuple[slice, Tensor]]:
    """(columns, logits [N, columns] / temperature) over the vocabulary; the next chunk overwrites the logits.

    The product has the inputs' dtype, as an lm-head's has; what follows is at least float32. `kept` is that of
    `product_chunks`, and stays as it is.
    """
    dtype = wide_dtype(hidden.dtype)
    in_place = kept is None and dtype == hidden.dtype
    wide = None if in_place else hidden.new_empty(hidden.shape[0], min(chunk, weight.shape[0]), dtype=dtype)
    for columns, product in product_chunks(hidden, weight, chunk, kept):
        logits = product if wide is None else wide[:, : product.shape[1]].copy_(product)
        if temperature != 1.0:
            logits.mul_(1 / temperature)
        yield columns, logits


def token_chunks(
    hidden: Tensor, weight: Tensor, chunk: int, kept: list[Tensor] | None
) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, hidden[tokens] weight^T): whole rows of a few tokens, for kernels that read a row at once.

    The next tokens overwrite the product. An empty list `kept` is filled as by `product_chunks`, with parts of one
    product. Rows start at multiples of 16 elements, so that wide loads are aligned.
    """
    num_tokens, num_rows = hidden.shape[0], weight.shape[0]
    step = num_tokens if kept is not None else TOKENS
    buffer = hidden.new_empty(min(step, num_tokens), math.ceil(num_rows / 16) * 16)[:, :num_rows]
    for start in range(0, num_tokens, max(step, 1)):
        tokens = slice(start, min(start + step, num_tokens))
        yield tokens, torch.mm(hidden[tokens], weight.t(), out=buffer[: tokens.stop - start])
    if kept is not None:
        kept.extend(buffer.split(chunk, 1))


def exp_(exponents: Tensor) -> Tensor:
    """e^x in place. As a power of two, which on the CPU takes torch less than half the time."""
    return exponents.mul_(_LOG2_E).exp2_()


def exp_of(exponents: Tensor, out: Tensor | None = None) -> Tensor:
    """e^x as another tensor, in the same way."""
    return torch.mul(exponents, _LOG2_E, out=out).exp2_()


def head_gradients(
    chunks: Iterable[tuple[slice, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    size: int,
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of hidden and weight from (columns, gradient [N, columns] of hidden weight^T) over `size` rows.

    The weight's is added to `main_grad`, at least float32, where there is one, and not returned. All tokens are there
    at once, so each of its rows is rounded once.
    """
    grad_hidden = torch.zeros_like(hidden, dtype=wide_dtype(hidden.dtype))
    grad_weight = torch.empty_like(weight) if main_grad is None else None
    if grad_weight is not None:
        grad_weight[size:] = 0
    factor = hidden.to(factor_dtype(hidden))
    for columns, grad in chunks:
        left = grad.to(factor.dtype)
        if grad_weight is not None:
            mm(left.t(), factor, out=grad_weight[columns])
        elif main_grad is not None:
            add_mm_(main_grad[columns], left.t(), factor)
        add_mm_(grad_hidden, left, weight[columns].to(factor.dtype))
    return grad_hidden.to(hidden.dtype), grad_weight
