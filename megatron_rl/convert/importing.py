"""Hugging Face directory -> checkpoint that `model.weights` names."""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_rl.checkpoint.hf import COMPANIONS, NOT_COMPANIONS, put_in_place
from megatron_rl.checkpoint.manifest import Entry, files_of, measure, sync_tree, write_manifest
from megatron_rl.checkpoint.store import HF, STATE
from megatron_rl.checkpoint.torch_dist import COMMON, SavedTensors, Spec, write_description
from megatron_rl.convert import comparing, matching, provenance, sharded
from megatron_rl.convert.jobs import JOURNAL, Journal, Receipt, partial_directory, run_jobs
from megatron_rl.convert.memory import block_limit
from megatron_rl.convert.rows import blocks
from megatron_rl.convert.table import Layout, Line, pieces, table
from megatron_rl.convert.tensors import HfTensors
from megatron_rl.convert.views import AsHf, AsMegatron
from megatron_rl.metrics.bar import counting
from megatron_rl.models.hf_config import ModelShape, load_shape
from megatron_rl.models.hf_map import SCALAR_HEAD

CRITIC = "critic"


class Source(NamedTuple):
    """A Hugging Face directory, and what it becomes."""

    directory: Path
    role: str
    layout: Layout
    shape: ModelShape
    lines: list[Line]
    tensors: HfTensors


def read_source(directory: Path, role: str, layout: Layout) -> Source:
    """Headers only. ValueError where it is no model, or the layout does not divide it."""
    shape = load_shape(directory)
    shape = shape.as_scalar() if role == CRITIC else shape
    return Source(directory, role, layout, shape, table(shape, layout), HfTensors(directory))


def complaints(source: Source, allowed: Collection[str]) -> list[str]:
    """What is missing, what nothing takes, and what is of another shape."""
    if source.role == CRITIC and SCALAR_HEAD.hf[0] not in source.tensors.specs:
        return [
            f"there is no {SCALAR_HEAD.hf[0]}, the head of a critic. Import it as an actor: a critic that starts from "
            "an actor's checkpoint draws its head from the model's seed"
        ]
    return list(matching.of_directory(source.tensors.specs, source.lines, source.shape, allowed))


def import_model(
    source: Source,
    target: Path,
    *,
    dtype: torch.dtype | None,
    max_memory: int,
    allowed: Collection[str] = (),
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    """Writes the checkpoint, or goes on writing it. It appears whole or not at all."""
    matching.refuse(complaints(source, allowed), source.directory)
    limit = block_limit(max_memory)
    dtypes = matching.dtypes(source.tensors.specs, source.lines, dtype)
    files = sharded.files_of(_parts(source, dtypes))
    with partial_directory(target, overwrite=overwrite) as partial:
        check_tied_copy(source, limit)
        journal = Journal(partial, _whole(source, dtypes, limit, allowed))

        view = AsMegatron(source.tensors, source.lines, source.role, dtypes)
        work = sharded.jobs(partial, files, lambda file: sharded.write_file(partial, file, view, limit))
        with counting("importing", sum(file.nbytes for file in files)) as on_bytes:
            receipts = run_jobs(work, journal, on_bytes)
        specs = {f"{source.role}.{line.key}": Spec(dtypes[line.key], line.whole) for line in source.lines}
        write_description(partial, specs, sharded.chunks_of(files, receipts, limit))
        result = AsHf(SavedTensors(partial), source.lines, source.role)
        hashes = comparing.verified(source.tensors, result, matching.left_out(source.shape, allowed)) if verify else {}
        _write_rest(partial, source, dtypes, allowed, hashes)
        finish(partial, target, files, receipts)


def finish(partial: Path, target: Path, files: Sequence[sharded.File], receipts: Sequence[Receipt]) -> None:
    """The manifest of a checkpoint whose files are written, and its name."""
    (partial / JOURNAL).unlink()
    known = {file.name: Entry(held["bytes"], held["sha256"]) for file, held in zip(files, receipts, strict=True)}
    write_manifest(partial, known | measure(partial, [name for name in files_of(partial) if name not in known]))
    sync_tree(partial)
    put_in_place(partial, target)


def check_tied_copy(source: Source, limit: int) -> None:
    """Refuses a tied model whose output layer is there, and is not the embedding: it would be lost."""
    if not (source.shape.tied and matching.OUTPUT_LAYER in source.tensors.specs):
        return
    one, other = (source.tensors.specs[name] for name in (matching.EMBEDDING, matching.OUTPUT_LAYER))
    same = one == other
    for start, stop in blocks(one.shape[0], one.row_bytes, limit) if same else ():
        rows = [torch.empty((stop - start, *one.shape[1:]), dtype=one.dtype) for _ in range(2)]
        for name, out in zip((matching.EMBEDDING, matching.OUTPUT_LAYER), rows, strict=True):
            source.tensors.read(name, (), start, stop, out)
        same &= torch.equal(*rows)
    if not same:
        raise ValueError(
            f"{source.directory}: {matching.OUTPUT_LAYER} is not {matching.EMBEDDING}, and the config says "
            "tie_word_embeddings=true: set it to false in config.json, or remove the tensor"
        )


def _parts(source: Source, dtypes: Mapping[str, torch.dtype]) -> list[sharded.Part]:
    return [
        sharded.Part(
            f"{source.role}.{piece.line.key}",
            piece.index,
            Spec(dtypes[piece.line.key], piece.line.shape),
            piece.line.row_parts,
            piece.line.column_parts,
            (piece.stage, piece.expert_rank),
        )
        for piece in pieces(source.lines, source.shape, source.layout)
    ]


def _whole(source: Source, dtypes: Mapping[str, torch.dtype], limit: int, allowed: Collection[str]) -> dict[str, Any]:
    """What makes this conversion another one than the one that was interrupted."""
    files = {file: [held.st_size, held.st_mtime_ns] for file, held in source.tensors.files().items()}
    companions = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _companions(source.directory)}
    return {
        "source": str(source.directory.resolve()),
        "files": files | companions,
        "role": source.role,
        "layout": asdict(source.layout),
        "dtypes": {key: str(dtype) for key, dtype in dtypes.items()},
        "block": limit,
        "allowed": sorted(allowed),
        "versions": provenance.versions(),
    }


def _write_rest(
    partial: Path,
    source: Source,
    dtypes: Mapping[str, torch.dtype],
    allowed: Collection[str],
    hashes: Mapping[str, str],
) -> None:
    """What a checkpoint is beside its tensors. No dates, so that a conversion is the same bytes every time."""
    torch.save({}, partial / COMMON)
    state = {"step": 0, "models": {source.role: source.shape.identity()}}
    (partial / STATE).write_text(json.dumps(state, indent=1) + "\n")
    (partial / HF).mkdir(exist_ok=True)
    for path in _companions(source.directory):
        shutil.copyfile(path, partial / HF / path.name)
    provenance.write(
        partial,
        verb="import",
        source=str(source.directory),
        files=source.tensors.identity(),
        role=source.role,
        layout=asdict(source.layout),
        dtype=sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}),
        allowed=sorted(allowed),
        sha256=provenance.digest(hashes) if hashes else None,
        tensors=dict(sorted(hashes.items())),
    )


def _companions(directory: Path) -> list[Path]:
    found = (path for path in directory.iterdir() if path.suffix in COMPANIONS and path.name not in NOT_COMPANIONS)
    return sorted(path for path in found if path.is_file())
