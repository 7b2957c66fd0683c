"""Up to four processes that live for the whole test session and become any layout a test asks for.

Importing torch, transformers and megatron-core costs seconds, so a launch per case would cost more than the cases.
`pool.run(function, world, ...)` calls a module-level function on ranks 0..world-1 of a fresh gloo world and returns
what each rank returned.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed import TCPStore

SIZE = 4


def _let_go() -> None:
    """Frees the job's models. Megatron's DDP is held by its own gradient hooks, in a circle Python cannot see, and
    with it fifty gloo threads a job."""
    from megatron.core.distributed import DistributedDataParallel

    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel):  # isinstance would ask a dead weak reference
            vars(thing).clear()
    gc.collect()


def _serve(rank: int, port: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    import megatron_rl.trainers.run  # noqa: F401  with all that jobs import
    from megatron_rl.parallel.mesh import destroy_mesh

    # A million objects of imported modules, which no job has to walk through again.
    gc.collect()
    gc.freeze()
    os.setpgid(0, 0)  # what a job starts must not outlive this process
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # the test session is gone
            return
        function, world, name, args, kwargs = job
        try:
            dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=world)
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            destroy_mesh()
            _let_go()


class Pool:
    """The workers; started when a job needs them, and again after a failure (a rank may be stuck in a collective)."""

    def __init__(self, first: tuple[str, ...] = ()) -> None:
        self.first = first  # modules that every worker imports before all else
        self.workers: list[tuple[Any, Connection]] = []
        # A store in memory: one in a file is polled, which costs as much as the tests.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.jobs = 0

    def _start(self, world: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        # Imported once, and then forked from a process that has done nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*self.first, "megatron_rl.trainers.run"])
        for rank in range(len(self.workers), world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.store.port, there))
            process.start()
            there.close()
            self.workers.append((process, here))

    def run(
        self, function: Callable[..., Any], world: int, *args: Any, timeout_s: float = 180.0, **kwargs: Any
    ) -> list:
        """What ranks 0..world-1 return. A failure on any rank fails the test with that rank's traceback."""
        assert world <= SIZE
        self._start(world)
        self.jobs += 1
        pipes = [pipe for _, pipe in self.workers[:world]]
        for pipe in pipes:
            pipe.send((function, world, str(self.jobs), args, kwargs))
        results: dict[Connection, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) < world:
            ready = wait([pipe for pipe in pipes if pipe not in results], max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank, pipe in enumerate(pipes) if pipe not in results]
                self.close()
                raise AssertionError(f"{function.__name__}: ranks {missing} did not answer within {timeout_s} s")
            for pipe in ready:
                ok, value = pipe.recv()  # type: ignore[union-attr]
                if not ok:
                    rank = pipes.index(pipe)  # type: ignore[arg-type]
                    self.close()
                    raise AssertionError(f"{function.__name__} failed on rank {rank} of {world}:\n{value}")
                results[pipe] = value  # type: ignore[index]
        return [results[pipe] for pipe in pipes]

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        self.workers = []
