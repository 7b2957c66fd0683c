"""A reward worker: `python -m megatron_rl.rewards.worker`, started by `RewardPool` and speaking to it over pipes.

It reads (reward name, options, import path, memory limit), answers None or (what failed, traceback), and then answers
each (prompt, rollout) with a `Reward`. A message is an 8-byte length and a pickle.

Pickles pass between the trainer and the child that it started, over two anonymous pipes that no other process has an
end of. The reward itself is the user's code with the user's rights; what it prints goes to stderr and is never read.
"""

import os
import pickle
import resource
import signal
import struct
import sys
import traceback
from typing import Any, BinaryIO

from megatron_rl.rewards.loading import as_reward, failed, load_reward
from megatron_rl.rewards.warden import OUT_OF_MEMORY, fork_under_warden

HEADER = struct.Struct("<Q")
_GIB = 1 << 30


def pack(message: object) -> bytes:
    """One message, ready for the pipe."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def main() -> None:
    """Serve one pool until it closes the pipe."""
    fork_under_warden()
    outlast_signals()
    requests, replies = _claim_pipes()
    if (hello := _read(requests)) is None:
        return
    try:
        name, options, path, memory_gb = hello
        limit_memory(memory_gb)
        sys.path += [entry for entry in path if entry not in sys.path]
        judge = load_reward(name, options)
    except Exception as error:
        _write(replies, (f"{type(error).__name__}: {error}", traceback.format_exc()))
        return
    _write(replies, None)
    shown: set[type[Exception]] = set()
    while (job := _read(requests)) is not None:
        try:
            reward = as_reward(judge(*job))
        except MemoryError:
            # What was half done when it struck (a library's cache, say) would judge the next samples: start afresh.
            os._exit(OUT_OF_MEMORY)
        except Exception as error:
            reward = failed(f"error: {type(error).__name__}: {str(error)[:500]}")
            if type(error) not in shown:  # the reason has no line number, but one traceback of a kind is enough
                shown.add(type(error))
                traceback.print_exc()
        _write(replies, reward)


def outlast_signals() -> None:
    """A batch system may signal every process of a job, to make it save and stop: the pool ends this one, not they.

    The handler does nothing, where SIG_IGN would be inherited by the commands that a reward runs.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def limit_memory(memory_gb: float | None) -> None:
    """Let the kernel refuse this process, and each that it starts, more address space than this; None: no limit."""
    if memory_gb is not None:
        limit = int(memory_gb * _GIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Take the pipes away from stdin and stdout, so that a print() in a reward cannot break the protocol."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def let_go() -> None:
        # A child forked by the reward must neither answer in our place nor hold the pipe open after our death.
        os.dup2(null, requests, inheritable=False)
        os.dup2(null, replies, inheritable=False)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=let_go)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def _read(pipe: BinaryIO) -> Any:
    """The next message; None when the pool has closed the pipe."""
    header = pipe.read(HEADER.size)
    return pickle.loads(pipe.read(HEADER.unpack(header)[0])) if len(header) == HEADER.size else None


def _write(pipe: BinaryIO, message: object) -> None:
    pipe.write(pack(message))
    pipe.flush()


if __name__ == "__main__":
    main()
