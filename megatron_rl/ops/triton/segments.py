"""The means over segments and their gradient, as `ops/segments.py` defines them: a program per segment."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tokens that a program holds at once
WARPS = 4


def means(values: Tensor, mask: Tensor, bounds: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(means [S], counts [S], at least 1)."""
    mean = torch.empty(len(bounds) - 1, dtype=dtype, device=values.device)
    counts = torch.empty_like(mean)
    if len(mean):
        arguments = (values.contiguous(), mask.contiguous().view(torch.uint8), bounds, mean, counts)
        mean_kernel[(len(mean),)](*arguments, BLOCK=BLOCK, num_warps=WARPS)
    return mean, counts


def spread(slopes: Tensor, mask: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """The slope of its segment for each token [N] that counts, 0 for the others."""
    grad = torch.empty(len(mask), dtype=dtype, device=slopes.device)
    if len(slopes):
        arguments = (slopes.contiguous(), mask.contiguous().view(torch.uint8), bounds, grad)
        spread_kernel[(len(slopes),)](*arguments, BLOCK=BLOCK, num_warps=WARPS)
    return grad


@triton.jit
def mean_kernel(values_ptr, mask_ptr, bounds_ptr, means_ptr, counts_ptr, BLOCK: tl.constexpr):
    """One segment."""
    segment = tl.program_id(0)
    stop = tl.load(bounds_ptr + segment + 1)
    wide = means_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), wide)
    count = tl.zeros((BLOCK,), wide)
    for start in range(tl.load(bounds_ptr + segment), stop, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        counts = tl.load(mask_ptr + tokens, mask=tokens < stop, other=0) != 0
        values = tl.load(values_ptr + tokens, mask=tokens < stop, other=0.0).to(wide)
        # Not multiplied by the mask: nan is no number to be multiplied away.
        total += tl.where(counts, values, 0.0)
        count += tl.where(counts, 1.0, 0.0).to(wide)
    number = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(means_ptr + segment, tl.sum(total, 0) / number)
    tl.store(counts_ptr + segment, number)


@triton.jit
def spread_kernel(slopes_ptr, mask_ptr, bounds_ptr, grad_ptr, BLOCK: tl.constexpr):
    """One segment."""
    segment = tl.program_id(0)
    stop = tl.load(bounds_ptr + segment + 1)
    slope = tl.load(slopes_ptr + segment)
    for start in range(tl.load(bounds_ptr + segment), stop, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        counts = tl.load(mask_ptr + tokens, mask=tokens < stop, other=0) != 0
        tl.store(grad_ptr + tokens, tl.where(counts, slope, 0.0).to(grad_ptr.dtype.element_ty), mask=tokens < stop)
