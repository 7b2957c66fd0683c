"""The linear recurrence along packed sequences, as `ops/scan.py` defines it: a program per sequence, in blocks."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # tokens that a program scans at once
WARPS = 8


def decayed_sum(values: Tensor, places: Tensor, decay: float, reverse: bool) -> Tensor:
    """y_t = x_t + decay y_{t-1}, or y_{t+1} in `reverse`, [N]; a sequence starts where `places` [N] is 0."""
    total = torch.empty_like(values, memory_format=torch.contiguous_format)
    starts = (places == 0).nonzero()[:, 0]
    if not len(starts):
        return total
    bounds = torch.cat([starts, starts.new_full((1,), len(places))])
    arguments: dict[str, Any] = {"decay": decay}
    scan_kernel[(len(starts),)](
        values.contiguous(), total, bounds, **arguments, REVERSE=reverse, BLOCK=BLOCK, num_warps=WARPS
    )
    return total


@triton.jit
def _after(decay, total, next_decay, next_total):
    """Two steps y -> decay y + total as one."""
    return decay * next_decay, next_decay * total + next_total


@triton.jit
def scan_kernel(values_ptr, total_ptr, bounds_ptr, decay: tl.float64, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """One sequence, in float64: power j of a decay that is rounded to float32 is off by j times as much."""
    sequence = tl.program_id(0)
    start = tl.load(bounds_ptr + sequence)
    stop = tl.load(bounds_ptr + sequence + 1)
    decays = tl.zeros((BLOCK,), tl.float64) + decay
    carry = tl.zeros((), tl.float64)
    steps = tl.arange(0, BLOCK)
    for done in range(0, stop - start, BLOCK):
        place = done + steps
        token = start + place
        if REVERSE:
            token = stop - 1 - place
        inside = place < stop - start
        values = tl.load(values_ptr + token, mask=inside, other=0.0).to(tl.float64)
        powers, total = tl.associative_scan((decays, values), 0, _after)
        total += powers * carry
        tl.store(total_ptr + token, total.to(total_ptr.dtype.element_ty), mask=inside)
        carry = tl.sum(tl.where(steps == BLOCK - 1, total, 0.0), 0)
