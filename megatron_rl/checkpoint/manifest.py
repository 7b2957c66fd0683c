"""What the files of a checkpoint must be: sizes and SHA-256, so that a damaged one is refused by its name."""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from megatron_rl.metrics.progress import tick
from megatron_rl.types import RunError

MANIFEST = "manifest.json"

# What torch's description of sharded tensors is made of. It is a pickle, and a pickle can call anything. Values that
# are pickles themselves (BytesStorageMetadata) are not among them: torch would load those without a look.
DESCRIPTION = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
}


class DamagedCheckpoint(RunError):
    """A file of a checkpoint is missing, or is not what was written."""


class Entry(NamedTuple):
    """One file."""

    bytes: int
    sha256: str


class HashedFile:
    """A file that is written from its beginning to its end, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        self._bytes += memoryview(data).nbytes
        self._file.write(data)
        tick()
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._file.flush()

    def entry(self) -> Entry:
        return Entry(self._bytes, self._digest.hexdigest())


def files_of(directory: Path) -> list[str]:
    """The names of all files but the manifest, relative to the directory, in order."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != MANIFEST)


def measure(directory: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Reads the files, several at once: hashing leaves Python's lock alone."""

    def entry(name: str) -> tuple[str, Entry]:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            tick()
            return name, Entry(file.tell(), digest)

    with ThreadPoolExecutor(4) as threads:
        return dict(threads.map(entry, names))


def write_manifest(directory: Path, entries: Mapping[str, Entry]) -> None:
    """The list of files, and a hash of the list itself."""
    files = {name: entries[name]._asdict() for name in sorted(entries)}
    (directory / MANIFEST).write_text(json.dumps({"sha256": _digest(files), "files": files}, indent=1) + "\n")


def read_manifest(directory: Path) -> dict[str, Entry]:
    """What the files should be; refused where the list itself is damaged."""
    path = directory / MANIFEST
    try:
        held = json.loads(path.read_text())
        entries = {name: Entry(**entry) for name, entry in held["files"].items()}
        whole = held["sha256"] == _digest(held["files"])
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing, so {directory} is not a complete checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from error
    if not whole:
        raise DamagedCheckpoint(f"{path} is damaged: it does not match its own hash")
    return entries


def complaints(directory: Path, entries: Mapping[str, Entry], names: Iterable[str]) -> list[str]:
    """What is wrong with the files `names`, a sentence each."""
    found, present = [], []
    for name in names:
        path = directory / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif (size := path.stat().st_size) != entries[name].bytes:
            found.append(f"{path} has {size} bytes and was written with {entries[name].bytes}")
        else:
            present.append(name)
    measured = measure(directory, present)
    return found + [
        f"{directory / name} is not what was written: its SHA-256 differs"
        for name in present
        if measured[name] != entries[name]
    ]


def check_sizes(directory: Path) -> None:
    """Refuses, without reading the tensors, a checkpoint that lacks a file or has one of another size."""
    for name, entry in read_manifest(directory).items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise DamagedCheckpoint(complaints(directory, {name: entry}, [name])[0])


def sync(path: Path) -> None:
    """Waits until the disk holds it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Waits until the disk holds all that is in it."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def check_pickle(path: Path) -> None:
    """Refuses torch's `.metadata` where it asks for anything beside the description of tensors."""
    try:
        _Description(io.BytesIO(path.read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise DamagedCheckpoint(f"{path} is refused: {error}") from error


class _Description(pickle.Unpickler):
    """Knows the parts of a tensor's description, and nothing that could act."""

    def find_class(self, module: str, name: str) -> Any:
        kind = getattr(torch, name, None) if module == "torch" else None
        if name in DESCRIPTION.get(module, ()) or kind is torch.Size or isinstance(kind, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
