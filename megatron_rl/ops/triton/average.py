"""The update of an average of weights, of many tensors at once, as `ops/ema.py` defines it."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # numbers that a program updates
WARPS = 16
_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def ema_update_(
    averages: Sequence[Tensor], weights: Sequence[Tensor], copies: Sequence[Tensor] | None, decay: float
) -> None:
    """One launch for the whole list, whose tensors are contiguous and of the same dtypes.

    The addresses go to the GPU as a table, and so does which part of which tensor each program has.
    """
    tensors = list(zip(averages, weights, averages if copies is None else copies, strict=True))
    for group in tensors:
        assert all(tensor.is_contiguous() for tensor in group), "tensors of an average lie in one piece"
        assert [tensor.dtype for tensor in group] == [tensor.dtype for tensor in tensors[0]], "dtypes are mixed"
    if not tensors:
        return
    average, weight, copy = tensors[0]
    numbers = [[*(tensor.data_ptr() for tensor in group), group[0].numel()] for group in tensors]
    table = torch.tensor(numbers, dtype=torch.int64, device=average.device)
    parts = [triton.cdiv(row[3], BLOCK) for row in numbers]
    arguments: dict[str, Any] = {"rate": 1 - decay}
    if not sum(parts):
        return
    update_kernel[(sum(parts),)](
        table,
        _parts(table[:, 3], sum(parts)),
        **arguments,
        AVERAGE=_TYPES[average.dtype],
        WEIGHT=_TYPES[weight.dtype],
        COPY=_TYPES[copy.dtype],
        COPYING=copies is not None,
        # Parts of a flat buffer may start anywhere, and wide loads must not.
        ALIGNED=all(address % 16 == 0 for row in numbers for address in row[:3]),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def _parts(sizes: Tensor, count: int) -> Tensor:
    """(tensor, start) [count, 2] of the programs, of tensors of so many numbers; made where the sizes are."""
    parts = (sizes + BLOCK - 1) // BLOCK
    tensors = torch.arange(len(sizes), device=sizes.device).repeat_interleave(parts, output_size=count)
    before = (parts.cumsum(0) - parts)[tensors]
    return torch.stack([tensors, (torch.arange(count, device=sizes.device) - before) * BLOCK], 1)


@triton.jit
def _lerp(average, weight, rate):
    """As torch's lerp: exact at both ends."""
    step = weight - average
    return tl.where(rate < 0.5, average + rate * step, weight - step * (1 - rate))


@triton.jit
def update_kernel(
    addresses_ptr,
    parts_ptr,
    rate: tl.float64,
    AVERAGE: tl.constexpr,
    WEIGHT: tl.constexpr,
    COPY: tl.constexpr,
    COPYING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of one tensor."""
    part = tl.program_id(0).to(tl.int64)
    number = tl.load(parts_ptr + part * 2)
    start = tl.load(parts_ptr + part * 2 + 1)
    row = addresses_ptr + number * 4
    average_ptr = tl.load(row).to(tl.pointer_type(AVERAGE))
    weight_ptr = tl.load(row + 1).to(tl.pointer_type(WEIGHT))
    copy_ptr = tl.load(row + 2).to(tl.pointer_type(COPY))
    size = tl.load(row + 3)
    rate = tl.full((), rate, AVERAGE)
    if ALIGNED:
        average_ptr = tl.multiple_of(average_ptr, 16)
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        copy_ptr = tl.multiple_of(copy_ptr, 16)
    places = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        average = tl.load(average_ptr + places).to(AVERAGE)
        average = _lerp(average, tl.load(weight_ptr + places).to(AVERAGE), rate)
        tl.store(average_ptr + places, average)
        if COPYING:
            tl.store(copy_ptr + places, average.to(tl.float32).to(COPY))
    else:
        inside = places < size
        average = tl.load(average_ptr + places, mask=inside, other=0.0).to(AVERAGE)
        average = _lerp(average, tl.load(weight_ptr + places, mask=inside, other=0.0).to(AVERAGE), rate)
        tl.store(average_ptr + places, average, mask=inside)
        if COPYING:
            tl.store(copy_ptr + places, average.to(tl.float32).to(COPY), mask=inside)
