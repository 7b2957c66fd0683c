"""Weights in and out: Hugging Face slices into this rank's parameters, full Hugging Face tensors out of all ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron_rl.metrics.progress import tick
from megatron_rl.models.build import LanguageModel, heads, weight_map
from megatron_rl.models.hf_map import Heads, Match, Reader, canonical_name
from megatron_rl.parallel.mesh import Mesh


def named_parameters(chunks: Sequence[LanguageModel]) -> Iterator[tuple[str, Parameter]]:
    """(name, parameter) of this rank, with layers and experts numbered through the whole model."""
    for chunk in chunks:
        numbers = [str(layer.layer_number - 1) for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            parts = canonical_name(name).split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = numbers[int(parts[2])]
            if parts[3:5] == ["mlp", "experts"]:
                parts[5] = str(chunk.ep_rank * chunk.experts_per_rank + int(parts[5]))
            yield ".".join(parts), parameter


@torch.no_grad()
def import_weights(chunks: Sequence[LanguageModel], source: Reader, mesh: Mesh) -> None:
    """Fills every parameter of this rank from its slices of `source`. Local: no rank waits for another."""
    rules, geometry = weight_map(chunks[0].shape), heads(chunks[0].shape)
    for name, parameter in named_parameters(chunks):
        match = rules[name]
        rank, size = (mesh.tp_rank, mesh.tp_size) if match.expert is None else (mesh.etp_rank, mesh.etp_size)
        shard = match.kind.read(source, match.hf, rank, size, parameter.shape[0], geometry)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{' + '.join(match.hf)} give {tuple(shard.shape)} for the Megatron parameter {name}, which is "
                f"{tuple(parameter.shape)}: the checkpoint does not fit its config"
            )
        parameter.copy_(shard)


def _gather(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def _wholes(match: Match, shard: Tensor, geometry: Heads, mesh: Mesh, per_rank: int) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of which a stage's ranks hold shards; of `per_rank` experts a rank, one of each rank."""
    if match.expert is None:
        yield from zip(match.hf, match.kind.merge(_gather(shard, mesh.tp_group), geometry))
        return
    parts = [_gather(part, mesh.ep_group) for part in _gather(shard, mesh.etp_group)]
    for rank, shards in enumerate(zip(*parts, strict=True)):
        one = replace(match, expert=rank * per_rank + match.expert % per_rank)
        yield from zip(one.hf, one.kind.merge(shards, geometry))


@torch.no_grad()
def export_weights(
    chunks: Sequence[LanguageModel], mesh: Mesh, value: Callable[[Parameter], Tensor] = lambda parameter: parameter.data
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, full tensor) on every rank; collective, so every rank must drain it.

    `value` chooses what is exported of a parameter: its weights, or its gradient, under the same names. One
    parameter's tensors exist at a time, and where nothing has to be gathered they are views of it. Of a pipeline's two
    copies of a tied embedding the first is taken.
    """
    rules, geometry = weight_map(chunks[0].shape), heads(chunks[0].shape)
    local = dict(named_parameters(chunks))
    per_rank = chunks[0].experts_per_rank
    stages: list[list[tuple[str, torch.Size, torch.dtype]]] = [[] for _ in range(mesh.pp_size)]
    header = [(name, value(parameter).shape, value(parameter).dtype) for name, parameter in local.items()]
    dist.all_gather_object(stages, header, group=mesh.pp_group)
    for stage, parameters in enumerate(stages):
        for name, shape, dtype in parameters:
            tick()
            if name in rules.tied_to_embedding:
                continue
            if stage == mesh.pp_rank:
                shard = value(local[name])
            else:
                shard = torch.empty(shape, dtype=dtype, device=chunks[0].rotary_pos_emb.inv_freq.device)
            if mesh.pp_size > 1:
                shard = shard.contiguous()
                dist.broadcast(shard, src=mesh.stage_rank(stage), group=mesh.pp_group)
            yield from _wholes(rules[name], shard, geometry, mesh, per_rank)
