"""A number that says whether two tensors are the same, bit for bit and in the same order."""

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements at once, so that what is held beside the tensor stays below 100 MiB
# 2^64 over the golden ratio, as a signed number (Knuth, The Art of Computer Programming 3, 6.4).
STEP = 0x9E3779B97F4A7C15 - (1 << 64)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """sum_i w_i b_i modulo 2^64: b_i the bits of element i, w_i an odd number hashed from i.

    The weights make it depend on the order. They mix the place's bits, so that swapping equal-sized blocks does not
    cancel as it would under weights linear in i. Shapes are not looked at.
    """
    flat = tensor.detach().contiguous().flatten().view(BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), CHUNK):
        bits = flat[start : start + CHUNK].long()
        place = torch.arange(start, start + bits.numel(), device=tensor.device) * STEP
        # Whatever overflows wraps around, on every device.
        total += (bits * ((place ^ (place >> 31)) | 1)).sum()
    return int(total.item())
