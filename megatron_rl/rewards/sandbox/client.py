"""Runs programs in the jail and reads what came of it. Trusted: what a program reports is a claim, not a verdict."""

import errno
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MIB = 1 << 20
# The packages above the jail, empty: their own code needs more than the standard library.
_START = """
import sys, types
for name in ("megatron_rl", "megatron_rl.rewards"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [sys.argv.pop(1)]
import collections, copy, dataclasses, datetime, decimal, fractions, functools, heapq, itertools, re, statistics, typing
from megatron_rl.rewards.sandbox.jail import main
main()
"""
# Opens a file that is outside of the walls, reports how that went, and then does what kills it; all that around Python.
_OUTSIDE = "/proc/self/status"
_PROBE = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
opened = libc.open({_OUTSIDE.encode()!r}, os.O_RDONLY)
os.write(3, b'{{"step": 0, "errno": %d}}\\n' % (ctypes.get_errno() if opened < 0 else 0))
libc.socket(1, 1, 0)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended: its exit code (minus the signal), what it printed, and its report by step, as far as it came."""

    code: int
    late: bool
    output: str
    reports: dict[int, dict[str, Any]]
    notes: tuple[str, ...]


class Sandbox:
    """A jail, which runs one program at a time. `memory_gb`: GiB of address space; `output_mb`: MiB of each output."""

    def __init__(self, *, memory_gb: float = 1.0, output_mb: float = 1.0) -> None:
        self._memory = int(memory_gb * 1024 * _MIB)
        self._file_size = int(output_mb * _MIB)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard != resource.RLIM_INFINITY and self._memory > hard:
            raise ValueError(
                f"memory_gb={memory_gb} of a program is more than its worker may have ({hard / 1024 / _MIB:g}): "
                "lower it, or raise reward.memory_gb"
            )
        package = Path(__file__).parents[2]
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._jail = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", _START, str(package), str(package / "rewards"), _readable()],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={"HOME": "/", "OPENBLAS_NUM_THREADS": "1"},
                cwd="/",
            )
        try:
            self._check_walls()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()
        self._jail.kill()
        self._jail.wait()

    def run(self, program: str, steps: Sequence[tuple[str, str]] = (), *, stdin: str = "", time_s: float) -> Outcome:
        """Run `program`, then each (kind, source) step; see `jail`."""
        job = json.dumps({"program": program, "steps": list(steps)}).encode()
        limits = {
            "time_s": time_s,
            "cpu_s": math.ceil(time_s) + 1,
            "memory": self._memory,
            "file_size": self._file_size,
        }
        files = [_file(job), _file(stdin.encode("utf-8", "replace")), _file(), _file()]
        try:
            socket.send_fds(self._socket, [json.dumps(limits).encode()], files)
            reply = self._socket.recv(4096)
            if not reply:
                raise RuntimeError(f"the jail has ended with exit code {self._jail.wait()}")
            ending = json.loads(reply)
            if ending["walls"] != "up":
                if not ending["walls"]:
                    raise RuntimeError(f"the jail's child ended with {ending['code']} before it was confined")
                raise ValueError(f"the sandbox lacks a wall, so nothing was run: no {ending['walls']} on this machine")
            output, report = (_read(file, self._file_size) for file in files[2:])
        finally:
            for file in files:
                os.close(file)
        reports, notes = _parse(report)
        text = output.decode("utf-8", "replace")
        return Outcome(code=ending["code"], late=ending["late"], output=text, reports=reports, notes=notes)

    def _check_walls(self) -> None:
        """Try what must fail: to open a file that Python does not need, and a socket, by going around Python."""
        outcome = self.run(_PROBE, time_s=30.0)
        if outcome.reports.get(0, {}).get("errno") != errno.EACCES:
            raise ValueError(f"the sandbox's wall around files does not hold: opening {_OUTSIDE} gave {outcome}")
        if outcome.code != -signal.SIGSYS:
            raise ValueError(f"the sandbox's wall of system calls does not hold: a socket ended with {outcome.code}")


def _readable() -> str:
    """What a program may read: the standard library, and the shared libraries of the system."""
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.join(sys.base_prefix, "lib")}
    libraries = {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"}
    return json.dumps(sorted({*paths, *libraries, "/dev/null", "/dev/urandom"}))


def _file(content: bytes = b"") -> int:
    """A file in memory that no path leads to, read from its start."""
    file = os.memfd_create("sandbox", os.MFD_CLOEXEC)
    with open(file, "wb", closefd=False) as writer:
        writer.write(content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _read(file: int, most: int) -> bytes:
    return os.pread(file, min(os.fstat(file).st_size, most), 0)


def _parse(report: bytes) -> tuple[dict[int, dict[str, Any]], tuple[str, ...]]:
    """The report by step, and the notes of what was refused. What does not parse was not written by the jail."""
    reports: dict[int, dict[str, Any]] = {}
    notes: list[str] = []
    for line in report.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a program wrote there
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            reports.setdefault(entry["step"], entry)
        elif isinstance(entry, dict) and isinstance(entry.get("note"), str):
            notes.append(entry["note"])
    return reports, tuple(dict.fromkeys(notes))
