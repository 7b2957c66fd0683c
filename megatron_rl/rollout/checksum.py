"""A number that says whether two tensors on one kind of device are the same, bit for bit and in the same order."""

from functools import lru_cache

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

BLOCK = 1 << 15  # words that share a factor
BLOCKS = 256  # at once
# 2^64 over the golden ratio, as a signed number (Knuth, The Art of Computer Programming 3, 6.4).
STEP = 0x9E3779B97F4A7C15 - (1 << 64)


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """64 bits: XXH3 of a CPU's tensor, as fast as memory is read; a GPU's `sum_of_words`. Shapes are not looked at."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    return xxhash.xxh3_64_intdigest(data.numpy().data) if data.is_cpu else sum_of_words(data)


def sum_of_words(data: Tensor) -> int:
    """sum_k u_k sum_j w_j b_kj modulo 2^64; b_kj: word j of 64 bits in block k; u, w: odd numbers hashed from k and j.

    `data` [n] uint8, with zeros behind it where it does not fill the last word. The weights make the sum depend on the
    order. They mix the bits of the place, so that blocks which change places do not cancel as they can under weights
    linear in it. A change in one word is always seen; of two words that differ in their highest bit alone it is not.
    """
    if data.storage_offset() % 8 or len(data) % 8:
        data = F.pad(data, (0, -len(data) % 8)).clone()
    words = data.view(torch.int64)
    within, whole = _odd_numbers(0, BLOCK, data.device), len(words) // BLOCK
    blocks, rest = words[: whole * BLOCK].view(whole, BLOCK), words[whole * BLOCK :]
    sums = [(some * within).sum(1) for some in blocks.split(BLOCKS) if whole]
    # Whatever overflows wraps around, on every device.
    total = torch.cat([*sums, (rest * within[: len(rest)]).sum()[None]])
    return int((total * _odd_numbers(BLOCK, len(total), data.device)).sum())


@lru_cache(maxsize=256)
def _odd_numbers(start: int, count: int, device: torch.device) -> Tensor:
    place = torch.arange(start, start + count, device=device) * STEP
    return (place ^ (place >> 31)) | 1
