"""Ends a run in which a rank has died or hangs, and says which, where it was, and what it was doing.

Each rank has a thread that writes a record of its progress (metrics/progress.py) into torchrun's store and reads the
others'. A rank whose records stop coming is out of reach: killed, stopped, or its machine is gone. If records come and
no rank has made progress, those that do not wait in a collective are the ones that hang. If the store does not answer,
this machine is cut off. No clock is compared with another machine's: a rank judges by when it saw a record change.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from megatron_rl.metrics.progress import Place, progress
from megatron_rl.parallel.mesh import world_store
from megatron_rl.parallel.stop import HUNG

BEATS = 24  # records per timeout
FRAMES = 12  # of a stack that are told
# Python calls in whose C code a rank waits for others, or for its GPU, which waits for others.
WAITS = (".wait(", ".synchronize(", ".item(", ".tolist(", ".cpu(")


class Record(NamedTuple):
    """What a rank tells the others. `beat` counts its records; the stack is that of a rank without progress."""

    beat: int
    seen: str
    step: int
    phase: str
    host: str
    pid: int
    done: bool = False
    waits: bool = False
    stack: str = ""

    @property
    def place(self) -> Place:
        return Place(self.step, self.phase)


class Verdict(NamedTuple):
    """The ranks that the run ends for, and for how many seconds nothing came of them."""

    missing: tuple[int, ...]
    reachable: bool
    seconds: float


class Observer:
    """Judges the records of all ranks, by this process's clock."""

    def __init__(self, ranks: int, timeout_s: float, now: float) -> None:
        self.timeout_s = timeout_s
        self._heard = dict.fromkeys(range(ranks), now)  # when each rank's latest record came
        self._moved = now  # when any rank last made progress
        self._records: dict[int, Record] = {}

    def observe(self, records: Mapping[int, Record], now: float) -> Verdict | None:
        """What the records say now; a rank whose record could not be had is left out of them."""
        for rank, record in records.items():
            before = self._records.get(rank)
            if before is None or before.beat != record.beat:
                self._heard[rank] = now
            # Start-up is not timed: loading a large model may take its minutes without a sign.
            if before is None or before.seen != record.seen or record.place == Place():
                self._moved = now
        self._records.update(records)
        at_work = [rank for rank in self._heard if not self.known(rank).done]
        silent = {rank: now - self._heard[rank] for rank in at_work}
        stalled = bool(at_work) and self.stalled_for(now) > self.timeout_s
        # Once nothing moves, half the time will do: a rank that can speak has sent its stack by then.
        patience = self.timeout_s / 2 if stalled else self.timeout_s
        lost = tuple(rank for rank in at_work if silent[rank] > patience)
        if lost:
            return Verdict(lost, False, min(silent[rank] for rank in lost))
        if not stalled:
            return None
        stuck = tuple(rank for rank in at_work if not self.known(rank).waits)
        return Verdict(stuck or tuple(at_work), True, self.stalled_for(now))

    def stalled_for(self, now: float) -> float:
        """Seconds without progress on any rank."""
        return now - self._moved

    def known(self, rank: int) -> Record:
        """The latest record of a rank."""
        return self._records.get(rank) or Record(0, "", 0, "", "", 0)


def message(verdict: Verdict, observer: Observer, ranks: int) -> str:
    """The missing ranks with their stacks, then where the others are."""
    many = len(verdict.missing) > 1
    names = f"rank{'s' if many else ''} {', '.join(map(str, verdict.missing))}"
    first = observer.known(verdict.missing[0])
    if not verdict.reachable:
        what = f"{names} {'have' if many else 'has'} given no sign of life for {verdict.seconds:.0f} s"
        where = f"last seen in {first.place} on {first.host or 'an unknown machine'}"
    else:
        alone = "" if ranks == 1 or len(verdict.missing) < ranks else " (each waits for the others)"
        what = f"{names} {'have' if many else 'has'} made no progress for {verdict.seconds:.0f} s{alone}"
        where = str(first.place)
    lines = [f"megatron-rl: {what}: {where}; the run ends (run.hang_timeout_s={observer.timeout_s:g})"]
    for rank in verdict.missing if verdict.reachable else ():
        lines += [f"  rank {rank}, {observer.known(rank).place}, its stack:", observer.known(rank).stack.rstrip()]
    for rank in range(ranks):
        if rank not in verdict.missing:
            record = observer.known(rank)
            state = "has ended" if record.done else "waits for others" if record.waits else "at work"
            lines.append(f"  rank {rank}, {record.place}: {state}")
    return "\n".join(lines)


def waits(stack: traceback.StackSummary) -> bool:
    """Whether a stack ends in a collective, as far as Python can tell."""
    inner = stack[-1]
    in_collective = "torch/distributed" in inner.filename.replace(os.sep, "/")
    return in_collective or any(call in (inner.line or "") for call in WAITS)


class Watchdog:
    """This rank's threads. They neither keep the process alive nor raise into it.

    One judges. Another speaks with the store, and may do so for ever: once a request is on its way, torch's store waits
    for the answer without a limit, as long as nothing closes the connection.
    """

    def __init__(self, timeout_s: float, rank: int, ranks: int, store: dist.Store | None) -> None:
        self.rank, self.ranks, self.timeout_s = rank, ranks, timeout_s
        self.interval_s = timeout_s / BEATS
        self.observer = Observer(ranks, timeout_s, time.monotonic())
        self._store, self._beat = store, 0
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._own = self._record()
        self._heard: dict[int, Record] = {}
        self._answered = time.monotonic()
        tasks = [self._watch] if store is None else [self._watch, self._exchange]
        self._threads = [threading.Thread(target=task, name="watchdog", daemon=True) for task in tasks]

    def start(self) -> None:
        self._publish(self._own)
        for thread in self._threads:
            thread.start()

    def stop(self, *, done: bool) -> None:
        """The threads end. A rank that is `done` is not missed by the others."""
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=self.interval_s + 5.0)
        if done and not any(thread.is_alive() for thread in self._threads):
            with suppress(RuntimeError):  # the store may have gone before us, with the process that held it
                self._publish(self._record()._replace(done=True))

    def _watch(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._own = self._record()
            now = time.monotonic()
            verdict = self.observer.observe({**self._heard, self.rank: self._own}, now)
            if verdict is None or self._ended.is_set():
                continue
            if self._store is not None and now - self._answered > self.timeout_s / 2:
                self._end_cut_off(now - self._answered)
            self._end(verdict)

    def _record(self) -> Record:
        self._beat += 1
        place = progress.place
        record = Record(self._beat, repr(progress.seen()), *place, socket.gethostname(), os.getpid())
        if self.observer.stalled_for(time.monotonic()) < self.timeout_s / 2:
            return record
        frame: FrameType | None = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame)
        return record._replace(waits=waits(stack), stack="".join(traceback.format_list(stack[-FRAMES:])))

    def _publish(self, record: Record) -> None:
        if self._store is not None:
            self._store.set(f"watchdog/{self.rank}", json.dumps(record))

    def _exchange(self) -> None:
        """Writes this rank's record and reads all, again and again."""
        assert self._store is not None
        while not self._ended.wait(self.interval_s):
            try:
                self._publish(self._own)
                texts: Any = self._store.multi_get([f"watchdog/{rank}" for rank in range(self.ranks)])
            except RuntimeError:
                continue  # no answer, which counts by itself
            self._heard = {rank: Record(*json.loads(text)) for rank, text in enumerate(texts)}
            self._answered = time.monotonic()

    def _end(self, verdict: Verdict) -> None:
        """One rank speaks. It ends a little later than it speaks, and the others later than it could have spoken.

        So all have come to the same verdict before a connection breaks, and nobody speaks of that.
        """
        silent = () if verdict.reachable else verdict.missing
        living = [rank for rank in range(self.ranks) if rank not in silent and not self.observer.known(rank).done]
        speaks = self.rank == min(living, default=self.rank)
        if speaks:
            print(message(verdict, self.observer, self.ranks), file=sys.stderr, flush=True)
        time.sleep((2 if speaks else 4) * self.interval_s)
        for rank in silent:
            end_sibling(self.observer.known(rank))
        os._exit(HUNG)

    def _end_cut_off(self, seconds: float) -> NoReturn:
        """What goes on elsewhere is unknown here, so one rank of each machine speaks, and it ends with its torchrun."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            store = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            what = f"rank {self.rank} has had no answer from torchrun's store at {store} for {seconds:.0f} s"
            cause = "the network to that machine, or the machine, is gone"
            print(
                f"megatron-rl: {what}: {cause}; {progress.place} on {socket.gethostname()}; the run ends "
                f"(run.hang_timeout_s={self.timeout_s:g})",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(2 * self.interval_s)
        end_torchrun()
        os._exit(HUNG)


def end_torchrun() -> None:
    """Kills the torchrun that started this process.

    It asks a store too, in torch 2.13 without a limit of time, and while it waits it sees no rank end and no SIGTERM.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.kill(os.getppid(), signal.SIGKILL)


def end_sibling(record: Record) -> None:
    """Kills a rank that cannot end by itself, if the process that started it on this machine started us too."""
    if record.host != socket.gethostname():
        return
    with suppress(OSError, IndexError):  # it has ended, or there is no /proc
        parent = Path(f"/proc/{record.pid}/stat").read_text().rpartition(")")[2].split()[1]
        if int(parent) == os.getppid():
            os.kill(record.pid, signal.SIGKILL)


@contextmanager
def watch(timeout_s: float) -> Iterator[None]:
    """The run inside is watched, unless `timeout_s` is 0. Collective."""
    progress.begin(0)
    if timeout_s == 0:
        yield
        return
    alone = dist.get_world_size() == 1
    # A connection of its own: one that waits for an answer would keep the other from asking.
    store = None if alone else world_store()
    watchdog = Watchdog(timeout_s, dist.get_rank(), dist.get_world_size(), store)
    watchdog.start()
    dist.barrier()
    done = False
    try:
        yield
        done = True
    finally:
        watchdog.stop(done=done)
