"""Matrix products whose factors and sums may differ in precision."""

import torch
from torch import Tensor


def factor_dtype(tensor: Tensor) -> torch.dtype:
    """What products of such tensors are computed in.

    On a CPU without instructions for bfloat16 torch multiplies it at a hundredth to a fifth of float32's rate, as the
    factors lie in memory. There they are widened, a piece at a time; results are rounded as ever.
    """
    if tensor.dtype != torch.bfloat16 or not tensor.is_cpu:
        return tensor.dtype
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def mm(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """left @ right, computed in the dtype of `left`, in `out`."""
    if left.dtype == out.dtype:
        return torch.mm(left, right.to(left.dtype), out=out)
    return out.copy_(left @ right.to(left.dtype))


def add_mm_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where the total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)
