"""Sizes as people write them, and how `--max-memory` is shared."""

import re

from megatron_rl.convert.jobs import MOST_THREADS

UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
SMALLEST = 16 * 10**6
# Of a block there may be, at once: itself, its source in a type twice as wide, and a buffer of what is being hashed.
COPIES = 4
LARGEST_BLOCK = 2**25  # larger ones are no faster


def size(text: str) -> int:
    """Bytes: `300MB`, `5 GiB`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w*)\s*", text.upper())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no size: write 300MB, 5GB or 2GiB")
    return int(float(match[1]) * UNITS[match[2]])


def block_limit(max_memory: int) -> int:
    """Bytes of the rows that a thread has in hand."""
    if max_memory < SMALLEST:
        raise ValueError(f"--max-memory {max_memory} bytes is too little to work with: give at least {SMALLEST}")
    return min(max_memory // (MOST_THREADS * COPIES), LARGEST_BLOCK)
