"""Memory that a thread works in: taken once and used again, so that a conversion holds what it was allowed and no more.

Blocks given back to the allocator and taken again would stay with the process, and cost a page fault every 4 kB.
"""

import math
import mmap
import threading

import torch
from torch import Tensor

_held = threading.local()


def room(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor. It is this thread's until the thread asks for the same name again."""
    count = math.prod(shape)
    nbytes = max(count * dtype.itemsize, 1)
    buffers: dict[str, mmap.mmap] = _held.__dict__.setdefault("buffers", {})
    if name not in buffers or len(buffers[name]) < nbytes:
        buffers[name] = mmap.mmap(-1, nbytes)
    # As long as asked for: torch.save writes all of what a tensor's memory is.
    return torch.frombuffer(buffers[name], dtype=dtype, count=count).view(shape) if count else torch.empty(shape)
