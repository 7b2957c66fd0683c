"""Collectives over ranks for what is not a gradient: metrics, Python records, last-stage results."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_rl.metrics.types import Metrics, flatten, unflatten
from megatron_rl.parallel.device import device
from megatron_rl.parallel.mesh import Mesh

T = TypeVar("T")


def from_last_stage(value: T | None, mesh: Mesh) -> T:
    """The value that the last pipeline stage holds, on every stage."""
    if mesh.pp_size == 1:
        assert value is not None
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=mesh.stage_rank(mesh.pp_size - 1), group=mesh.pp_group)
    return box[0]


def gather_over_data(values: list[T], mesh: Mesh) -> list[T]:
    """The lists of all data-parallel ranks, one after the other, on every rank."""
    if mesh.dp_size == 1:
        return values
    parts: list[Any] = [None] * mesh.dp_size
    dist.all_gather_object(parts, values, group=mesh.dp_group)
    return [value for part in parts for value in part]


def gather_over_world(values: list[T]) -> list[T]:
    """The lists of all ranks, in rank order, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def from_first_rank(value: T) -> T:
    """What rank 0 holds, on every rank of the world."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank of the world."""
    raised = torch.tensor([int(flag)], device=device())
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def reduce_metrics(metrics: Metrics | None, mesh: Mesh) -> Metrics:
    """Merges metrics over the data-parallel ranks, each by its own type, and hands them to every rank.

    They are born on the last stage (`None` elsewhere), the same on all its tensor-parallel ranks.
    """
    if mesh.is_last_stage:
        assert metrics is not None
        if mesh.dp_size > 1:
            operators = (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN)
            rows = [torch.tensor(values, dtype=torch.float64, device=device()) for values in flatten(metrics)]
            for row, operator in zip(rows, operators):
                if row.numel():
                    dist.all_reduce(row, op=operator, group=mesh.dp_group)
            metrics = unflatten(metrics, *(row.tolist() for row in rows))
    return from_last_stage(metrics, mesh)
