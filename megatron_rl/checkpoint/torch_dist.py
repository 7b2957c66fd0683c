"""The files of megatron-core's sharded format, read and written without a model and without other processes.

`.metadata` says of every tensor its whole shape and which chunks of it lie where; each chunk was written by torch.save.
"""

import io
import math
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

import megatron_rl.parallel.device  # noqa: F401  (installs the CPU backend before megatron-core)
from megatron_rl.checkpoint.manifest import DamagedCheckpoint, check_pickle
from megatron_rl.checkpoint.scratch import room
from megatron_rl.checkpoint.writing import FORMAT, VERSION

# isort: split
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

DESCRIPTION, COMMON = ".metadata", "common.pt"


class Spec(NamedTuple):
    """A tensor's type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Region(NamedTuple):
    """A part of a whole tensor: where it begins, and how far it reaches, in every dimension."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    def volume(self) -> int:
        return math.prod(self.sizes)

    def common(self, other: "Region") -> "Region | None":
        """What lies in both."""
        first = tuple(map(max, self.offset, other.offset))
        ends = zip(self.offset, self.sizes, other.offset, other.sizes, strict=True)
        sizes = tuple(min(a + n, b + m) - start for (a, n, b, m), start in zip(ends, first, strict=True))
        return Region(first, sizes) if all(size > 0 for size in sizes) else None

    def inside(self, outer: "Region") -> tuple[slice, ...]:
        """As an index of a tensor that holds `outer`."""
        starts = (a - b for a, b in zip(self.offset, outer.offset, strict=True))
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


class Chunk(NamedTuple):
    """A region of a tensor, as torch.save wrote it to `length` bytes of a file."""

    region: Region
    file: str
    offset: int
    length: int


class SavedTensors:
    """The tensors of a checkpoint, whatever layout wrote them; only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_pickle(path / DESCRIPTION)
        held: Metadata = pickle.loads((path / DESCRIPTION).read_bytes())
        self.specs: dict[str, Spec] = {}
        self.chunks: dict[str, list[Chunk]] = {}
        for key, entry in held.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), "the description is of tensors only"
            self.specs[key] = Spec(entry.properties.dtype, tuple(entry.size))
            self.chunks[key] = []
            for chunk in entry.chunks:
                place = held.storage_data.get(MetadataIndex(key, chunk.offsets))
                if place is None:
                    raise DamagedCheckpoint(f"{path / DESCRIPTION} does not say where {key} at {chunk.offsets} lies")
                region = Region(tuple(chunk.offsets), tuple(chunk.sizes))
                self.chunks[key].append(Chunk(region, place.relative_path, place.offset, place.length))
        self._open: dict[str, io.FileIO] = {}
        self._begins: dict[Chunk, int] = {}
        self._layouts: dict[bytes, _Layout] = {}
        self._by_first = {key: _by_first(chunks) for key, chunks in self.chunks.items()}

    def check_whole(self, key: str) -> None:
        """Refuses a tensor of which a chunk is missing, or there twice."""
        spec, regions = self.specs[key], [chunk.region for chunk in self.chunks[key]]
        held, whole = sum(region.volume() for region in regions), math.prod(spec.shape)
        outside = any(
            start + size > end
            for region in regions
            for start, size, end in zip(region.offset, region.sizes, spec.shape, strict=True)
        )
        if held != whole or outside or len(set(regions)) != len(regions):
            raise DamagedCheckpoint(
                f"{self.path}: {key} {list(spec.shape)} has {whole} elements and the chunks in its description have "
                f"{held}: it was not saved by all ranks"
            )

    def files(self, keys: Sequence[str]) -> list[str]:
        """The files that the tensors lie in."""
        return sorted({chunk.file for key in keys for chunk in self.chunks[key]})

    def read(self, name: str, index: tuple[int, ...], start: int, stop: int, out: Tensor) -> None:
        """Fills `out` with rows [start, stop) of the tensor, or of the one at `index` of a stack, in `out`'s dtype."""
        rest = self.specs[name].shape[len(index) + 1 :]
        wanted = Region((*index, start, *(0 for _ in rest)), (*(1 for _ in index), stop - start, *rest))
        whole = out.view(wanted.sizes)
        for chunk in self._by_first[name].get(wanted.offset[0] if index else None, self.chunks[name]):
            part = wanted.common(chunk.region)
            if part is not None:
                self._read_part(name, chunk, part, whole[part.inside(wanted)])

    def _read_part(self, name: str, chunk: Chunk, part: Region, out: Tensor) -> None:
        """Reads a part of a chunk: at once where its bytes lie together, else index by index of a dimension."""
        begin, sizes = self._begin(name, chunk), chunk.region.sizes
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        for piece, target in _together(part, chunk.region, out):
            starts = (index.start for index in piece.inside(chunk.region))
            at = sum(start * stride for start, stride in zip(starts, strides, strict=True))
            same = target.dtype == self.specs[name].dtype and target.is_contiguous()
            raw = target if same else room("chunk", tuple(target.shape), self.specs[name].dtype)
            read_bytes(self._descriptor(chunk.file), raw, begin + at * raw.element_size())
            if not same:
                target.copy_(raw)

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            self._open.setdefault(file, io.FileIO(self.path / file))
        return self._open[file].fileno()

    def _begin(self, name: str, chunk: Chunk) -> int:
        """Where in its file the chunk's elements begin."""
        if chunk not in self._begins:
            held = io.BufferedReader(_Part(self._descriptor(chunk.file), chunk.offset, chunk.length), 4096)
            try:
                archive = torch._C.PyTorchFileReader(held)
                layout = self._layout(archive.get_record("data.pkl"), held)
                inside = archive.get_record_offset("data/0")  # type: ignore[attr-defined]
            except (pickle.UnpicklingError, RuntimeError) as error:
                reason = str(error).split("\n")[0]
                raise DamagedCheckpoint(f"{self.path / chunk.file} has no tensor for {name}: {reason}") from error
            dtype = self.specs[name].dtype
            if layout.spec != Spec(dtype, chunk.region.sizes) or not layout.contiguous:
                raise DamagedCheckpoint(
                    f"{self.path / chunk.file} holds {layout.spec.dtype} {list(layout.spec.shape)} where its "
                    f"description has {dtype} {list(chunk.region.sizes)} of {name}"
                )
            self._begins[chunk] = chunk.offset + inside + layout.skipped * dtype.itemsize
        return self._begins[chunk]

    def _layout(self, text: bytes, held: Any) -> "_Layout":
        """What torch makes of a tensor's pickled `text`, without its bytes. Chunks of one shape have the same text."""
        if text not in self._layouts:
            held.seek(0)
            with FakeTensorMode():
                fake: Tensor = torch.load(held, weights_only=True)
            spec = Spec(fake.dtype, tuple(fake.shape))
            self._layouts[text] = _Layout(spec, fake.is_contiguous(), int(fake.storage_offset()))
        return self._layouts[text]


class _Layout(NamedTuple):
    """How a tensor's elements lie in its memory: after `skipped` others, and in order, if it is contiguous."""

    spec: Spec
    contiguous: bool
    skipped: int


def _by_first(chunks: Sequence[Chunk]) -> dict[int | None, list[Chunk]]:
    """The chunks by their place in the first dimension, a layer; nothing where one spans several."""
    found: dict[int | None, list[Chunk]] = {}
    for chunk in chunks:
        if chunk.region.sizes[0] != 1:
            return {}
        found.setdefault(chunk.region.offset[0], []).append(chunk)
    return found


def _together(part: Region, outer: Region, out: Tensor) -> Iterator[tuple[Region, Tensor]]:
    """Cuts a part of `outer` into pieces that are contiguous there, with the views of `out` that they fill."""
    cut = max((axis for axis, size in enumerate(part.sizes) if size != outer.sizes[axis]), default=0)
    splits = [axis for axis in range(cut) if part.sizes[axis] > 1]
    if not splits:
        yield part, out
        return
    axis = splits[0]
    for step in range(part.sizes[axis]):
        offset = (*part.offset[:axis], part.offset[axis] + step, *part.offset[axis + 1 :])
        piece = Region(offset, (*part.sizes[:axis], 1, *part.sizes[axis + 1 :]))
        yield from _together(piece, outer, out.narrow(axis, step, 1))


class _Part(io.RawIOBase):
    """Some bytes of an open file, as a file; read at a position of its own, so that threads may share the file."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self._length - self._at)
        count = os.preadv(self._descriptor, [memoryview(buffer)[:count]], self._offset + self._at) if count > 0 else 0
        self._at += count
        return count


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_bytes(descriptor: int, out: Tensor, offset: int) -> None:
    """Fills a contiguous tensor with the bytes of a file from `offset` on."""
    view = as_bytes(out)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise DamagedCheckpoint(f"{os.readlink(f'/proc/self/fd/{descriptor}')} ends before its tensors do")
        done += count


def write_description(directory: Path, specs: Mapping[str, Spec], chunks: Mapping[str, Sequence[Chunk]]) -> None:
    """What makes a directory of chunks a checkpoint of tensors; the same bytes for the same chunks."""
    tensors: dict[str, STORAGE_TYPES] = {
        key: TensorStorageMetadata(
            TensorProperties(dtype=spec.dtype),
            torch.Size(spec.shape),
            [
                ChunkStorageMetadata(torch.Size(chunk.region.offset), torch.Size(chunk.region.sizes))
                for chunk in chunks[key]
            ],
        )
        for key, spec in specs.items()
    }
    places = {
        MetadataIndex(key, chunk.region.offset): _StorageInfo(chunk.file, chunk.offset, chunk.length)
        for key in specs
        for chunk in chunks[key]
    }
    held = Metadata(tensors, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    (directory / DESCRIPTION).write_bytes(pickle.dumps(held))
    save_config(CheckpointingConfig(FORMAT, VERSION), str(directory))
