"""Work in pieces that survives its process: what is finished is written down, and not done again."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rl.types import RunError

JOURNAL = "journal.jsonl"
# Hashing, reading and writing leave Python's lock alone. What a thread may hold does not depend on the machine.
MOST_THREADS = 4
THREADS = min(MOST_THREADS, len(os.sched_getaffinity(0)))
LOCK = "a conversion into {path} is under way in another process"

Receipt = dict[str, Any]  # JSON


class Job(NamedTuple):
    """`run` does it and returns what is to be remembered; `is_done` looks whether what it wrote is still there."""

    name: str
    bytes: int
    run: Callable[[], Receipt]
    is_done: Callable[[Receipt], bool]


class Journal:
    """What is finished in a directory, a line each, under the description of the whole that it is a part of.

    Another whole starts with an empty directory.
    """

    def __init__(self, directory: Path, whole: Mapping[str, Any]) -> None:
        self.path = directory / JOURNAL
        self.head = json.dumps(whole, sort_keys=True)
        self.receipts: dict[str, Receipt] = self._read()
        if not self.receipts:
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        whole_lines = [self.head, *(json.dumps([name, receipt]) for name, receipt in self.receipts.items())]
        fresh = self.path.with_suffix(".fresh")
        fresh.write_text("\n".join(whole_lines) + "\n")
        fresh.rename(self.path)

    def _read(self) -> dict[str, Receipt]:
        """Lines that a kill cut off, and those behind them, do not count."""
        lines = self.path.read_text().split("\n") if self.path.is_file() else []
        if lines[:1] != [self.head]:
            return {}
        receipts: dict[str, Receipt] = {}
        for line in lines[1:-1]:
            name, receipt = json.loads(line)
            receipts[name] = receipt
        return receipts

    def note(self, name: str, receipt: Receipt) -> None:
        """Once this returns the disk has it."""
        self.receipts[name] = receipt
        with self.path.open("a") as file:
            file.write(json.dumps([name, receipt]) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_jobs(jobs: Sequence[Job], journal: Journal, on_bytes: Callable[[int], object]) -> list[Receipt]:
    """Does what is not done; the receipts of all jobs, in their order. The longest begin first."""
    with ThreadPoolExecutor(THREADS) as threads:
        waiting = {threads.submit(_run, job, journal.receipts.get(job.name)): job for job in _longest_first(jobs)}
        try:
            for future in as_completed(waiting):
                job, receipt = waiting[future], future.result()
                if journal.receipts.get(job.name) != receipt:
                    journal.note(job.name, receipt)
                on_bytes(job.bytes)
        finally:
            for future in waiting:
                future.cancel()
    return [journal.receipts[job.name] for job in jobs]


def _run(job: Job, receipt: Receipt | None) -> Receipt:
    return receipt if receipt is not None and job.is_done(receipt) else job.run()


def _longest_first(jobs: Sequence[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: -job.bytes)


@contextmanager
def partial_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """The directory in which `target` is made; whoever makes it is alone."""
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already: name another place, or replace it with --overwrite")
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(LOCK.format(path=target)) from error
        yield partial
    except (ValueError, RunError):
        if {path.name for path in partial.iterdir()} <= {JOURNAL}:  # refused before anything was made
            shutil.rmtree(partial)
        raise
    finally:
        os.close(descriptor)
