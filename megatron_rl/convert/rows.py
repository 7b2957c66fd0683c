"""Rows of tensors in blocks, and which rows of Hugging Face tensors they are."""

from collections.abc import Iterator, Sequence

from megatron_rl.models.hf_map import Run


def clipped(runs: Sequence[Run], start: int, stop: int) -> Iterator[Run]:
    """Of the runs what lies in rows [start, stop) of the Megatron tensor."""
    for run in runs:
        first, last = max(start, run.at), min(stop, run.at + run.rows)
        if first < last:
            yield Run(run.source, run.start + first - run.at, first, last - first)


def of_source(runs: Sequence[Run], source: int, start: int, stop: int) -> Iterator[Run]:
    """Of the runs what lies in rows [start, stop) of Hugging Face tensor number `source`."""
    for run in runs:
        first, last = max(start, run.start), min(stop, run.start + run.rows)
        if run.source == source and first < last:
            yield Run(source, first, run.at + first - run.start, last - first)


def blocks(rows: int, row_bytes: int, limit: int, parts: int = 1) -> Iterator[tuple[int, int]]:
    """[start, stop) of blocks of at most `limit` bytes (and at least a row), none across the border of a part."""
    size, step = rows // parts, max(1, limit // max(row_bytes, 1))
    for first in range(0, rows, size):
        for start in range(first, first + size, step):
            yield start, min(start + step, first + size)
