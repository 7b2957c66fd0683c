"""Tensors into the files of a checkpoint, in chunks that suit a layout: jobs of one file each."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.checkpoint.manifest import Entry, HashedFile, measure
from megatron_rl.checkpoint.scratch import room
from megatron_rl.checkpoint.torch_dist import Chunk, Region, Spec
from megatron_rl.convert.jobs import Job, Receipt
from megatron_rl.convert.rows import blocks
from megatron_rl.convert.tensors import Tensors

FILE_BYTES = 2**27  # a file holds whole tensors; a larger one has a file of its own


@dataclass(frozen=True, slots=True)
class Part:
    """One layer's tensor under its key in the checkpoint, and how it is cut. Another `group` has files of its own."""

    key: str
    index: tuple[int, ...]
    spec: Spec  # without the stack
    row_parts: int
    column_parts: int
    group: tuple[int, ...]


class File(NamedTuple):
    """A file of the checkpoint to be."""

    name: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.spec.nbytes for part in self.parts)


def files_of(parts: Sequence[Part]) -> list[File]:
    """Whole tensors, a group behind the other and within it in their order, a file for every `FILE_BYTES`."""
    filled: list[list[Part]] = []
    size = 0
    for part in sorted(parts, key=lambda part: part.group):
        if not filled or filled[-1][0].group != part.group or size + part.spec.nbytes > FILE_BYTES:
            filled.append([])
            size = 0
        filled[-1].append(part)
        size += part.spec.nbytes
    return [File(f"__0_{number}.distcp", tuple(held)) for number, held in enumerate(filled)]


def regions(part: Part, limit: int) -> Iterator[tuple[int, int, list[Region]]]:
    """Rows [start, stop) that are read at once, and the regions of the whole tensor that they are written as."""
    rows, *columns = part.spec.shape
    ones = (1,) * len(part.index)
    for start, stop in blocks(rows, part.spec.row_bytes, limit, part.row_parts):
        if not columns:
            yield start, stop, [Region((*part.index, start), (*ones, stop - start))]
            continue
        width = columns[0] // part.column_parts
        yield (
            start,
            stop,
            [
                Region((*part.index, start, number * width), (*ones, stop - start, width))
                for number in range(part.column_parts)
            ],
        )


def write_file(directory: Path, file: File, source: Tensors, limit: int) -> Receipt:
    """Writes one file to the disk; its size and hash, and where its chunks lie, in the order of `regions`."""
    places: list[tuple[int, int]] = []
    with (directory / file.name).open("wb") as opened:
        stream = HashedFile(opened)
        for part in file.parts:
            for start, stop, cut in regions(part, limit):
                block = room("block", (stop - start, *part.spec.shape[1:]), part.spec.dtype)
                source.read(part.key, part.index, start, stop, block)
                for region in cut:
                    places.append(_save(stream, block, part, region))
        stream.flush()
        os.fsync(opened.fileno())
    return {**stream.entry()._asdict(), "chunks": places}


def _save(stream: HashedFile, block: Tensor, part: Part, region: Region) -> tuple[int, int]:
    """Where a region of a block of rows lies once it is saved: offset and length."""
    begin = stream.tell()
    if part.column_parts > 1:
        columns = block[:, region.offset[-1] : region.offset[-1] + region.sizes[-1]]
        block = room("columns", tuple(columns.shape), columns.dtype).copy_(columns)
    torch.save(block.view(region.sizes), stream)  # type: ignore[arg-type]
    return begin, stream.tell() - begin


def jobs(directory: Path, files: Sequence[File], run: Callable[[File], Receipt]) -> list[Job]:
    """A job per file; done is what has the size and the hash that were noted."""
    # The manifest's SHA-256 covers every byte.
    torch.serialization.set_crc32_options(False)
    return [Job(file.name, file.nbytes, partial(run, file), partial(_is_whole, directory, file)) for file in files]


def _is_whole(directory: Path, file: File, receipt: Receipt) -> bool:
    path = directory / file.name
    return path.is_file() and measure(directory, [file.name])[file.name] == Entry(receipt["bytes"], receipt["sha256"])


def chunks_of(files: Sequence[File], receipts: Sequence[Receipt], limit: int) -> dict[str, list[Chunk]]:
    """The chunks of every tensor, from what was noted of the files."""
    found: dict[str, list[Chunk]] = {}
    for file, receipt in zip(files, receipts, strict=True):
        places = iter(receipt["chunks"])
        for part in file.parts:
            for _, _, cut in regions(part, limit):
                found.setdefault(part.key, []).extend(Chunk(region, file.name, *next(places)) for region in cut)
    return found
