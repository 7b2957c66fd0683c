"""Checkpoints that a run continues from: megatron-core's sharded format, written whole or not at all.

A checkpoint is a directory `step_00000012` with the sharded tensors of every role, and `state.json` with what is not a
tensor. It is written beside its place and renamed; the file `latest` moves last, so an interrupted save leaves the
previous checkpoint in force.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

import megatron_rl.parallel.device  # noqa: F401  (installs the CPU backend before megatron-core)

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.dist_checkpointing.validation import StrictHandling


class Role(Protocol):
    """A trained model: its sharded state, and how to take it back."""

    def sharded_state(self, *, loading: bool) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class CheckpointStore:
    """The checkpoints of one run, the newest `keep` of them."""

    def __init__(self, directory: str | Path, keep: int) -> None:
        self.directory, self.keep = Path(directory), keep

    def latest(self) -> Path | None:
        """The checkpoint to continue from, if there is one."""
        pointer = self.directory / "latest"
        if not pointer.is_file():
            return None
        path = self.directory / pointer.read_text().strip()
        if not (path / "state.json").is_file():
            raise ValueError(f"{pointer} names {path.name}, which is not a complete checkpoint")
        return path

    def save(self, step: int, roles: Mapping[str, Role], state: Mapping[str, Any]) -> None:
        """Collective. `state` is JSON, the same on every rank; rank 0 writes it."""
        final = self.directory / f"step_{step:08d}"
        partial = self.directory / f"{final.name}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        tensors = _subtrees(roles, loading=False)
        dist_checkpointing.save(tensors, str(partial))
        dist.barrier()
        if dist.get_rank() == 0:
            (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
            _sync_tree(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._point_at(final)
            self._drop_old()
        dist.barrier()

    def load(self, path: Path, roles: Mapping[str, Role]) -> dict[str, Any]:
        """Collective. Fills the roles and returns the JSON state; a tensor missing on either side is refused."""
        tensors = dist_checkpointing.load(_subtrees(roles, loading=True), str(path), strict=StrictHandling.RAISE_ALL)
        for name, role in roles.items():
            role.load_state(tensors[name])
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        return state

    def _point_at(self, path: Path) -> None:
        pointer = self.directory / "latest.partial"
        pointer.write_text(path.name + "\n")
        _sync(pointer)
        pointer.rename(self.directory / "latest")
        _sync(self.directory)

    def _drop_old(self) -> None:
        complete = sorted(p for p in self.directory.glob("step_*") if p.suffix != ".partial")
        for path in complete[: -self.keep]:
            shutil.rmtree(path)


def _subtrees(roles: Mapping[str, Role], *, loading: bool) -> dict[str, Any]:
    """Each role's sharded state, its tensors named after the role, so that two models can share a checkpoint."""
    trees = {name: role.sharded_state(loading=loading) for name, role in roles.items()}
    for name, tree in trees.items():
        add_prefix_for_sharding(tree, f"{name}.")
    return trees


def _sync(path: Path) -> None:
    """Waits until the disk holds it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _sync(path)
