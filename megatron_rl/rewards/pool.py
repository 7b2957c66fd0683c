"""Rewards in processes of their own: a reward that hangs or crashes costs its sample, never the run.

Workers are plain subprocesses. `multiprocessing` would import the trainer's main module, and with it torch, again in
each of them.
"""

import contextlib
import logging
import math
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from megatron_rl.metrics.progress import tick
from megatron_rl.rewards.warden import MAX_PROCESSES, OUT_OF_MEMORY, STOP, TOO_MANY_PROCESSES
from megatron_rl.rewards.worker import HEADER, pack
from megatron_rl.types import Prompt, Reward, Rollout, RolloutGroup

_COMMAND = [sys.executable, "-m", "megatron_rl.rewards.worker"]
_CHUNK = 1 << 16
_GRACE_S = 15.0  # for a warden to end what the reward left

_ENDINGS = {
    OUT_OF_MEMORY: "memory",
    TOO_MANY_PROCESSES: f"crashed: more than {MAX_PROCESSES} processes",
}

log = logging.getLogger(__name__)


class RewardPool:
    """Scores responses in `workers` subprocesses, each call within `deadline_s`.

    A call that passes its deadline is killed, with every process that it started, and its worker is replaced; so is one
    that crashes, or asks for more than `memory_gb` (GiB of address space in each process). The sample's reward is then
    NaN with a reason: "timeout", "memory", "crashed: ...", "error: <Type>: <message>", "not finite" or
    "wrong type: ...". The deadline runs from when the worker has the job;
    a new worker has `start_deadline_s` to start Python and import the reward.

    Use as a context manager, and from one thread: the kernel kills the workers when the thread that started them ends.
    """

    def __init__(
        self,
        reward: str,
        options: Mapping[str, Any] | None = None,
        *,
        workers: int,
        deadline_s: float,
        memory_gb: float | None = None,
        start_deadline_s: float = 60.0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        for field, seconds in (("deadline_s", deadline_s), ("start_deadline_s", start_deadline_s)):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{field}={seconds} must be a positive, finite number of seconds")
        if memory_gb is not None and not 0 < memory_gb < math.inf:
            raise ValueError(f"memory_gb={memory_gb} must be a positive, finite number of GiB, or null for no limit")
        self._reward = reward
        self._hello = pack((reward, dict(options or {}), sys.path, memory_gb))
        self._deadline_s = deadline_s
        self._start_deadline_s = start_deadline_s
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._start_worker()
            while not all(worker.ready for worker in self._workers):
                self._wait()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill and reap every worker."""
        while self._workers:
            self._workers.pop().kill(now=True)
        self._selector.close()

    def score(self, pairs: Sequence[tuple[Prompt, Rollout]]) -> list[Reward]:
        """The reward of each pair, in order. If this raises (an interrupt, say), the pool is closed."""
        if not self._workers:
            raise ValueError("this RewardPool is closed; score inside its `with` block")
        waiting = deque(enumerate(pairs))
        rewards: dict[int, Reward] = {}
        try:
            while len(rewards) < len(pairs):
                self._assign(waiting)
                rewards.update(self._wait())
        except BaseException:
            self.close()  # a late reply must not be taken for one of the next call
            raise
        return [rewards[place] for place in range(len(pairs))]

    def _assign(self, waiting: deque[tuple[int, tuple[Prompt, Rollout]]]) -> None:
        """Give each idle worker one job: a batch of them could not keep a deadline per call."""
        for worker in [worker for worker in self._workers if worker.idle]:
            if not waiting:
                return
            place, pair = waiting[0]
            if worker.send(pack(pair), self._deadline_s):
                worker.place = place
                waiting.popleft()
            else:
                self._replace(worker)

    def _wait(self) -> dict[int, Reward]:
        """Move bytes until something happens, for a second at most; the rewards that came of it, by place."""
        tick()  # waiting here is progress: each call has its deadline
        rewards: dict[int, Reward] = {}
        # Only who was late before we looked is late: a reply may lie in the pipe while we are busy elsewhere.
        now = time.monotonic()
        soonest = min(worker.deadline for worker in self._workers)
        for key, _ in self._selector.select(min(1.0, max(0.0, soonest - now))):
            worker: _Worker = key.data
            if worker not in self._workers:
                continue  # replaced on an earlier event of this round
            if key.fd == worker.requests:
                worker.flush()
            elif (messages := worker.receive()) is None:
                rewards.update(self._replace(worker))
            else:
                for message in messages:
                    rewards.update(self._answered(worker, message))
        for worker in [worker for worker in self._workers if worker.deadline <= now]:
            rewards.update(self._replace(worker, late=True))
        return rewards

    def _answered(self, worker: "_Worker", message: Any) -> dict[int, Reward]:
        place, worker.place, worker.deadline = worker.place, None, math.inf
        if place is not None:
            return {place: message}
        if message is not None:
            failure, trace = message
            error = ValueError(f"the reward {self._reward!r} cannot start: {failure}")
            error.add_note(f"In the worker process:\n{trace}")
            raise error
        worker.ready = True
        return {}

    def _replace(self, worker: "_Worker", late: bool = False) -> dict[int, Reward]:
        """Kill `worker` and start a fresh one; the reward of the job it held, if it held one."""
        self._workers.remove(worker)
        ending = worker.kill(now=late)
        if not worker.ready:
            what = f"was not ready within start_deadline_s={self._start_deadline_s}" if late else f"ended: {ending}"
            raise ValueError(
                f"the reward {self._reward!r} cannot start: its worker {what}; look at what the module does"
            )
        self._start_worker()
        if worker.place is None:
            log.warning("an idle reward worker ended (%s) and was replaced", ending)
            return {}
        return {worker.place: Reward(value=math.nan, reason="timeout" if late else ending)}

    def _start_worker(self) -> None:
        worker = _Worker(self._selector)
        self._workers.append(worker)
        worker.send(self._hello, self._start_deadline_s)


class _Worker:
    """One subprocess: its pipes, and the place of the job it holds."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.ready = False
        self.place: int | None = None
        self.deadline = math.inf
        self._seconds = math.inf
        self._unsent = memoryview(b"")
        self._received = bytearray()
        # A session of its own: a kill reaches the children of the reward, and Ctrl-C reaches the trainer alone.
        self._process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self._replies, False)
        self._selector = selector
        selector.register(self._replies, selectors.EVENT_READ, self)

    @property
    def idle(self) -> bool:
        return self.ready and self.place is None

    def send(self, message: bytes, seconds: float) -> bool:
        """Hand over `message`, to be answered within `seconds`; False if the worker is gone already."""
        # The pipe alone cannot tell: a child that is just being forked may still hold its other end.
        if self._process.poll() is not None:
            return False
        self._unsent, self._seconds = memoryview(message), seconds
        try:
            self._write()
        except BrokenPipeError:
            return False
        if self._unsent:
            self._selector.register(self.requests, selectors.EVENT_WRITE, self)
        return True

    def flush(self) -> None:
        """Write on, now that the pipe has room."""
        with contextlib.suppress(BrokenPipeError):  # the end of its replies will tell, too
            self._write()
            if self._unsent:
                return
        self._selector.unregister(self.requests)

    def _write(self) -> None:
        """Write what the pipe takes. The clock starts over each time, so it counts from the last byte."""
        with contextlib.suppress(BlockingIOError):
            self._unsent = self._unsent[os.write(self.requests, self._unsent) :]
        self.deadline = time.monotonic() + self._seconds

    def receive(self) -> list[Any] | None:
        """The messages that are complete now; None when the worker has closed its end, which only its death does."""
        chunk = os.read(self._replies, _CHUNK)
        if not chunk:
            return None
        self._received += chunk
        messages = []
        while len(self._received) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._received)[0]
            if len(self._received) < end:
                break
            messages.append(pickle.loads(self._received[HEADER.size : end]))
            del self._received[:end]
        return messages

    def kill(self, *, now: bool) -> str:
        """Let the warden end the worker now, or as the worker has ended by itself; reap it, and name the ending."""
        for pipe in (self.requests, self._replies):
            with contextlib.suppress(KeyError):  # requests are watched only while the pipe is full
                self._selector.unregister(pipe)
        if now:
            self._process.send_signal(STOP)
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            # Before we reap it: the group's id cannot pass to another while a process of it, or its zombie, is left.
            os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        return _ENDINGS.get(code, f"crashed: signal {-code}" if code < 0 else f"crashed: exit code {code}")


def score_groups(pool: RewardPool, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups with a reward for each rollout."""
    rewards = iter(pool.score([(group.prompt, rollout) for group in groups for rollout in group.rollouts]))
    return [replace(group, rewards=tuple(islice(rewards, len(group.rollouts)))) for group in groups]


def count_failures(rewards: Iterable[Reward]) -> Counter[str]:
    """How many rewards failed, by kind: the part of the reason before the colon, with underscores."""
    reasons = (reward.reason for reward in rewards if reward.reason is not None)
    return Counter(reason.partition(":")[0].replace(" ", "_") for reason in reasons)
