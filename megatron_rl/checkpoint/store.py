"""Checkpoints that a run continues from: megatron-core's sharded format, written whole or not at all.

A checkpoint is a directory `step_00000012` with the sharded tensors of every role, and `state.json` with what is not a
tensor. It is written beside its place and renamed; the file `latest` moves last, so an interrupted save leaves the
previous checkpoint in force.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

import megatron_rl.parallel.device  # noqa: F401  (installs the CPU backend before megatron-core)

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.dist_checkpointing.validation import StrictHandling

STATE = "state.json"


class Role(Protocol):
    """A trained model: what it is, its sharded state, and how to take it back."""

    def identity(self) -> dict[str, Any]: ...

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
        if not (path / STATE).is_file():
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
            identities = {name: role.identity() for name, role in roles.items()}
            (partial / STATE).write_text(json.dumps({"step": step, "models": identities, **state}, indent=1))
            _sync_tree(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._point_at(final)
            self._drop_old()
        dist.barrier()

    def load(self, path: Path, roles: Mapping[str, Role]) -> dict[str, Any]:
        """Collective. Fills the roles and returns the JSON state; a tensor missing on either side is refused."""
        for name, role in roles.items():
            check_model(path, name, role.identity())
        tensors = _load(path, _subtrees(roles, loading=True), StrictHandling.RAISE_ALL)
        for name, role in roles.items():
            role.load_state(tensors[name])
        return read_state(path)

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


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` is, or the latest of the run directory that it is."""
    path = Path(path)
    if (path / STATE).is_file():
        return path
    latest = CheckpointStore(path / "checkpoints", keep=1).latest()
    if latest is None:
        raise ValueError(f"model.weights={str(path)!r} is neither 'pretrained' nor 'random' nor a run with checkpoints")
    return latest


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def check_model(path: Path, role: str, identity: Mapping[str, Any]) -> None:
    """Refuses the checkpoint of another model, and says what differs."""
    held = read_state(path)["models"].get(role)
    if held is None:
        raise ValueError(f"the checkpoint {path} has no {role!r}")
    for name, value in identity.items():
        if held.get(name) != value:
            raise ValueError(
                f"the checkpoint {path} is of another model: {name} is {held.get(name)!r} there and {value!r} in "
                "model.path; name the model it was trained from, or another run.dir"
            )


def load_weights(path: Path, role: str, identity: Mapping[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Collective. The sharded tensors of `tree` alone, out of what the checkpoint has of `role`."""
    check_model(path, role, identity)
    add_prefix_for_sharding(tree, f"{role}.")
    return _load(path, tree, StrictHandling.RAISE_UNEXPECTED)


def _load(path: Path, tree: dict[str, Any], strict: StrictHandling) -> dict[str, Any]:
    with warnings.catch_warnings():
        # megatron-core calls what torch has renamed; no user can change that.
        warnings.simplefilter("ignore", FutureWarning)
        loaded: dict[str, Any] = dist_checkpointing.load(tree, str(path), strict=strict)
    return loaded


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
