"""Signals that ask a process to stop, in processes of their own."""

import signal
import subprocess
import sys

# The main thread sits in one call into C, as it would in a collective: no Python handler runs there.
ASKED = """
import os, signal, sys, threading, time
from megatron_rl.parallel.stop import StopRequest

assert "torch" not in sys.modules
before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
with StopRequest(announce=True) as stop:
    assert not stop.asked
    ready, is_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(is_ready, b"!")
        time.sleep(0.5)
        os._exit(7)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not stop.asked
    threading.Timer(0.2, lambda: [os.kill(os.getpid(), signal.SIGUSR1) for _ in range(3)]).start()
    seen = []
    threading.Timer(0.7, lambda: seen.append(stop.signal)).start()
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=0.9)
    assert seen == [signal.SIGUSR1] and stop.asked, seen
assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
assert signal.set_wakeup_fd(-1) == -1 and threading.active_count() == 1
print("done")
"""

TWICE = """
import os, signal, threading, time
from megatron_rl.parallel.stop import BURST_S, StopRequest

with StopRequest(announce=False):
    for seconds, number in ((0.1, signal.SIGTERM), (0.2, signal.SIGTERM), (0.3 + BURST_S, signal.SIGUSR1)):
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()  # for ever
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_signal_is_noticed_while_the_main_thread_waits() -> None:
    """A burst is one signal, a forked child's does nothing, and afterwards all is as it was."""
    done = python(ASKED)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr == (
        "megatron-rl: SIGUSR1: the run saves and stops at the next step boundary; a second signal ends it at once\n"
    )


def test_a_second_signal_ends_the_process() -> None:
    done = python(TWICE)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGUSR1, "", "")
