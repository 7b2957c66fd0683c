"""Starts this command again under torchrun when the layout needs several processes."""

import os
import sys
from collections.abc import Sequence

from megatron_rl.config.schema import ParallelConfig


def under_torchrun() -> bool:
    """Whether torchrun (or anything that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def processes(parallel: ParallelConfig) -> int:
    """How many processes a layout needs; an open data-parallel size counts as one."""
    return parallel.tp * parallel.pp * (parallel.dp or 1)


def replace_by_torchrun(count: int, arguments: Sequence[str]) -> None:
    """Becomes `torchrun` on this node with `count` processes; exit code and signals are torchrun's from here on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    os.execv(sys.executable, [*launcher, "-m", "megatron_rl", *arguments])
