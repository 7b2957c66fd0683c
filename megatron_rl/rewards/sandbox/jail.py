"""The jail: a clean interpreter that forks a child behind walls for each run. Started by `client`.

A request is a message on the socket at descriptor 0, with four descriptors: the job (JSON), the program's input, and
two empty files for its output and its report. The answer is how the child ended. What the program must not know never
comes here: no expected value and no expected output. Only the standard library is imported.
"""

import ctypes
import io
import json
import linecache
import math
import os
import random
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from megatron_rl.rewards.sandbox.walls import WallError, raise_walls

_PR_SET_PDEATHSIG = 1
_REPORT = 3  # the descriptor of the report, in the child
_NAMES = ("<program>", "<test ")
_PROCESSES = ("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.", "pty.", "os.startfile")
_CHANGES: tuple[str, ...] = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "shutil.",
    "tempfile.",
)


def main() -> None:
    """Serve until the client is gone."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    requests = socket.socket(fileno=os.dup(0))
    readable = json.loads(sys.argv[1])
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 4096, 4)
        if not message:
            return
        limits = json.loads(message)
        ready, tell = os.pipe()
        if (child := os.fork()) == 0:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _imprison(descriptors, tell, readable, limits)
        for descriptor in (*descriptors, tell):
            os.close(descriptor)
        requests.send(json.dumps(_await(child, ready, limits["time_s"])).encode())


def _await(child: int, ready: int, time_s: float) -> dict[str, Any]:
    """How the child ended, `time_s` after its walls stood at the latest, and whether they did."""
    handle = os.pidfd_open(child)
    word = os.read(ready, 1000).decode()  # nothing, should the child end before
    late = not select.select([handle], [], [], time_s)[0]
    if late:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    os.close(handle)
    os.close(ready)
    return {"code": os.waitstatus_to_exitcode(status), "late": late, "walls": word, "cpu_s": usage.ru_utime}


def _imprison(descriptors: list[int], tell: int, readable: list[str], limits: dict[str, Any]) -> None:
    """In the child: take the descriptors, raise the walls, say so, and run the job. Never returns."""
    try:
        job = json.loads(io.FileIO(descriptors[0]).readall())
        tell = os.dup2(tell, 100)
        held = [os.dup2(descriptor, 101 + place) for place, descriptor in enumerate(descriptors[1:])]
        null = os.open(os.devnull, os.O_WRONLY)
        for target, source in ((0, held[0]), (1, held[1]), (2, null), (_REPORT, held[2])):
            os.dup2(source, target)
        os.closerange(_REPORT + 1, 100)
        os.closerange(101, 1000)
        os.chdir("/")
        try:
            raise_walls(readable, memory=limits["memory"], cpu_s=limits["cpu_s"], file_size=limits["file_size"])
        except (WallError, OSError, ValueError) as error:
            os.write(tell, str(error).encode())
            return
        os.write(tell, b"up")
        os.close(tell)
        _run(job, readable)
    finally:
        os._exit(0)


def _run(job: dict[str, Any], readable: list[str]) -> None:
    """The program, then each step, in one namespace: "value" reports an expression's value, "do" runs statements."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8", "replace")
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False)), "utf-8", "replace")
        for descriptor in (1, 2)
    )
    sys.argv = ["program"]
    random.seed()
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    sys.addaudithook(_reporter(readable))
    steps = [["do", job["program"]], *job["steps"]]
    for number, (kind, source) in enumerate(steps):
        name = f"<test {number}>" if number else "<program>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        try:
            if kind == "value":
                _report({"step": number, "value": _plain(eval(compile(source, name, "eval"), main.__dict__))})
            else:
                exec(compile(source, name, "exec"), main.__dict__)
                _finish_output()
                _report({"step": number})
        except SystemExit as error:
            _finish_output()
            _report({"step": number, "exit": repr(error.code)[:100]})
            if number == 0:
                return  # as in a shell: nothing comes after
        except BaseException as error:
            _report({"step": number, "error": _story(error), "type": type(error).__name__, **_errno(error)})
            if number == 0:
                return


def _finish_output() -> None:
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()


def _report(line: dict[str, Any]) -> None:
    os.write(_REPORT, json.dumps(line).encode() + b"\n")


def _errno(error: BaseException) -> dict[str, Any]:
    return {"errno": error.errno} if isinstance(error, OSError) else {}


def _story(error: BaseException) -> str:
    """The end of the traceback, with the frames of the program and its tests only: no path of this machine."""
    told = traceback.TracebackException.from_exception(error, limit=-20, lookup_lines=False)
    frames = [frame for frame in told.stack if frame.filename.startswith(_NAMES)][-3:]
    lines = traceback.StackSummary.from_list(frames).format() if not isinstance(error, SyntaxError) else []
    return "".join([*lines, *told.format_exception_only()])[-2000:].rstrip()


def _plain(value: object) -> Any:
    """A value as JSON: scalars as they are, containers as [kind, items], anything else as ["object", repr, truth]."""
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return ["int", hex(value)]  # decimal would be limited to 4300 digits
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else ["float", repr(float(value))]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [_plain(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[_plain(key), _plain(item)] for key, item in value.items()]]
    return ["object", repr(value)[:500], bool(value)]


def _reporter(readable: list[str]) -> Any:
    """A hook that says in words what the kernel would refuse. It is no wall: a program can go around it."""
    roots = tuple(os.path.realpath(path) for path in readable)

    def refuse(what: str) -> None:
        _report({"note": what})
        raise PermissionError(f"{what} is not allowed")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            path = arguments[0]
            if isinstance(path, int):
                return
            path = os.fsdecode(path) if path is not None else "."
            if path.startswith(_NAMES):
                return  # Python looks for the source of a syntax error
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            place = os.path.realpath(path)
            if writes or not any(place == root or place.startswith(root + "/") for root in roots):
                refuse(f"{'writing' if writes else 'opening'} {path[:200]!r}")
        elif event.startswith("socket."):
            refuse("the network")
        elif event.startswith(_PROCESSES):
            refuse("starting a process")
        elif event.startswith(_CHANGES):
            refuse(f"changing files ({event})")

    return hook
