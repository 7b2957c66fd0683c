"""One vLLM server: its process, if the trainer started it, and what it is asked over HTTP."""

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from megatron_rl.config.rules import LOOPBACK
from megatron_rl.metrics.progress import tick
from megatron_rl.rollout.vllm import process
from megatron_rl.rollout.vllm.options import as_flags

CONNECT_S = 10.0
LOOK_EVERY_S = 0.25  # at a server that starts
SHOWN_LINES = 6  # of its log
GENERATED = re.compile(r"^vllm:(?:generation|prompt)_tokens_total\{[^}]*\} (\S+)$", re.MULTILINE)
# Of the trainer's processes, which a server is not one of; and what its own engine is told in process.
NOT_INHERITED = re.compile(
    r"^(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|VLLM_.*|MEGATRON_RL_.*)$"
)
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # opens the verbs for weights
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
    "HF_HUB_OFFLINE": "1",
}
OF_A_SERVER = {
    "worker_extension_cls": "megatron_rl.rollout.vllm.receiver.Receiver",
    "enable_scale_out": True,  # opens the verb for tokens
    "uvicorn_log_level": "warning",
}


class ServerError(Exception):
    """A server did not do what it was asked; perhaps it can be brought back."""


class RequestError(Exception):
    """A server refuses a request, as it will the next time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a server is started; `options` are those of `engine_options`."""

    options: Mapping[str, Any]
    host: str
    python: str | None
    gpus: tuple[int, ...]
    log: Path

    def command(self, port: int) -> list[str]:
        program = [self.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        return [*program, *as_flags({**self.options, "host": self.host, "port": port, **OF_A_SERVER})]

    def environment(self, folder: Path) -> dict[str, str]:
        """Its sockets are files in the folder."""
        own = {name: value for name, value in os.environ.items() if not NOT_INHERITED.match(name)}
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))} if self.gpus else {}
        return own | ENVIRONMENT | {"VLLM_RPC_BASE_PATH": str(folder)} | gpus


class Server:
    """`url` of a running server, or how to start one: then it has a process. `running` counts requests."""

    def __init__(self, number: int, url: str | None, launch: Launch | None) -> None:
        self.number, self.launch = number, launch
        self.url = url or ""
        self.keeper: subprocess.Popen[bytes] | None = None
        self.lock = asyncio.Lock()
        self.starts = 0  # since the weights that it was last given in time
        self.running = 0
        self.lost = False  # could not be brought back the last time
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # a proxy for the outside world is none for this host
        )

    def __str__(self) -> str:
        return f"vLLM server {self.number} at {self.url}" if self.url else f"vLLM server {self.number}"

    @property
    def is_local(self) -> bool:
        return httpx.URL(self.url).host in LOOPBACK

    def start(self, folder: Path) -> None:
        """Starts the process; returns before it answers."""
        assert self.launch is not None
        self.end()
        with socket.socket(socket.AF_INET6 if ":" in self.launch.host else socket.AF_INET) as probe:
            probe.bind((self.launch.host, 0))
            port = probe.getsockname()[1]
        host = "127.0.0.1" if self.launch.host == "0.0.0.0" else self.launch.host
        self.url = f"http://{host}:{port}"
        self.starts += 1
        self.keeper = process.start(self.launch.command(port), self.launch.environment(folder), self.launch.log, folder)

    def end(self) -> None:
        """Ends the process, if there is one."""
        if self.keeper is not None:
            process.end(self.keeper)
            self.keeper = None

    def ended(self) -> bool:
        """Whether a process that was started has ended."""
        return self.launch is not None and (self.keeper is None or self.keeper.poll() is not None)

    async def wait(self, seconds: float, needed: Callable[[], bool]) -> bool:
        """Until it answers, or is not needed; ServerError where it ends or does not answer in time."""
        for _ in range(int(seconds / LOOK_EVERY_S) + 1):
            if self.ended():
                raise ServerError(f"{self} ended while it started{self._last_words()}")
            if await self.answers():
                return True
            if not needed():
                return False
            tick()
            await asyncio.sleep(LOOK_EVERY_S)
        raise ServerError(f"{self} did not answer within {seconds:g} s{self._last_words()}")

    async def answers(self) -> bool:
        """Whether it is there and well."""
        if self.ended():
            return False
        try:
            return (await self.client.get(f"{self.url}/health", timeout=CONNECT_S)).status_code == 200
        except httpx.TransportError:
            return False

    async def label(self) -> str:
        """Of the weights it holds."""
        return str((await self._ask("GET", "/weight_info", CONNECT_S))["weight_version"])

    async def workers(self) -> int:
        """Processes that the model is cut over."""
        return int((await self._ask("GET", "/get_world_size", CONNECT_S))["world_size"])

    async def take(self, method: str, arguments: Sequence[str], label: str, seconds: float) -> dict[str, int]:
        """Requests in flight are held, weights taken in place, what old weights computed dropped; requests go on.

        `method` of `Receiver` takes them. Returns the checksum of each tensor that arrived.
        """
        await self._ask("POST", "/pause?mode=keep", seconds)
        body = {"method": method, "args": list(arguments)}
        taken: list[dict[str, int]] = (await self._ask("POST", "/collective_rpc", seconds, body))["results"]
        if any(other != taken[0] for other in taken):
            raise ServerError(f"the workers of {self} did not take the same weights")
        await self._ask("POST", "/update_weight_version", seconds, {"new_version": label})
        reset = await self._ask("POST", "/reset_prefix_cache?reset_running_requests=true", seconds)
        if not reset["success"]:
            raise ServerError(f"{self} did not reset its prefix cache after a weight update")
        await self._ask("POST", "/resume", seconds)
        return taken[0]

    async def generate(self, token_ids: Sequence[int], parameters: dict[str, Any]) -> list[dict[str, Any]]:
        """The responses of a group: tokens, log_probs, finish_reason, and of each run of tokens (the first, label)."""
        self.running += 1
        try:
            body = {"token_ids": list(token_ids), "sampling_params": parameters}
            choices = (await self._ask("POST", "/inference/v1/generate", None, body))["choices"]
        finally:
            self.running -= 1
        return [self._response(choice) for choice in sorted(choices, key=lambda choice: int(choice["index"]))]

    def _response(self, choice: dict[str, Any]) -> dict[str, Any]:
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerError(f"{self} ended a response by {choice['finish_reason']!r}")
        return {
            "tokens": choice["token_ids"],
            "log_probs": [entry["logprob"] for entry in choice["logprobs"]["content"]],
            "finish_reason": choice["finish_reason"],
            "labels": [(span["start"], span["version"]) for span in choice["weight_versions"]],
        }

    async def tokens(self, seconds: float) -> float:
        """Read and drawn since it started: a number that grows as long as it works."""
        text = await self._send("GET", "/metrics", seconds)
        return sum(map(float, GENERATED.findall(text.text)))

    async def _ask(self, verb: str, path: str, seconds: float | None, body: Any = None) -> Any:
        return (await self._send(verb, path, seconds, body)).json()

    async def _send(self, verb: str, path: str, seconds: float | None, body: Any = None) -> httpx.Response:
        try:
            answer = await self.client.request(
                verb, self.url + path, json=body, timeout=httpx.Timeout(seconds, connect=CONNECT_S)
            )
        except httpx.TimeoutException as error:
            raise ServerError(f"{self} did not answer {path} within {seconds or CONNECT_S:g} s") from error
        except httpx.TransportError as error:
            raise ServerError(f"{self} broke off {path}: {type(error).__name__}{self._last_words()}") from error
        if 400 <= answer.status_code < 500:
            hint = " (docs/vllm.md says how a server is started)" if answer.status_code in (403, 404) else ""
            raise RequestError(f"{self} refuses {path} ({answer.status_code}){hint}: {answer.text[:500]}")
        if answer.status_code != 200:
            raise ServerError(f"{self} failed at {path} ({answer.status_code}): {answer.text[:500]}")
        return answer

    def _last_words(self) -> str:
        """The end of its log, if it was started and has ended."""
        if self.launch is None or not self.ended() or not self.launch.log.exists():
            return ""
        lines = self.launch.log.read_text(errors="replace").strip().splitlines()[-SHOWN_LINES:]
        return f"; the last lines of {self.launch.log}:\n" + "\n".join(lines)
