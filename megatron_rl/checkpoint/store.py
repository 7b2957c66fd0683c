"""Checkpoints that a run continues from: everything it is made of, written whole or not at all.

A checkpoint is a directory `step_00000012`:

    .metadata, metadata.json, common.pt, *.distcp   the tensors of every role, in megatron-core's sharded format
    generators.safetensors                          every generator of random numbers, of every rank
    state.json                                      what is not a tensor: data cursor, counters, config, versions
    manifest.json                                   size and hash of each of these files

It is written as `step_00000012.partial` and renamed; the file `latest` moves last, so an interrupted save leaves the
previous checkpoint in force.
"""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor

import megatron_rl.parallel.device  # noqa: F401  (installs the CPU backend before megatron-core)
from megatron_rl.checkpoint.manifest import (
    DamagedCheckpoint,
    check_pickle,
    check_sizes,
    complaints,
    files_of,
    measure,
    read_manifest,
    sync,
    sync_tree,
    write_manifest,
)
from megatron_rl.checkpoint.writing import SaveError, ShardedWrite, together
from megatron_rl.parallel.collect import any_rank, gather_over_world
from megatron_rl.parallel.generators import generator_states, restore_generators
from megatron_rl.types import RunError

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.dist_checkpointing.validation import StrictHandling

STATE, GENERATORS, LATEST = "state.json", "generators.safetensors", "latest"
# In a checkpoint that no run wrote, what its model is beside the tensors: a `model.path`.
HF = "hf"


class Role(Protocol):
    """A model of the run: what it is, its sharded state, and how to take it back."""

    def identity(self) -> dict[str, Any]: ...

    def sharded_state(self, *, loading: bool) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class _Pending(NamedTuple):
    """A checkpoint whose tensors are being written."""

    step: int
    partial: Path
    write: ShardedWrite
    state: dict[str, Any]
    generators: dict[str, Tensor]


class CheckpointStore:
    """The checkpoints of one run: the newest `keep`, and those of every `keep_every`-th step (0: none beside).

    With `background`, `save` returns once the state is copied in memory; `poll` completes the checkpoint later.
    """

    def __init__(self, directory: str | Path, *, keep: int, keep_every: int = 0, background: bool = False) -> None:
        self.directory, self.keep, self.keep_every, self.background = Path(directory), keep, keep_every, background
        self._pending: _Pending | None = None

    def latest(self) -> Path | None:
        """The checkpoint to continue from, if there is one; none of its files is missing or cut off."""
        pointer = self.directory / LATEST
        if not pointer.is_file():
            return None
        name = pointer.read_text(errors="replace").strip()
        path = self.directory / name
        try:
            if not re.fullmatch(r"step_\d+", name) or not path.is_dir():
                raise DamagedCheckpoint(f"{pointer} names {name!r}, and there is no such checkpoint")
            check_sizes(path)
        except DamagedCheckpoint as error:
            raise self._advised(error, path) from error
        return path

    def save(self, step: int, roles: Mapping[str, Role], state: Mapping[str, Any]) -> None:
        """Collective. `state` is JSON, the same on every rank. SaveError, and the old checkpoints, where it fails."""
        self.complete()
        partial = self.directory / f"{name_of(step)}.partial"
        with together(f"creating {partial}"):
            if dist.get_rank() == 0:
                for rest in self.directory.glob("*.partial"):
                    shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
                partial.mkdir(parents=True)
        identities = {name: role.identity() for name, role in roles.items()}
        try:
            write = ShardedWrite(_subtrees(roles, loading=False), partial, copy=self.background)
        except SaveError:
            self._discard(partial)
            raise
        self._pending = _Pending(step, partial, write, {"step": step, "models": identities, **state}, _all_generators())
        if not self.background:
            self.complete()

    def poll(self) -> None:
        """Collective. Completes a save in the background, once every rank has written its part of it."""
        if self._pending is not None and not any_rank(not self._pending.write.done()):
            self.complete()

    def complete(self) -> None:
        """Collective. Waits for a save in the background, if one is under way, and puts it in force."""
        if self._pending is None:
            return
        (step, partial, write, state, generators), self._pending = self._pending, None
        final, first = self.directory / name_of(step), dist.get_rank() == 0
        try:
            entries = write.finish()
            with together(f"writing {final}"):
                if first:
                    (partial / STATE).write_text(json.dumps(state, indent=1) + "\n")
                    # Not by save_file, whose error on a full disk is of a kind of its own.
                    (partial / GENERATORS).write_bytes(save(generators))
                    rest = [name for name in files_of(partial) if name not in entries]
                    write_manifest(partial, entries | measure(partial, rest))
                    sync_tree(partial)
                    if final.exists():
                        shutil.rmtree(final)
                    partial.rename(final)
                    self._point_at(final)
                    self._drop_old(step)
        except SaveError:
            write.close()
            self._discard(partial)
            raise

    def load(self, path: Path, roles: Mapping[str, Role], *, other_roles: bool = False) -> dict[str, Any]:
        """Collective. Fills the roles and, in a world of the same size, the generators; returns the JSON state.

        A damaged file, another model, or a tensor missing on either side is refused. With `other_roles` the checkpoint
        may hold fewer roles, or more; a role that it lacks stays as it is.
        """
        try:
            check_files(path)
        except DamagedCheckpoint as error:
            raise self._advised(error, path) from error
        state = read_state(path)
        known = {name: role for name, role in roles.items() if name in state["models"]}
        if not other_roles and set(roles) != set(state["models"]):
            raise RunError(
                f"the checkpoint {path} holds {', '.join(sorted(state['models']))}, and this run "
                f"{', '.join(sorted(roles))}"
            )
        for name, role in known.items():
            check_model(path, name, role.identity())
        strict = StrictHandling.RAISE_UNEXPECTED if other_roles else StrictHandling.RAISE_ALL
        tensors = _load(path, _subtrees(known, loading=True), strict)
        for name, role in known.items():
            role.load_state(tensors[name])
        _restore_generators(path)
        return state

    def _advised(self, error: DamagedCheckpoint, path: Path) -> DamagedCheckpoint:
        """The error, with the way back: the newest whole checkpoint before the damaged one."""
        for before in sorted((p for p in self._complete() if p.name < path.name), reverse=True):
            try:
                check_sizes(before)
            except DamagedCheckpoint:
                continue
            pointer = path.parent / LATEST
            return DamagedCheckpoint(f"{error}. To go back to {before.name}, write its name into {pointer}")
        return DamagedCheckpoint(f"{error}. There is no other checkpoint to go back to")

    def _complete(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("step_*") if path.suffix != ".partial")

    def _point_at(self, path: Path) -> None:
        pointer = self.directory / f"{LATEST}.partial"
        pointer.write_text(path.name + "\n")
        sync(pointer)
        pointer.rename(self.directory / LATEST)
        sync(self.directory)

    def _drop_old(self, step: int) -> None:
        """Later steps are of a run that was given up; they stay."""
        passed = [path for path in self._complete() if path.name <= name_of(step)]
        for path in passed[: -self.keep]:
            if not (self.keep_every and int(path.name.removeprefix("step_")) % self.keep_every == 0):
                shutil.rmtree(path)

    def _discard(self, partial: Path) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()


def name_of(step: int) -> str:
    """The directory of a step's checkpoint."""
    return f"step_{step:08d}"


def find_checkpoint(path: str | Path, option: str = "model.weights") -> Path:
    """The checkpoint that `path` is, or the latest of the run directory that it is. `option` named it."""
    path = Path(path)
    if (path / STATE).is_file():
        check_sizes(path)
        return path
    latest = CheckpointStore(path / "checkpoints", keep=1).latest()
    if latest is None:
        others = "'pretrained' nor 'random' nor " if option == "model.weights" else ""
        raise ValueError(f"{option}={str(path)!r} is neither {others}a checkpoint nor a run with checkpoints")
    return latest


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors."""
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path / STATE} cannot be read: {error}") from error
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


def check_files(path: Path) -> None:
    """Collective. Refuses a checkpoint with a damaged file: every rank reads its share of them."""
    entries = read_manifest(path)
    names = sorted(entries)[dist.get_rank() :: dist.get_world_size()]
    for complaint in gather_over_world(complaints(path, entries, names)):
        raise DamagedCheckpoint(complaint)
    check_pickle(path / ".metadata")


def load_weights(path: Path, role: str, identity: Mapping[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Collective. The sharded tensors of `tree` alone, out of what the checkpoint has of `role`."""
    check_files(path)
    check_model(path, role, identity)
    add_prefix_for_sharding(tree, f"{role}.")
    return _load(path, tree, StrictHandling.RAISE_UNEXPECTED)


def _load(path: Path, tree: dict[str, Any], strict: StrictHandling) -> dict[str, Any]:
    with warnings.catch_warnings():
        # megatron-core calls what torch has renamed; no user can change that.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            loaded: dict[str, Any] = dist_checkpointing.load(tree, str(path), strict=strict)
        except CheckpointingException as error:
            raise RunError(f"the checkpoint {path} does not fit this run: {' '.join(str(error).split())}") from error
    return loaded


def _subtrees(roles: Mapping[str, Role], *, loading: bool) -> dict[str, Any]:
    """Each role's sharded state, its tensors named after the role, so that two models can share a checkpoint."""
    trees = {name: role.sharded_state(loading=loading) for name, role in roles.items()}
    for name, tree in trees.items():
        add_prefix_for_sharding(tree, f"{name}.")
    return trees


def _all_generators() -> dict[str, Tensor]:
    """The generators of all ranks, under `rank/name`. Collective."""
    states = gather_over_world([generator_states()])
    return {f"{rank}/{name}": value for rank, held in enumerate(states) for name, value in held.items()}


def _restore_generators(path: Path) -> None:
    """Of another number of ranks nothing can be restored: their generators stay as they were seeded."""
    held, rank = load_file(path / GENERATORS), dist.get_rank()
    if len({name.partition("/")[0] for name in held}) == dist.get_world_size():
        mine = {name.removeprefix(f"{rank}/"): value for name, value in held.items() if name.startswith(f"{rank}/")}
        restore_generators(mine)
