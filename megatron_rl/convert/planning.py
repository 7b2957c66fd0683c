"""`convert plan`: what a conversion would do, from headers alone."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from megatron_rl.checkpoint.torch_dist import Spec
from megatron_rl.convert import matching
from megatron_rl.convert.exporting import Saved, saved_complaints
from megatron_rl.convert.importing import Source, complaints
from megatron_rl.convert.table import Layout, Line, kind_name, pieces
from megatron_rl.models.hf_config import ModelShape

COLUMNS = ("rule", "tensor of the checkpoint", "shape", "a rank's", "made of", "dtype", "bytes")


class Plan(NamedTuple):
    """The table, what it adds up to, and what is wrong."""

    rows: list[dict[str, Any]]
    totals: dict[str, Any]
    faults: list[str]


def plan_import(source: Source, *, dtype: torch.dtype | None, max_memory: int, allowed: Collection[str]) -> Plan:
    """Of a Hugging Face directory."""
    faults = complaints(source, allowed)
    dtypes = {} if faults else matching.dtypes(source.tensors.specs, source.lines, dtype)
    return _plan(source.lines, source.shape, source.layout, dtypes, source.role, max_memory, faults)


def plan_export(saved: Saved, *, dtype: torch.dtype | None, max_memory: int, allowed: Collection[str]) -> Plan:
    """Of a checkpoint."""
    faults = saved_complaints(saved, allowed)
    held = saved.tensors.specs
    dtypes = {} if faults else {line.key: dtype or held[f"{saved.role}.{line.key}"].dtype for line in saved.lines}
    return _plan(saved.lines, saved.shape, Layout(), dtypes, saved.role, max_memory, faults)


def _plan(
    lines: list[Line],
    shape: ModelShape,
    layout: Layout,
    dtypes: Mapping[str, torch.dtype],
    role: str,
    max_memory: int,
    faults: list[str],
) -> Plan:
    rows = [_row(line, role, dtypes.get(line.key)) for line in lines]
    ranks = bytes_per_stage(lines, shape, layout, dtypes)
    totals = {
        "tensors": len(lines),
        "parameters": sum(torch.Size(shape).numel() for shape in _hf_shapes(lines)),
        "output_bytes": sum(row["bytes"] for row in rows),
        "bytes_per_rank": ranks,
        "peak_bytes_per_rank": max(ranks, default=0),
        "converter_bytes": max_memory,
        "layout": asdict(layout),
    }
    return Plan(rows, totals, faults)


def _row(line: Line, role: str, dtype: torch.dtype | None) -> dict[str, Any]:
    return {
        "rule": kind_name(line.rule.kind),
        "tensor": f"{role}.{line.key}",
        "shape": list(line.whole),
        "slice": slice_shape(line),
        "hf": list(line.rule.hf),
        "dtype": str(dtype).removeprefix("torch.") if dtype else "?",
        "bytes": Spec(dtype, line.whole).nbytes if dtype else 0,
    }


def slice_shape(line: Line) -> list[int]:
    """What one tensor-parallel rank has of one layer's tensor; a gated one has both halves' part."""
    ranks = line.row_parts // line.halves
    return [line.shape[0] // ranks, *(size // line.column_parts for size in line.shape[1:])]


def bytes_per_stage(
    lines: list[Line], shape: ModelShape, layout: Layout, dtypes: Mapping[str, torch.dtype]
) -> list[int]:
    """Weights of a rank on each pipeline stage; of a tied model the last stage has the embedding too."""
    stages = [0] * layout.pp
    for piece in pieces(lines, shape, layout):
        dtype = dtypes.get(piece.line.key)
        size = torch.Size(slice_shape(piece.line)).numel() * dtype.itemsize if dtype else 0
        if piece.expert_rank <= 0:  # a rank has its own experts alone
            stages[piece.stage] += size
        if shape.tied and layout.pp > 1 and piece.hf == (matching.EMBEDDING,):
            stages[-1] += size
    return stages


def _hf_shapes(lines: list[Line]) -> list[tuple[int, ...]]:
    return [shape for line in lines for _ in line.indices() for shape in line.hf_shapes]


def as_text(plan: Plan) -> str:
    """The table and its totals."""
    cells = [
        (
            row["rule"],
            row["tensor"],
            _shape(row["shape"]),
            _shape(row["slice"]),
            " + ".join(row["hf"]),
            row["dtype"],
            f"{row['bytes']:,}",
        )
        for row in plan.rows
    ]
    widths = [max(len(line[column]) for line in [COLUMNS, *cells]) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [COLUMNS, *cells]]
    totals = plan.totals
    ranks = ", ".join(_size(count) for count in totals["bytes_per_rank"])
    return "\n".join(
        [
            *lines,
            f"{totals['tensors']} tensors, {totals['parameters']:,} parameters, output {_size(totals['output_bytes'])}",
            f"weights of a rank: at most {_size(totals['peak_bytes_per_rank'])} (by pipeline stage: {ranks})",
            f"memory of the conversion: at most {_size(totals['converter_bytes'])} beside the interpreter",
        ]
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    return {"tensors": plan.rows, "totals": plan.totals, "faults": plan.faults}


def _shape(sizes: list[int]) -> str:
    return "x".join(map(str, sizes))


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"
