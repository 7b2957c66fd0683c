"""Rewards in processes of their own: a reward that hangs or crashes costs its sample, never the run.

Workers are plain subprocesses. `multiprocessing` would import the trainer's main module, and with it torch, again in
each of them.
"""

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

from megatron_rl.rewards.worker import HEADER, pack
from megatron_rl.types import Prompt, Reward, Rollout, RolloutGroup

_COMMAND = [sys.executable, "-m", "megatron_rl.rewards.worker"]
_CHUNK = 1 << 16

log = logging.getLogger(__name__)


class RewardPool:
    """Scores responses in `workers` subprocesses, each call within `deadline_s`.

    A call that passes its deadline is killed, with every process it started in its process group, and its worker is
    replaced; a crash likewise. The sample's reward is then NaN with a reason: "timeout", "crashed: ...",
    "error: <Type>: <message>", "not finite" or "wrong type: ...". The deadline runs from when the worker has the job;
    a new worker has `start_deadline_s` to start Python and import the reward. Use as a context manager, from one thread.
    """

    def __init__(
        self,
        reward: str,
        options: Mapping[str, Any] | None = None,
        *,
        workers: int,
        deadline_s: float,
        start_deadline_s: float = 60.0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        for field, seconds in (("deadline_s", deadline_s), ("start_deadline_s", start_deadline_s)):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{field}={seconds} must be a positive, finite number of seconds")
        self._reward = reward
        self._hello = pack((reward, dict(options or {}), sys.path))
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
            self._workers.pop().kill()
        self._selector.close()

    def score(self, pairs: Sequence[tuple[Prompt, Rollout]]) -> list[Reward]:
        """The reward of each pair, in order. If this raises (an interrupt, say), the pool is closed."""
        if not self._workers:
            raise ValueError("this RewardPool is closed; score inside its `with` block")
        waiting = deque(enumerate(pairs))
        rewards: dict[int, Reward] = {}
        try:
            while len(rewards) < len(pairs):
                for worker in [worker for worker in self._workers if worker.idle]:
                    if waiting:
                        self._assign(worker, *waiting.popleft())
                rewards.update(self._wait())
        except BaseException:
            self.close()  # a late reply must not be taken for one of the next call
            raise
        return [rewards[place] for place in range(len(pairs))]

    def _start_worker(self) -> None:
        worker = _Worker(self._selector)
        self._workers.append(worker)
        worker.send(self._hello, self._start_deadline_s)

    def _replace(self, worker: "_Worker") -> str:
        """Kill `worker`, start a fresh one, and say how the old one ended."""
        self._workers.remove(worker)
        ending = worker.kill()
        self._start_worker()
        return ending

    def _assign(self, worker: "_Worker", place: int, pair: tuple[Prompt, Rollout]) -> None:
        worker.place = place
        worker.send(pack(pair), self._deadline_s)

    def _wait(self) -> dict[int, Reward]:
        """Move bytes until something happens; the rewards it brought, by place."""
        rewards: dict[int, Reward] = {}
        soonest = min(worker.deadline for worker in self._workers)
        for key, _ in self._selector.select(max(0.0, soonest - time.monotonic())):
            worker: _Worker = key.data
            if worker not in self._workers:
                continue  # replaced on an earlier event of this round
            if key.fd == worker.requests:
                worker.flush()
            elif not worker.receive():
                rewards.update(self._ended(worker))
            elif (message := worker.take()) is not _NOTHING:
                rewards.update(self._answered(worker, message))
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.deadline <= now]:
            rewards.update(self._late(worker))
        return rewards
