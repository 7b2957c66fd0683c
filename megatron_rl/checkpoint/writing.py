"""Sharded tensors on their way to the disk, in threads of the process that holds them.

megatron-core plans who writes what and forks processes that write it. When one of those dies, its parent waits for
ever, and when the parent is killed they live on; so the plan is megatron-core's and the writing is done here.
"""

import contextlib
import os
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

import megatron_rl.parallel.device  # noqa: F401  (installs the CPU backend before megatron-core)
from megatron_rl.checkpoint.manifest import Entry, HashedFile
from megatron_rl.parallel.collect import gather_over_world
from megatron_rl.types import RunError

# isort: split
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

FORMAT, VERSION = "torch_dist", 1
FILES_PER_RANK = 2

# A queue between processes is made even where none is used, by a helper process that outlives a kill.
assert hasattr(filesystem_async, "_get_write_results_queue"), "megatron-core's checkpoint writer has changed"
filesystem_async._get_write_results_queue = queue.SimpleQueue


class SaveError(RunError):
    """A checkpoint could not be written; what was saved before is as it was."""


@contextlib.contextmanager
def together(doing: str) -> Iterator[None]:
    """Work that may fail on one rank, for want of space or permission: then it fails on all, with the reason."""
    reason = None
    try:
        yield
    except OSError as error:
        reason = str(error)
    for rank, other in enumerate(gather_over_world([reason])):
        if other is not None:
            raise SaveError(f"{doing} failed on rank {rank}: {other}; free space or correct the permissions there")


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _disk_error(error) from error


def _disk_error(error: BaseException) -> OSError:
    """torch's zip writer turns a full disk into a RuntimeError about positions; what the system said is behind it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause if isinstance(cause, OSError) else OSError(str(error))


class _Plan(TorchDistSaveShardedStrategy):
    """Keeps what is to be written, instead of making a process of it."""

    writer: FileSystemWriterAsync
    description: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        self.writer, self.description = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


class ShardedWrite:
    """One tree of sharded tensors being written to a directory. Collective, but for `done`.

    With `copy`, the tensors may change as soon as this returns; without, only after `finish`.
    """

    def __init__(self, tree: dict[str, Any], directory: Path, *, copy: bool) -> None:
        self.directory = directory
        # The manifest's SHA-256 covers every byte; a checksum per tensor would double the time of a write.
        torch.serialization.set_crc32_options(False)
        sharded, common = save_preprocess(tree)
        with together(f"writing {directory}"), _disk_errors():
            TorchCommonSaveStrategy("torch", VERSION).save_common(common, str(directory))
        self._plan = _Plan(FORMAT, VERSION, thread_count=FILES_PER_RANK)
        self._plan.async_save(sharded, directory)
        buckets = FileSystemWriterAsync.preload_tensors(self._plan.writer.write_buckets or [], True)
        if copy:
            buckets = [(path, key, (texts, _copies(tensors))) for path, key, (texts, tensors) in buckets]
        self._threads = ThreadPoolExecutor(FILES_PER_RANK)
        self._parts: list[Future[Any]] = [
            self._threads.submit(_write, self._plan.writer.transforms, bucket) for bucket in buckets
        ]

    def done(self) -> bool:
        """Whether this rank has written its part, or failed to."""
        return all(part.done() for part in self._parts)

    def finish(self) -> dict[str, Entry]:
        """Waits for every rank's part, then writes their description; the files of the parts.

        SaveError where one could not be written.
        """
        written: list[Any] = []
        with together(f"writing {self.directory}"):
            written = [part.result() for part in self._parts]
        results = gather_over_world([[receipt for receipts, _ in written for receipt in receipts]])
        with together(f"writing {self.directory}"):
            if dist.get_rank() == 0:
                with _disk_errors():
                    self._plan.writer.finish(self._plan.description, results)
                save_config(CheckpointingConfig(FORMAT, VERSION), str(self.directory))
        self.close()
        return dict(gather_over_world([file for _, file in written]))

    def close(self) -> None:
        """Ends the threads, once they have written what they hold."""
        self._threads.shutdown()


def _copies(tensors: list[tuple[Any, Tensor]]) -> list[tuple[Any, Tensor]]:
    return [(item, tensor.clone()) for item, tensor in tensors]


def _write(transforms: Any, bucket: Any) -> tuple[list[Any], tuple[str, Entry]]:
    """Writes one file; torch's receipts for what is in it, and its size and hash."""
    path, name, (texts, tensors) = bucket
    with open(path, "wb") as file, _disk_errors():
        stream = HashedFile(file)
        receipts = [
            _write_item(transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)  # type: ignore[arg-type]
            for item, data in (*texts, *tensors)
        ]
        file.flush()
        os.fsync(file.fileno())
    return receipts, (name, stream.entry())
