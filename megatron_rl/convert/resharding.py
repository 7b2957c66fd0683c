"""Checkpoint -> the same checkpoint in chunks that suit another layout, optimizer state included."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.checkpoint.manifest import MANIFEST, Entry, read_manifest
from megatron_rl.checkpoint.store import find_checkpoint, read_state
from megatron_rl.checkpoint.torch_dist import DESCRIPTION, SavedTensors, Spec, write_description
from megatron_rl.convert import provenance, sharded
from megatron_rl.convert.importing import finish
from megatron_rl.convert.intact import check_files
from megatron_rl.convert.jobs import Journal, partial_directory, run_jobs
from megatron_rl.convert.memory import block_limit
from megatron_rl.convert.table import Layout, pieces, shape_of, table
from megatron_rl.convert.views import Resized
from megatron_rl.metrics.bar import counting

# Before the name of a weight, in the keys of what the optimizer keeps of it (workers/adam_state.py).
BESIDE = ("", "optimizer.param.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")


def reshard(path: Path, target: Path, *, layout: Layout, max_memory: int, overwrite: bool = False) -> None:
    """Writes the checkpoint, or goes on writing it. It appears whole or not at all."""
    path, limit = find_checkpoint(path, "the checkpoint"), block_limit(max_memory)
    saved, state, entries = SavedTensors(path), read_state(path), read_manifest(path)
    parts = _parts(saved, state, layout)
    specs = _specs(saved, parts)
    files = sharded.files_of(parts)
    whole = {
        "source": str(path.resolve()),
        "files": {name: entry.sha256 for name, entry in entries.items()},
        "layout": asdict(layout),
        "block": limit,
        "versions": provenance.versions(),
    }
    with partial_directory(target, overwrite=overwrite) as partial:
        journal = Journal(partial, whole)
        check_files(path, entries, list(entries))
        view = Resized(saved, specs)
        work = sharded.jobs(partial, files, lambda file: sharded.write_file(partial, file, view, limit))
        with counting("resharding", sum(file.nbytes for file in files)) as on_bytes:
            receipts = run_jobs(work, journal, on_bytes)
        write_description(partial, specs, sharded.chunks_of(files, receipts, limit))
        _copy_rest(path, partial, entries)
        provenance.write(
            partial,
            verb="reshard",
            source=str(path),
            files={name: entry._asdict() for name, entry in entries.items()},
            layout=asdict(layout),
            before=provenance.read(path),
        )
        finish(partial, target, files, receipts)


def _parts(saved: SavedTensors, state: Mapping[str, Any], layout: Layout) -> list[sharded.Part]:
    """All tensors of all roles, cut for the layout. ValueError where there is one that no role has."""
    parts = []
    for role, identity in state["models"].items():
        shape = shape_of(identity)
        for piece in pieces(table(shape, layout), shape, layout):
            line = piece.line
            for beside in BESIDE:
                key = f"{role}.{beside}{line.key}"
                if key in saved.specs:
                    group = (piece.stage, piece.expert_rank)
                    spec = Spec(saved.specs[key].dtype, line.shape)
                    parts.append(sharded.Part(key, piece.index, spec, line.row_parts, line.column_parts, group))
    known = {part.key for part in parts}
    for key in sorted(saved.specs.keys() - known):
        raise ValueError(f"{saved.path} holds {key}, and no model of the run has such a tensor")
    for key in sorted(known):
        saved.check_whole(key)
    return parts


def _specs(saved: SavedTensors, parts: list[sharded.Part]) -> dict[str, Spec]:
    """Of the whole tensors: the stack as it was, the vocabulary padded for the new layout."""
    found = {}
    for part in parts:
        stack = saved.specs[part.key].shape[: len(part.index)]
        found[part.key] = Spec(part.spec.dtype, (*stack, *part.spec.shape))
    return found


def _copy_rest(path: Path, partial: Path, entries: Mapping[str, Entry]) -> None:
    """What is not sharded is the same under every layout."""
    for name in entries:
        if not name.endswith(".distcp") and name not in (DESCRIPTION, MANIFEST, provenance.FILE, "metadata.json"):
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path / name, partial / name)
