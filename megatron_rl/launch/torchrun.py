"""Starts this command again under torchrun when the layout needs several processes."""

import os
import sys
from collections.abc import Sequence

from megatron_rl.config.schema import ParallelConfig

# Set for the processes that are started here: their config, model and data have been looked at.
CHECKED = "MEGATRON_RL_CHECKED"


def under_torchrun() -> bool:
    """Whether torchrun (or anything that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process speaks for all: the only one, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def is_checked() -> bool:
    """Whether mistakes are someone else's to find: those who started this process, or rank 0."""
    return CHECKED in os.environ or not is_first()


def processes(parallel: ParallelConfig) -> int:
    """How many processes a layout needs; an open data-parallel size counts as one."""
    return parallel.tp * parallel.pp * (parallel.dp or 1)


def ranks_of_machine() -> int:
    """One rank per GPU; without any, as many as cut a model along two axes."""
    import torch

    return torch.cuda.device_count() or 4


def launch(count: int, arguments: Sequence[str]) -> int:
    """Runs this command in `count` processes on this node; returns the exit code of the first that fails, or 0.

    A process that a signal ended counts as 128 + the signal, as in a shell; so does a signal to this one, which
    torchrun passes on.
    """
    # Imported late: one process needs no torchrun, and a mistake should not wait for torch.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    os.environ[CHECKED] = "1"
    command = ["--standalone", f"--nproc-per-node={count}", "--no-python", sys.executable, "-u", "-m", "megatron_rl"]
    try:
        run(parse_args([*command, *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        print(f"megatron-rl: rank {rank} ended with exit code {code}; the other ranks were stopped", file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
