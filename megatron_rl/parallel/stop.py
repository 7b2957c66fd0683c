"""How a run ends before its time: by a signal, or with an exit code that says that another rank is to blame.

SIGTERM and SIGUSR1 ask it to stop; its loop looks at each step boundary whether any rank has been asked. A second
signal ends the process at once. Without torch, so that what starts the ranks can use it too.
"""

import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A batch system signals every process of a job, and what started a rank passes the same signal on to it.
BURST_S = 1.0


# Exit codes of a rank that is not the cause itself: a rank hangs or is out of reach; a connection to another broke.
HUNG, LOST = 3, 4


class StopRequest:
    """Whether a signal has asked this process to stop. Use as a context manager, in the main thread.

    Python runs a signal's handler between two instructions of the main thread, which may wait in a collective for
    minutes. So the kernel's side of it writes the signal's number into a pipe, and a thread reads it.
    """

    def __init__(self, *, announce: bool) -> None:
        self.announce = announce
        self.signal: signal.Signals | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def first(self, number: signal.Signals) -> None:
        """What the thread does about the first signal."""
        if self.announce:
            announce(number)

    def second(self, number: signal.Signals) -> None:
        """What it does about a later one."""
        os._exit(128 + number)

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # Whoever starts ranks blocks these signals until here, so that none is lost.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _listen(self) -> None:
        since = 0.0
        while (number := os.read(self._read, 1)[0]) != 0:
            if number not in STOP_SIGNALS:
                continue  # a handler of someone else's
            if self.signal is None:
                self.signal, since = signal.Signals(number), time.monotonic()
                self.first(self.signal)
            elif time.monotonic() - since > BURST_S:
                self.second(signal.Signals(number))


def announce(number: signal.Signals) -> None:
    """Says what happens after the first signal."""
    what = "the run saves and stops at the next step boundary; a second signal ends it at once"
    print(f"megatron-rl: {number.name}: {what}", file=sys.stderr, flush=True)


# A helper that a library forks keeps the handlers, which do nothing: a signal to the whole job is for the rank alone.
# It must not write into its parent's pipe either.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
