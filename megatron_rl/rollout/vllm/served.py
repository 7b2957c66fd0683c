"""The engine that asks vLLM servers: those it starts beside rank 0, or running ones.

Weights pass through files in shared memory, or in a folder on a filesystem that the servers share. They stay there
until the next version: a server that dies gets them again.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_rl.metrics.progress import tick
from megatron_rl.parallel.collect import from_first_rank
from megatron_rl.parallel.device import device
from megatron_rl.rollout.engine import Sampling
from megatron_rl.rollout.vllm import broadcast, process
from megatron_rl.rollout.vllm.fleet import Answer, Fleet, Job
from megatron_rl.rollout.vllm.requests import Answers, sampling_parameters
from megatron_rl.rollout.vllm.server import Launch, Server
from megatron_rl.rollout.vllm.weights import WeightFiles
from megatron_rl.types import Prompt, Rollout, RolloutGroup, RunError

T = TypeVar("T")

SHARED_MEMORY = Path("/dev/shm")


class ServedEngine:
    """Answers from servers; see the module. Rank 0 speaks with them, and tells the others."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        stop: tuple[int, ...],
        tied: bool,
        max_sequences: int,
        servers: Sequence[str | Launch],
        exchange: str | None,
        start_timeout_s: float,
        timeout_s: float,
        restarts: int,
        broadcast: bool = False,
    ) -> None:
        self.broadcast, self.timeout_s = broadcast, timeout_s
        self.answers, self.dtype = Answers(tokenizer, stop), dtype
        self.device = device() if broadcast else torch.device("cpu")
        self.takes = dist.get_rank() == 0
        self.version = -1
        self.drawing: ServedDrawing | None = None  # the last one
        self.fleet: Fleet | None = None
        if self.takes:
            parent = exchange or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
            self.folder = Path(tempfile.mkdtemp(prefix="megatron_rl-", dir=parent))
            self.files = WeightFiles(self.folder)
            self.keeper = process.start([], os.environ, Path(os.devnull), self.folder)
            self.fleet = Fleet(
                [_server(number, server) for number, server in enumerate(servers)],
                self.folder,
                tied=tied,
                max_sequences=max_sequences,
                start_timeout_s=start_timeout_s,
                timeout_s=timeout_s,
                restarts=restarts,
            )

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self.drawing is not None:
            self.drawing.wait()
        mine = self._in_my_precision(weights)
        problem: RunError | None = None
        if self.fleet is not None:
            try:
                (self._broadcast if self.broadcast else self._write)(self.fleet, mine, self._label(version))
            except RunError as error:
                problem = error
        for _ in mine:  # what was not read: the other ranks are in the midst of it
            pass
        self.on_first(lambda _: _raise(problem))
        self.version = version

    def _write(self, fleet: Fleet, weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        self.files.write(weights, label)
        fleet.submit(fleet.update(label)).result()

    def _broadcast(self, fleet: Fleet, weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        """Straight into the servers' workers. One that is not reached ends the run, which has a checkpoint."""
        there = fleet.submit(fleet.gather(label)).result()
        host = "127.0.0.1" if all(server.is_local for server, _ in there) else socket.getfqdn()
        store = broadcast.open_store(host, self.timeout_s)
        taking = fleet.submit(fleet.take_broadcast(there, host, store.port, self.timeout_s))
        try:
            size = 1 + sum(workers for _, workers in there)
            broadcast.send(weights, store, broadcast.join(store, 0, size, device(), self.timeout_s))
        except RuntimeError as error:
            taking.result()  # says more, if a server does
            raise RunError(f"the weights could not be sent to the servers: {error}") from error
        taking.result()

    def _label(self, version: int) -> str:
        """Of this engine alone: a running server may hold weights of another run with the same version."""
        return f"{self.folder.name}:{version}"

    def _in_my_precision(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            tick()
            yield name, tensor.to(self.dtype)

    def checksums(self, names: Iterable[str]) -> dict[str, int]:
        """Of what the servers took; they keep tensors fused and packed, which `rollout/log_prob_gap_*` look at."""
        taken = self.on_first(lambda fleet: dict(fleet.checksums))
        return {name: taken[name] for name in names}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        return self.start(prompts, sampling).groups()

    def start(self, prompts: Sequence[Prompt], sampling: Sampling) -> "ServedDrawing":
        self.drawing = ServedDrawing(self, prompts, sampling)
        return self.drawing

    def on_first(self, work: Callable[[Fleet], T]) -> T:
        """What rank 0 gets of the servers, on every rank; and so an error that is told of a run."""
        outcome: tuple[T | None, str | None] = None, None
        if self.fleet is not None:
            try:
                outcome = work(self.fleet), None
            except RunError as error:
                outcome = None, str(error)
        value, problem = from_first_rank(outcome)
        if problem is not None:
            raise RunError(problem)
        return value  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the servers that were started, and removes the weights."""
        if self.fleet is not None:
            self.fleet.close()
            process.end(self.keeper)


class ServedDrawing:
    """Answers that servers are drawing; rank 0 waits for them."""

    def __init__(self, engine: ServedEngine, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self.engine, self.prompts, self.sampling = engine, prompts, sampling
        self.seconds = 0.0
        self._answers: Future[list[Answer]] | None = None
        if engine.fleet is not None:
            self._answers = engine.fleet.submit(self._timed(engine.fleet))

    def wait(self) -> None:
        """Until they are there, or an error is, which `groups` raises."""
        if self._answers is not None:
            self._answers.exception()

    def groups(self) -> list[RolloutGroup]:
        groups, self.seconds = self.engine.on_first(lambda fleet: (self._groups(), self.seconds))
        return groups

    async def _timed(self, fleet: Fleet) -> list[Answer]:
        start = perf_counter()
        answers = await fleet.answer(self._jobs())
        self.seconds = perf_counter() - start
        return answers

    def _jobs(self) -> list[Job]:
        stop = self.engine.answers.stop
        return [
            Job(prompt.token_ids, sampling_parameters(self.sampling, place, stop))
            for place, prompt in enumerate(self.prompts)
        ]

    def _groups(self) -> list[RolloutGroup]:
        assert self._answers is not None
        return [
            RolloutGroup(
                prompt=prompt,
                rollouts=tuple(self._record(prompt, sample, response) for sample, response in enumerate(responses)),
            )
            for prompt, responses in zip(self.prompts, self._answers.result(), strict=True)
        ]

    def _record(self, prompt: Prompt, sample: int, response: dict[str, Any]) -> Rollout:
        return self.engine.answers.record(
            prompt.index,
            sample,
            response["tokens"],
            response["log_probs"],
            response["finish_reason"],
            greedy=not self.sampling.temperature,
            versions=[(first, int(label.rpartition(":")[2])) for first, label in response["labels"]],
        )


def _raise(problem: RunError | None) -> None:
    if problem is not None:
        raise problem


def _server(number: int, server: str | Launch) -> Server:
    if isinstance(server, Launch):
        return Server(number, None, server)
    return Server(number, server.rstrip("/"), None)
