"""Safetensors files whose place for every tensor is known before the first is written: jobs of some tensors each."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rl.checkpoint.scratch import room
from megatron_rl.checkpoint.torch_dist import Spec, as_bytes
from megatron_rl.convert.jobs import Job, Receipt
from megatron_rl.convert.rows import blocks
from megatron_rl.convert.tensors import NAMES, Tensors

JOB_BYTES = 2**27
# Threads that write to one file wait for each other in the kernel, and spin there.
_writing = threading.Lock()


class Target(NamedTuple):
    """Where a tensor's bytes come to lie."""

    file: str
    offset: int
    spec: Spec


def layout(specs: Mapping[str, Spec], max_shard_size: int) -> dict[str, Target]:
    """Tensors in order into files of at most `max_shard_size` bytes; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    count = len(shards)
    found = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        offset = len(_header({name: specs[name] for name in names}))
        for name in names:
            found[name] = Target(file, offset, specs[name])
            offset += specs[name].nbytes
    return found


def _header(specs: Mapping[str, Spec]) -> bytes:
    """The beginning of a safetensors file: the length of a JSON text, and that text, padded to 8 bytes."""
    held: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        held[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(held, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def make(directory: Path, targets: Mapping[str, Target]) -> None:
    """The files in their full size, with their headers; what is already in them stays."""
    by_file: dict[str, dict[str, Spec]] = {}
    for name, target in targets.items():
        by_file.setdefault(target.file, {})[name] = target.spec
    for file, specs in by_file.items():
        header = _header(specs)
        descriptor = os.open(directory / file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, header, 0)
            os.ftruncate(descriptor, len(header) + sum(spec.nbytes for spec in specs.values()))
        finally:
            os.close(descriptor)


def jobs(directory: Path, view: Tensors, targets: Mapping[str, Target], limit: int) -> list[Job]:
    """Tensors that lie side by side, `JOB_BYTES` of them at a time."""
    groups: list[list[str]] = []
    size = 0
    for name, target in targets.items():
        if not groups or size + target.spec.nbytes > JOB_BYTES or targets[groups[-1][0]].file != target.file:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += target.spec.nbytes
    return [
        Job(
            group[0],
            sum(targets[name].spec.nbytes for name in group),
            partial(_write, directory, view, targets, group, limit),
            lambda _: True,  # it was on the disk before it was noted
        )
        for group in groups
    ]


def _write(directory: Path, view: Tensors, targets: Mapping[str, Target], names: Sequence[str], limit: int) -> Receipt:
    """Writes tensors of one file to the disk."""
    descriptor = os.open(directory / targets[names[0]].file, os.O_RDWR)
    try:
        for name in names:
            _, offset, spec = targets[name]
            for start, stop in blocks(spec.shape[0], spec.row_bytes, limit):
                block = room("block", (stop - start, *spec.shape[1:]), spec.dtype)
                view.read(name, (), start, stop, block)
                with _writing:
                    write_bytes(descriptor, as_bytes(block), offset + start * spec.row_bytes)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
    return {}


def write_bytes(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
