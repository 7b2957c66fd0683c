"""A number that says whether two tensors are the same, bit for bit and in the same order."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 15  # words that share a factor
BLOCKS = 256  # at once on a GPU, whose matrix product takes no integers
# 2^64 over the golden ratio, as a signed number (Knuth, The Art of Computer Programming 3, 6.4).
STEP = 0x9E3779B97F4A7C15 - (1 << 64)


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """sum_k u_k sum_j w_j b_kj modulo 2^64; b_kj: word j of 64 bits in block k; u, w: odd numbers hashed from k and j.

    The weights make it depend on the order. They mix the bits of the place, so that blocks which change places do not
    cancel as they can under weights linear in it. A change in one word is always seen; of two words that differ in
    their highest bit alone it is not. Shapes are not looked at.
    """
    words = _words(tensor)
    within = _odd_numbers(0, BLOCK, tensor.device)
    whole = len(words) // BLOCK
    blocks, rest = words[: whole * BLOCK].view(whole, BLOCK), words[whole * BLOCK :]
    sums = [_products(some, within) for some in blocks.split(BLOCKS) if whole]
    # Whatever overflows wraps around, on every device.
    total = torch.cat([*sums, (rest * within[: len(rest)]).sum()[None]])
    return int((total * _odd_numbers(BLOCK, len(total), tensor.device)).sum())


def _words(tensor: Tensor) -> Tensor:
    """Its bits as int64 [n], with zeros behind them where they do not fill the last."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.storage_offset() % 8 or len(flat) % 8:
        flat = F.pad(flat, (0, -len(flat) % 8)).clone()
    return flat.view(torch.int64)


def _products(blocks: Tensor, within: Tensor) -> Tensor:
    return blocks @ within if blocks.is_cpu else (blocks * within).sum(1)


@lru_cache(maxsize=256)
def _odd_numbers(start: int, count: int, device: torch.device) -> Tensor:
    place = torch.arange(start, start + count, device=device) * STEP
    return (place ^ (place >> 31)) | 1
