"""Starts this command again under torchrun when the layout needs several processes."""

import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.metrics.progress import NOTES, Place, read_note
from megatron_rl.parallel.stop import HUNG, LOST, STOP_SIGNALS, StopRequest

# Set, to this process's id, for those that are started here: their config, model and data have been looked at.
CHECKED = "MEGATRON_RL_CHECKED"


def under_torchrun() -> bool:
    """Whether torchrun (or anything that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process speaks for all: the only one, rank 0, or what starts the ranks of the first node."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    return "is_host=0" not in os.environ.get("PET_RDZV_CONF", "")


def is_checked() -> bool:
    """Whether mistakes are someone else's to find: those who started this process, or rank 0."""
    return CHECKED in os.environ or not is_first()


def is_one_of_many() -> bool:
    """Whether who started this process has told it, in torchrun's own variables, to start the ranks of one node."""
    return "PET_NNODES" in os.environ


def processes(parallel: ParallelConfig) -> int:
    """How many processes a layout needs; an open data-parallel size is the least that the experts' cut allows."""
    stage = parallel.tp * parallel.dp if parallel.dp else math.lcm(parallel.tp, parallel.ep * parallel.etp)
    return stage * parallel.pp


def ranks_of_machine() -> int:
    """One rank per GPU; without any, as many as cut a model along two axes."""
    import torch

    return torch.cuda.device_count() or 4


def launch(count: int, arguments: Sequence[str]) -> int:
    """Runs this command in `count` processes on this node; returns the exit code of the first that fails, or 0.

    One node of many starts as many as its `PET_NPROC_PER_NODE` says, and torchrun reads where they meet the others'.
    A process that a signal ended counts as 128 + the signal, as in a shell; so does a signal that ends this one.
    SIGTERM and SIGUSR1 are passed on to the ranks, which decide; a second one ends all at once.
    """
    if CHECKED not in os.environ:
        # Begun anew without what the checks have loaded, 300 MB that would stay for as long as the ranks run.
        os.environ[CHECKED] = str(os.getpid())
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, "-m", "megatron_rl", *arguments])
    # Imported late: one process needs no torchrun, and a mistake should not wait for torch.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    count = int(os.environ["PET_NPROC_PER_NODE"]) if is_one_of_many() else count
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    os.environ[CHECKED] = str(os.getpid())
    alone = [] if is_one_of_many() else ["--standalone", f"--nproc-per-node={count}"]
    command = [*alone, "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", "--no-python"]
    command += [sys.executable, "-u", "-m", "megatron_rl", *arguments]
    with tempfile.TemporaryDirectory(prefix="megatron_rl-") as folder, Messenger(Path(folder)) as messenger:
        os.environ[NOTES] = folder
        try:
            run(parse_args(command))
        except ChildFailedError as error:
            return messenger.ended_by or explain(error.failures, messenger.places())
        except SignalException as error:
            return 128 + int(error.sigval)
        finally:
            messenger.kill()
    return 0


class Messenger(StopRequest):
    """Passes signals on to the ranks, which leave their process ids in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(announce=True)
        self.folder = folder
        self.ended_by = 0  # the exit code, once a second signal has come

    def __enter__(self) -> Self:
        super().__enter__()
        # The thread takes the signals. Ranks inherit this, and get theirs when they listen: none is lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        return self

    def first(self, number: signal.Signals) -> None:
        super().first(number)
        threading.Thread(target=self._pass_on, args=(number,), name="messenger", daemon=True).start()

    def second(self, number: signal.Signals) -> None:
        self.ended_by = 128 + number

    def notes(self) -> dict[int, tuple[int, Place]]:
        """The process id and place of each rank that has come that far."""
        return {int(path.name): read_note(path) for path in self.folder.glob("[0-9]*") if not path.suffix}

    def places(self) -> dict[int, Place]:
        return {rank: place for rank, (_, place) in self.notes().items()}

    def kill(self) -> None:
        """Ends what is left of the ranks, each of which leads a process group."""
        for pid, _ in self.notes().values():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _pass_on(self, number: signal.Signals) -> None:
        """To each rank once, also to those that are still being started; after a second signal, their end."""
        told: set[int] = set()
        while self.folder.exists():
            if self.ended_by:
                self.kill()
            for rank, (pid, _) in self.notes().items():
                if rank not in told:
                    told.add(rank)
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
            time.sleep(0.1)


def explain(failures: Mapping[int, Any], places: Mapping[int, Place]) -> int:
    """Says which rank ended first and where, unless that has been said; the exit code.

    torchrun notes failures by the second, and those who lost a rank end in the same one as that rank.
    """
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode == LOST, item[1].timestamp))
    code = failure.exitcode
    where = f" in {places[rank]}" if rank in places else ""
    if code < 0:
        what = f"was killed by {signal.Signals(-code).name}"
    else:
        what = f"ended with exit code {code}"
    if code != HUNG:
        print(f"megatron-rl: rank {rank} {what}{where}; the other ranks were stopped", file=sys.stderr)
    return code if code >= 0 else 128 - code
