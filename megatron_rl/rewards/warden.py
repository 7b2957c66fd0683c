"""A warden for each reward worker: when the worker ends, or shall end, no process that came of it is left.

`killpg` misses a child that made a session of its own. Where the kernel lets us, the worker therefore lives in a PID
namespace: when the first process of one ends, the kernel kills all others, whatever they did (pid_namespaces(7)).

    pool -> warden -> init (process 1 of the namespace) -> worker -> what the reward starts

Elsewhere (containers often forbid namespaces) the warden adopts every orphan below it (PR_SET_CHILD_SUBREAPER) and
kills its descendants until it finds none. None of the reward's code runs in the warden or in the init.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path

STOP = signal.SIGHUP  # what the pool sends; its default action is silent, should it come before the warden listens
OUT_OF_MEMORY = 86  # exit codes, which the pool reads
TOO_MANY_PROCESSES = 87
MAX_PROCESSES = 256  # in one namespace; a fork bomb ends here, not with its deadline
_COUNT_EVERY_S = 0.1
_SWEEP_S = 10.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 1 << 18
_STATUS = struct.Struct("<i")


def fork_under_warden() -> bool:
    """Returns in a child, which is the worker. This process becomes its warden and ends as the worker ends.

    Whether the child has namespaces of its own.
    """
    if sys.platform != "linux":
        return False
    signal.signal(STOP, signal.SIG_DFL)  # a trainer under nohup has it ignored
    # The kernel tells the warden, not the worker, when the trainer dies: it has more to end than itself.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, STOP)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a reward that crashes is no news worth a core file, nor are we
    if apart := _unshare():
        reports, report = os.pipe()
        if (init := os.fork()) != 0:
            os.close(report)
            _watch_init(init, reports)
        os.close(reports)
        die_with_parent()
        own_proc = _mount_proc()
        if (worker := os.fork()) != 0:
            _be_init(worker, report, own_proc)
        os.close(report)
    else:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        if (worker := os.fork()) != 0:
            _watch_worker(worker)
        die_with_parent()
    # The kernel's out-of-memory killer shall take a reward, or what it started, before the trainer.
    Path("/proc/self/oom_score_adj").write_text("1000")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return apart


def private_shared_memory(shared: str) -> None:
    """In namespaces of its own: a /dev/shm that goes with them, in which only the folder `shared` is the old one's.

    Where the kernel refuses that, all stays as it is.
    """
    libc = ctypes.CDLL(None)
    folder, where = os.open(shared, os.O_PATH), b"/dev/shm"
    private = libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
    if private and libc.mount(b"tmpfs", where, b"tmpfs", _MS_NOSUID | _MS_NODEV, None) == 0:
        Path(shared).mkdir(exist_ok=True)
        if libc.mount(f"/proc/self/fd/{folder}".encode(), os.fsencode(shared), None, _MS_BIND, None) != 0:
            libc.umount(where)
    os.close(folder)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, even by SIGKILL and in the middle of a call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _unshare() -> bool:
    """Let the next child be the first process of a PID namespace: as root, or else in a user namespace of our own."""
    libc = ctypes.CDLL(None)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWPID | _CLONE_NEWNS) == 0:
        return True
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWPID | _CLONE_NEWNS) != 0:
        return False
    # The worker stays who it is: its own user and group are the only ones that the namespace knows.
    for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(content)
    return True


def _mount_proc() -> bool:
    """A /proc of this namespace, so that /proc/<os.getpid()> is what a library expects; some containers refuse it."""
    libc = ctypes.CDLL(None)
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    private = libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
    return private and libc.mount(b"proc", b"/proc", b"proc", flags, None) == 0


def _be_init(worker: int, report: int, own_proc: bool) -> None:
    """Reap until the worker ends, report how, and end: the kernel kills whoever is left in the namespace."""
    _let_go_of_pipes()
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, _COUNT_EVERY_S)
        for pid, status in _reap().items():
            if pid == worker:
                os.write(report, _STATUS.pack(status))
                os._exit(0)
        # The process that forks without end may leave us the processor late: who is counted then is killed as well.
        if own_proc and sum(map(str.isdigit, os.listdir("/proc"))) > MAX_PROCESSES:
            os.write(report, _STATUS.pack(TOO_MANY_PROCESSES << 8))
            os._exit(0)


def _watch_init(init: int, reports: int) -> None:
    """Wait for the end of the namespace, or bring it about."""
    _let_go_of_pipes()
    if signal.sigwait({STOP, signal.SIGCHLD}) == STOP:
        os.kill(init, signal.SIGKILL)
    _, status = os.waitpid(init, 0)  # returns when the namespace is empty
    if len(message := os.read(reports, _STATUS.size)) == _STATUS.size:
        (status,) = _STATUS.unpack(message)
    _end_like(status)


def _watch_worker(worker: int) -> None:
    """Without a namespace: wait for the worker's end or for the word to stop, then end all descendants."""
    _let_go_of_pipes()
    ended: dict[int, int] = {}
    while worker not in ended and signal.sigwait({STOP, signal.SIGCHLD}) != STOP:
        ended |= _reap()
    end = time.monotonic() + _SWEEP_S  # against processes that fork faster than we kill
    while (found := _descendants(os.getpid())) and time.monotonic() < end:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue  # it has ended, or has become another user
        ended |= _reap()
    _end_like(ended.get(worker, signal.SIGKILL))


def _let_go_of_pipes() -> None:
    """The pool learns of the worker's death from the end of its pipes, so nobody else may hold them."""
    null = os.open(os.devnull, os.O_RDWR)
    for pipe in (0, 1):
        os.dup2(null, pipe)


def _reap() -> dict[int, int]:
    """The children that have ended, and how."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def _descendants(ancestor: int) -> list[int]:
    """All processes below `ancestor`, zombies too, from one look at /proc."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        children.setdefault(int(fields[1]), []).append(int(entry))
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def _end_like(status: int) -> None:
    """End as the worker did, so that the pool sees its exit code or signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))
