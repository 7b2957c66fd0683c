"""What ends with the trainer, however it ends: servers, and the folder of weights.

    python -m megatron_rl.rollout.vllm.process TRAINER FOLDER [COMMAND...]

    trainer -> keeper -> warden -> server and what it starts

With a command, a keeper of a server: the warden sees to it that no process of it is left, and no shared memory where
the kernel lets it (`rewards/warden.py`). Without one, a keeper of the folder, which it removes.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rl.rewards.warden import STOP, fork_under_warden, private_shared_memory

_PR_SET_PDEATHSIG = 1
_ROOT = Path(__file__).parents[3]


def start(command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A keeper. What its server prints goes to the end of `log`."""
    path = os.pathsep.join(filter(None, [str(_ROOT), environment.get("PYTHONPATH")]))
    keeper = [sys.executable, "-m", __name__, str(os.getpid()), str(folder), *command]
    with log.open("ab") as output:
        return subprocess.Popen(
            keeper,
            env={**environment, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(keeper: subprocess.Popen[bytes]) -> None:
    """Ends what is kept at once, and waits until nothing of it is left."""
    if keeper.poll() is None:
        keeper.send_signal(STOP)
    keeper.wait()


def main() -> None:
    trainer, folder, *command = sys.argv[1:]
    # A batch system may signal every process of a job, to make it save and stop: the trainer ends this one, not they.
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP, signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, STOP)
    orphaned = os.getppid() != int(trainer)
    if not command:
        if not orphaned:
            signal.sigwait({STOP})
        shutil.rmtree(folder, ignore_errors=True)
        return
    if (warden := os.fork()) == 0:
        if fork_under_warden():
            private_shared_memory(folder)
        os.execvp(command[0], command)
    if orphaned or signal.sigwait({STOP, signal.SIGCHLD}) == STOP:
        os.kill(warden, STOP)
    _, status = os.waitpid(warden, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    main()
