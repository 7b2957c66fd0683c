"""Means over the sequences of a packed batch, of the tokens that count."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.ops.dispatch import uses_triton


def segment_mean(values: Tensor, mask: Tensor, bounds: Tensor) -> Tensor:
    """The mean [S] of the values in each segment where the mask is true; 0 where it is nowhere.

    `values` and `mask` (bool) are [N]. Segment i is [bounds[i], bounds[i + 1]), where `bounds` [S + 1] int64 go from 0
    to N and do not decrease. What is masked may be nan, and has the gradient 0. float64 for float64, otherwise float32.
    """
    assert values.shape == mask.shape and values.ndim == 1, (values.shape, mask.shape)
    assert mask.dtype == torch.bool, mask.dtype
    return _SegmentMean.apply(values, mask, bounds)


class _SegmentMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, bounds: Tensor) -> Tensor:
        wide = torch.promote_types(values.dtype, torch.float32)
        if uses_triton(values):
            from megatron_rl.ops.triton import segments

            means, counts = segments.means(values, mask, bounds, wide)
        else:
            counted = values.to(wide).where(mask, 0)
            sums, counts = (
                torch.segment_reduce(x, "sum", offsets=bounds, unsafe=True) for x in (counted, mask.to(wide))
            )
            counts.clamp_(min=1)
            means = sums / counts
        ctx.save_for_backward(mask, bounds, counts)
        ctx.dtype = values.dtype
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, bounds, counts = ctx.saved_tensors
        slopes = grad / counts
        if uses_triton(grad):
            from megatron_rl.ops.triton import segments

            return segments.spread(slopes, mask, bounds, ctx.dtype), None, None
        of_token = slopes.repeat_interleave(bounds.diff(), output_size=len(mask))
        return of_token.where(mask, 0).to(ctx.dtype), None, None
