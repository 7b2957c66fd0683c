"""Several servers as one: requests are balanced over them, the dead are brought back, none answers with old weights.

Everything runs in one event loop in a thread of its own, so that answers come in while the caller does other work.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from megatron_rl.metrics.progress import tick
from megatron_rl.rollout.vllm.receiver import FROM_BROADCAST, FROM_FILES, TIED
from megatron_rl.rollout.vllm.server import RequestError, Server, ServerError
from megatron_rl.types import RunError

T = TypeVar("T")
Answer = list[dict[str, Any]]  # the responses of a group, as `Server.generate` has them

MOST_TRIES = 5  # of one request
LOOK_EVERY_S = 2.0  # at a server that works


class Stall(ServerError):
    """A server has requests and does nothing."""


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, and how the group of its responses is drawn."""

    token_ids: tuple[int, ...]
    parameters: dict[str, Any]


@dataclass(slots=True)
class Batch:
    """Jobs that are answered together. Each is answered once: it waits, is in one server's hands, or is done."""

    jobs: Sequence[Job]
    answers: dict[int, Answer] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    waiting: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        for number in range(len(self.jobs)):
            self.waiting.put_nowait(number)
        if not self.jobs:
            self.done.set()

    def answer(self, number: int, answer: Answer) -> None:
        tick()
        self.answers[number] = answer
        if len(self.answers) == len(self.jobs):
            self.done.set()


class Fleet:
    """A server has as many requests in flight as fill it twice; then the next that waits goes where one is answered.

    So the faster do more, and a group of which one response is long leaves no hole. `max_sequences` fill a server.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        folder: Path,
        *,
        tied: bool,
        max_sequences: int,
        start_timeout_s: float,
        timeout_s: float,
        restarts: int,
    ) -> None:
        self.servers, self.folder, self.max_sequences = list(servers), folder, max_sequences
        self.output = TIED if tied else "own"
        self.start_timeout_s, self.timeout_s, self.restarts = start_timeout_s, timeout_s, restarts
        self.label = ""  # of the weights that servers must have
        self.kept = True  # in the folder
        self.checksums: Mapping[str, int] = {}
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, name="vllm-fleet", daemon=True)
        self.thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts `update` or `answer`."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def update(self, label: str) -> None:
        """Brings what the folder holds to every server; `label` is its own."""
        self.label, self.checksums = label, {}
        for server in self.servers:
            server.starts = 0
        self._raise_if_all_are_lost(await asyncio.gather(*(self._bring(server) for server in self.servers)))

    async def gather(self, label: str) -> list[tuple[Server, int]]:
        """The servers that are up, and the workers of each: those that have ended are started. For `take_broadcast`."""
        self.label, self.checksums, self.kept = label, {}, False
        for server in self.servers:
            server.starts = 0
        losses = await asyncio.gather(*(self._bring(server, holding=False) for server in self.servers))
        self._raise_if_all_are_lost(losses)
        there = [server for server, loss in zip(self.servers, losses) if loss is None]
        return list(zip(there, await asyncio.gather(*(server.workers() for server in there))))

    async def take_broadcast(self, there: Sequence[tuple[Server, int]], host: str, port: int, seconds: float) -> None:
        """Has them take what is sent to them; RunError where one did not."""
        first, size = 1, 1 + sum(workers for _, workers in there)
        work = []
        for server, workers in there:
            place = [host, str(port), str(first), str(size), str(seconds)]
            work.append(self._give(server, FROM_BROADCAST, [self.output, *place]))
            first += workers
        try:
            await asyncio.gather(*work)
        except (ServerError, RequestError) as error:
            raise RunError(f"the weights did not reach the servers, and none keeps them: {error}") from error

    async def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """The answers, in order."""
        batch = Batch(jobs)
        work = [asyncio.create_task(self._work(server, batch)) for server in self.servers]
        try:
            self._raise_if_all_are_lost(await asyncio.gather(*work))
        finally:
            await _cancel(work)
        return [batch.answers[number] for number in range(len(jobs))]

    def close(self) -> None:
        """Ends the servers that were started."""
        for server in self.servers:
            server.end()
        self.submit(_close(self.servers)).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    @staticmethod
    def _raise_if_all_are_lost(losses: Sequence[str | None]) -> None:
        if all(losses):
            raise RunError(f"no vLLM server is left: {losses[0]}")

    async def _bring(
        self, server: Server, needed: Callable[[], bool] = lambda: True, *, holding: bool = True
    ) -> str | None:
        """Up and `holding` the weights; or why that cannot be reached. Gives up where it is no longer needed."""
        async with server.lock:
            while True:
                try:
                    if await self._bring_up(server, needed) and holding and await server.label() != self.label:
                        if not self.kept:
                            return f"{server} does not have the weights, and nobody keeps them"
                        await self._give(server, FROM_FILES, [self.output, str(self.folder), self.label])
                    server.lost = False
                    return None
                except RequestError as error:
                    raise RunError(str(error)) from error
                except ServerError as error:
                    if server.launch is None or server.starts > self.restarts:
                        server.lost = True
                        return str(error)
                    _tell(f"{error}; it is started again")
                    await asyncio.to_thread(server.end)

    async def _bring_up(self, server: Server, needed: Callable[[], bool]) -> bool:
        if await server.answers():
            return True
        if server.launch is not None:
            if server.starts > self.restarts:
                raise ServerError(f"{server} has ended {server.starts} times since the last weight update")
            _tell(f"starting vLLM server {server.number}; what it prints is in {server.launch.log}")
            await asyncio.to_thread(server.start, self.folder)
        # A running one that was lost may be back; it is not waited for.
        missed = server.lost and server.launch is None
        return await server.wait(0 if missed else self.start_timeout_s, needed)

    async def _give(self, server: Server, method: str, arguments: Sequence[str]) -> None:
        work = asyncio.create_task(server.take(method, arguments, self.label, self.start_timeout_s))
        while not (await asyncio.wait({work}, timeout=LOOK_EVERY_S))[0]:
            tick()
        taken = work.result()
        if self.checksums and taken != self.checksums:
            raise ServerError(f"{server} did not take the weights that another took")
        self.checksums = taken

    async def _work(self, server: Server, batch: Batch) -> str | None:
        """Answers what waits, until all is answered by this server or others; or why this one is lost."""
        while not batch.done.is_set():
            if loss := await self._bring(server, lambda: not batch.done.is_set()):
                return self._lost(server, loss)
            done = asyncio.create_task(batch.done.wait())
            parts: list[asyncio.Task[Any]] = [done, asyncio.create_task(self._watch(server))]
            parts += [asyncio.create_task(self._slot(server, batch)) for _ in range(self._slots(batch))]
            try:
                ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                for part in ended:
                    part.result()
            except RequestError as error:
                raise RunError(str(error)) from error
            except Stall as error:
                if server.launch is None:
                    return self._lost(server, str(error))
                _tell(f"{error}; it is started again")
                await asyncio.to_thread(server.end)
            except ServerError as error:
                _tell(f"{error}; its requests wait for it or go to others")
            finally:
                await _cancel(parts)
        return None

    def _slots(self, batch: Batch) -> int:
        largest = max(job.parameters["n"] for job in batch.jobs)
        return 2 * ceil(self.max_sequences / largest)

    def _lost(self, server: Server, loss: str) -> str:
        server.lost = True
        if len(self.servers) > 1:
            _tell(f"{loss}; the run goes on without it")
        return loss

    async def _slot(self, server: Server, batch: Batch) -> None:
        """One request after another."""
        while True:
            number = await batch.waiting.get()
            try:
                job = batch.jobs[number]
                batch.answer(number, await server.generate(job.token_ids, job.parameters))
            except ServerError as error:
                batch.waiting.put_nowait(number)
                batch.tries[number] = batch.tries.get(number, 0) + 1
                if batch.tries[number] == MOST_TRIES:
                    raise RunError(f"a request failed {MOST_TRIES} times, the last time because {error}") from error
                if not await server.answers():
                    raise
            except BaseException:
                batch.waiting.put_nowait(number)
                raise

    async def _watch(self, server: Server) -> None:
        """Raises where the process ends, or for `timeout_s` no token is read or drawn though requests are there."""
        loop = asyncio.get_running_loop()
        before, since = -1.0, loop.time()
        while True:
            await asyncio.sleep(min(LOOK_EVERY_S, self.timeout_s / 4))
            if server.ended():
                raise ServerError(f"{server} has ended")
            try:
                tokens = await server.tokens(self.timeout_s)
            except ServerError:
                tokens = before
            if tokens != before or not server.running or server.lock.locked():
                tick()
                before, since = tokens, loop.time()
            elif loop.time() - since > self.timeout_s:
                raise Stall(f"{server} has not moved for {self.timeout_s:g} s")


async def _cancel(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _close(servers: Sequence[Server]) -> None:
    for server in servers:
        await server.client.aclose()


def _tell(text: str) -> None:
    print(f"megatron-rl: {text}", file=sys.stderr, flush=True)
