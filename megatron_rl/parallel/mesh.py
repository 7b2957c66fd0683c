"""The process mesh: how many ranks along each parallel axis, which of them this process is, and their groups.

This is the only reader of megatron-core's `parallel_state`. Ranks are laid out as megatron-core does by default:
tensor-parallel ranks are neighbours, then data-parallel, then pipeline stages.
"""

import datetime
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config.rules import ConfigError
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.parallel.device import ON_CPU, backend, device, seed_everything

# isort: split
from megatron.core import parallel_state, tensor_parallel

TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Sizes, this process's coordinates, and process groups of the axes tp (tensor), pp (pipeline), dp (data).

    The tp * dp ranks of a stage are cut a second time for the experts of its layers: ep (expert) ranks share them out,
    etp (expert tensor) ranks hold a part of each; what is left over are copies.

    `recompute` is no axis, but like sequence parallelism a way to hold less per rank without changing a number.
    """

    tp_size: int
    tp_rank: int
    tp_group: dist.ProcessGroup
    pp_size: int
    pp_rank: int
    pp_group: dist.ProcessGroup
    dp_size: int
    dp_rank: int
    dp_group: dist.ProcessGroup
    ep_size: int
    ep_rank: int
    ep_group: dist.ProcessGroup
    etp_size: int
    etp_rank: int
    etp_group: dist.ProcessGroup
    world_size: int
    rank: int
    vpp_size: int
    sequence_parallel: bool
    recompute: bool

    @property
    def layout(self) -> ParallelConfig:
        """The sizes alone."""
        return ParallelConfig(
            tp=self.tp_size,
            pp=self.pp_size,
            dp=self.dp_size,
            vpp=self.vpp_size,
            ep=self.ep_size,
            etp=self.etp_size,
            sequence_parallel=self.sequence_parallel,
            recompute=self.recompute,
        )

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the end of the pipeline, where losses are born."""
        return self.pp_rank == self.pp_size - 1

    @property
    def min_micro_batches(self) -> int:
        """A pipeline wants at least one micro-batch per stage."""
        return self.pp_size

    @property
    def micro_batch_multiple(self) -> int:
        """Interleaved pipelines run micro-batches in rounds of one per stage."""
        return self.pp_size if self.vpp_size > 1 else 1

    @property
    def pad_multiple(self) -> int:
        """Sequence parallelism cuts the token axis into one equal piece per tensor-parallel rank."""
        return self.tp_size if self.sequence_parallel else 1

    def stage_rank(self, stage: int) -> int:
        """The global rank of pipeline stage `stage` with this process's other coordinates."""
        return dist.get_global_rank(self.pp_group, stage)


@functools.cache
def _meeting_place() -> tuple[dist.Store, int, int]:
    """torchrun's key-value store, this process's rank, and the number of processes."""
    return next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))


def join_world(name: str = "world", *, alone: bool = False) -> None:
    """Joins the processes that torchrun started; without torchrun, or `alone`, it makes a world of one.

    A world that has been left can be joined again under another `name`: its old addresses lie in torchrun's store.
    """
    if dist.is_initialized():
        return
    if not ON_CPU:
        torch.cuda.set_device(device())
    store, rank, world = (dist.HashStore(), 0, 1) if alone or "RANK" not in os.environ else _meeting_place()
    dist.init_process_group(
        backend(), store=dist.PrefixStore(name, store), rank=rank, world_size=world, timeout=TIMEOUT
    )


def world_store() -> dist.Store:
    """The key-value store through which this world met, over a connection of the caller's own."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def create_mesh(
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    dp: int | None = None,
    ep: int = 1,
    etp: int = 1,
    sequence_parallel: bool = False,
    recompute: bool = False,
    seed: int = 0,
) -> Mesh:
    """Builds the process groups and seeds every generator. `dp` defaults to what the world leaves over."""
    join_world()
    world = dist.get_world_size()
    if world % (tp * pp) or (dp is not None and world != tp * pp * dp):
        wanted = f"a multiple of {tp * pp}" if dp is None else str(tp * pp * dp)
        raise ConfigError(
            f"the layout parallel.tp={tp}, parallel.pp={pp}, parallel.dp={dp} needs {wanted} processes, and this run "
            f"has {world}: start as many, or change the layout"
        )
    if world // pp % (ep * etp):
        raise ConfigError(
            f"parallel.ep={ep} times parallel.etp={etp} must divide the {world // pp} ranks of a pipeline stage: "
            "change one of them, or the number of processes"
        )
    if sequence_parallel and tp == 1:
        raise ConfigError("parallel.sequence_parallel=true needs parallel.tp > 1: with one tensor rank nothing is cut")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    seed_everything(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Mesh(
        tp_size=tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_size=pp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_group=parallel_state.get_data_parallel_group(),
        ep_size=ep,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        etp_size=etp,
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
        world_size=world,
        rank=dist.get_rank(),
        vpp_size=vpp,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
    )


def destroy_mesh() -> None:
    """Takes down the groups of `create_mesh` and leaves the world."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
