"""What a process does before it is a rank: it ties its life to those around it."""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from megatron_rl.launch.torchrun import CHECKED, under_torchrun
from megatron_rl.metrics.progress import NOTES, progress
from megatron_rl.parallel.stop import LOST, STOP_SIGNALS
from megatron_rl.rewards.warden import die_with_parent


def enter(*, stops_gracefully: bool) -> None:
    """No rank outlives torchrun, and no helper that it forks outlives a rank. Ctrl-C ends a rank without a traceback.

    What started this process may have blocked the signals that ask a run to stop, until the run listens to them; what
    does not listen is ended by them.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.register_at_fork(after_in_child=die_with_parent)
    if under_torchrun():
        die_with_parent()
        if os.environ.get(CHECKED, str(os.getppid())) != str(os.getppid()):
            os._exit(LOST)  # it had died before we could say so
        if folder := os.environ.get(NOTES):
            progress.note_in(Path(folder) / os.environ["RANK"])
    if not stops_gracefully:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def lost_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has gone: that one has something to say, this one has not."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
    return any(sign in str(error) for sign in signs)


def leave() -> NoReturn:
    """Ends this rank where it lost another one, with one line where nobody else tells the whole story."""
    if NOTES not in os.environ:
        rank = os.environ.get("RANK", "0")
        print(f"megatron-rl: rank {rank} lost another rank in {progress.place}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # At once: what libraries do at exit may wait for the one that is gone.
    os._exit(LOST)
