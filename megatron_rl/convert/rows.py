"""Which rows of Hugging Face tensors the rows of a Megatron tensor are.

The weight map of `models/hf_map.py`, unsharded, is a permutation of rows for every kind. Row by row, a tensor of any
size is read and written in blocks, in both directions.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_rl.models.hf_map import FUSED_QKV, GATED_LINEAR, VOCABULARY, Heads, Kind


class Run(NamedTuple):
    """`rows` rows from row `start` of Hugging Face tensor number `source` on are those from row `at` on here."""

    source: int
    start: int
    at: int
    rows: int


def runs(kind: Kind, rows: int, heads: Heads) -> tuple[Run, ...]:
    """All rows of a Megatron tensor of `rows` rows, in order. Those that no run covers are zero: padding."""
    if kind is VOCABULARY:
        return (Run(0, 0, 0, heads.vocab_size),)
    if kind is GATED_LINEAR:
        half = rows // 2
        return (Run(0, 0, 0, half), Run(1, 0, half, half))
    if kind is FUSED_QKV:
        return tuple(_grouped(heads))
    return (Run(0, 0, 0, rows),)


def _grouped(heads: Heads) -> Iterator[Run]:
    """Per query group its query heads, its key head, its value head."""
    queries, size = heads.num_heads // heads.num_kv_heads * heads.head_dim, heads.head_dim
    for group in range(heads.num_kv_heads):
        at = group * (queries + 2 * size)
        yield Run(0, group * queries, at, queries)
        yield Run(1, group * size, at + queries, size)
        yield Run(2, group * size, at + queries + size, size)


def clipped(parts: Sequence[Run], start: int, stop: int) -> Iterator[Run]:
    """Of the runs what lies in rows [start, stop) of the Megatron tensor."""
    for run in parts:
        first, last = max(start, run.at), min(stop, run.at + run.rows)
        if first < last:
            yield Run(run.source, run.start + first - run.at, first, last - first)


def of_source(parts: Sequence[Run], source: int, start: int, stop: int) -> Iterator[Run]:
    """Of the runs what lies in rows [start, stop) of Hugging Face tensor number `source`."""
    for run in parts:
        first, last = max(start, run.start), min(stop, run.start + run.rows)
        if run.source == source and first < last:
            yield Run(source, first, run.at + first - run.start, last - first)


def blocks(rows: int, row_bytes: int, limit: int, parts: int = 1) -> Iterator[tuple[int, int]]:
    """[start, stop) of blocks of at most `limit` bytes (and at least a row), none across the border of a part."""
    size, step = rows // parts, max(1, limit // max(row_bytes, 1))
    for first in range(0, rows, size):
        for start in range(first, first + size, step):
            yield start, min(start + step, first + size)
