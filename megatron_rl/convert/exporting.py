"""Checkpoint, an imported one or a run's -> Hugging Face directory."""

import collections
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_rl.checkpoint.hf import INDEX, copy_companions, put_in_place
from megatron_rl.checkpoint.manifest import Entry, read_manifest, sync_tree
from megatron_rl.checkpoint.store import HF, check_model, find_checkpoint, read_state
from megatron_rl.checkpoint.torch_dist import SavedTensors, Spec
from megatron_rl.convert import comparing, matching, provenance, safetensors_files
from megatron_rl.convert.intact import check_files
from megatron_rl.convert.jobs import JOURNAL, Journal, partial_directory, run_jobs
from megatron_rl.convert.memory import block_limit
from megatron_rl.convert.table import Layout, Line, pieces, shape_of, table
from megatron_rl.convert.tensors import HfTensors
from megatron_rl.convert.views import AsHf
from megatron_rl.metrics.bar import counting
from megatron_rl.models.hf_config import ModelShape, classifier_config, load_shape


class Saved(NamedTuple):
    """A role of a checkpoint, and the Hugging Face directory that says what its model is beside the tensors."""

    path: Path
    role: str
    like: Path
    shape: ModelShape
    lines: list[Line]
    tensors: SavedTensors


def read_saved(path: Path, role: str | None, like: Path | None) -> Saved:
    """Descriptions only. `like` may be silent: then the checkpoint, or the config of its run, says where it is."""
    path = find_checkpoint(path, "the checkpoint")
    state = read_state(path)
    role = role or next(iter(state["models"]))
    if role not in state["models"]:
        raise ValueError(f"{path} has no {role!r}: --role is one of {', '.join(state['models'])}")
    like = like or _like(path, state, role)
    shape = load_shape(like)
    shape = shape.as_scalar() if state["models"][role].get("scalar") else shape
    check_model(path, role, shape.identity())
    lines = table(shape_of(state["models"][role]), Layout())
    return Saved(path, role, like, shape, lines, SavedTensors(path))


def _like(path: Path, state: Mapping[str, Any], role: str) -> Path:
    """What an import brought along, or the model's directory by the config of the run: a critic may have its own."""
    held = path / HF
    if not held.is_dir():
        config = state.get("config", {})
        own = config.get("critic", {}).get("path") if role == "critic" else None
        held = Path(own or config.get("model", {}).get("path", ""))
    if not (held / "config.json").is_file():
        raise ValueError(f"{path} does not say where its model's config and tokenizer are: name them with --hf DIR")
    return held


def saved_complaints(saved: Saved, allowed: Collection[str]) -> list[str]:
    """What is missing, what nothing takes, and what is of another shape."""
    specs = saved.tensors.specs
    return list(matching.of_checkpoint(specs, saved.lines, saved.role, saved.shape.vocab_size, allowed))


def export_model(
    saved: Saved,
    target: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_size: int,
    max_memory: int,
    allowed: Collection[str] = (),
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    """Writes the directory, or goes on writing it. It appears whole or not at all."""
    matching.refuse(saved_complaints(saved, allowed), saved.path)
    limit = block_limit(max_memory)
    view = AsHf(saved.tensors, saved.lines, saved.role)
    order = [name for piece in pieces(saved.lines, saved.shape, Layout()) for name in piece.hf]
    specs = {name: Spec(dtype or view.specs[name].dtype, view.specs[name].shape) for name in order}
    keys = [f"{saved.role}.{line.key}" for line in saved.lines]
    for key in keys:
        saved.tensors.check_whole(key)
    with partial_directory(target, overwrite=overwrite) as partial:
        entries = read_manifest(saved.path)
        journal = Journal(partial, _whole(saved, dtype, max_shard_size, limit, allowed, entries))
        total = sum(spec.nbytes for spec in specs.values())
        check_files(saved.path, entries, saved.tensors.files(keys))
        targets = safetensors_files.layout(specs, max_shard_size)
        safetensors_files.make(partial, targets)
        with counting("exporting", total) as on_bytes:
            run_jobs(safetensors_files.jobs(partial, view, targets, limit), journal, on_bytes)
        hashes = comparing.verified(view, HfTensors(partial), ()) if verify else {}
        _write_rest(partial, saved, targets, hashes, allowed)
        (partial / JOURNAL).unlink()
        sync_tree(partial)
        put_in_place(partial, target)


def _whole(
    saved: Saved,
    dtype: torch.dtype | None,
    max_shard_size: int,
    limit: int,
    allowed: Collection[str],
    entries: Mapping[str, Entry],
) -> dict[str, Any]:
    """What makes this conversion another one than the one that was interrupted."""
    return {
        "source": str(saved.path.resolve()),
        "files": {name: entry.sha256 for name, entry in entries.items()},
        "role": saved.role,
        "like": str(saved.like.resolve()),
        "dtype": str(dtype),
        "shard": max_shard_size,
        "block": limit,
        "allowed": sorted(allowed),
        "versions": provenance.versions(),
    }


def _write_rest(
    partial: Path,
    saved: Saved,
    targets: Mapping[str, safetensors_files.Target],
    hashes: Mapping[str, str],
    allowed: Collection[str],
) -> None:
    """What a model is beside its tensors."""
    files = sorted({target.file for target in targets.values()})
    total = sum(target.spec.nbytes for target in targets.values())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: target.file for name, target in targets.items()},
        }
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    used = collections.Counter(str(target.spec.dtype).removeprefix("torch.") for target in targets.values())
    changes = classifier_config(saved.like) if saved.shape.scalar else {}
    copy_companions(saved.like, partial, dtype=used.most_common(1)[0][0], changes=changes)
    provenance.write(
        partial,
        verb="export",
        source=str(saved.path),
        step=read_state(saved.path)["step"],
        files={name: entry._asdict() for name, entry in read_manifest(saved.path).items()},
        role=saved.role,
        dtype=sorted(used),
        allowed=sorted(allowed),
        sha256=provenance.digest(hashes) if hashes else None,
        tensors=dict(sorted(hashes.items())),
    )
