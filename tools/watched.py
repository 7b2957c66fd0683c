"""CPU seconds and peak memory of a process and its descendants while they run."""

import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil


class Moment(NamedTuple):
    time: float
    cpu: float  # seconds, of all processes so far
    memory: int  # bytes, the sum of the living processes' peaks


class Watch(threading.Thread):
    """Looks after a process and all its descendants until it ends, ten times a second."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self.process = process
        self.moments: list[Moment] = []

    def run(self) -> None:
        root, seconds = psutil.Process(self.process.pid), {}
        while self.process.poll() is None:
            memory = 0
            for one in [root, *root.children(recursive=True)]:
                try:
                    times = one.cpu_times()
                    seconds[one.pid] = times.user + times.system
                    memory += peak_bytes(one.pid)
                except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                    continue  # it has ended since it was listed
            self.moments.append(Moment(time.time(), sum(seconds.values()), memory))
            time.sleep(0.1)

    def end(self) -> None:
        """Nothing of an interrupted run stays."""
        if self.process.poll() is None:
            for one in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                one.kill()
            self.process.wait()
        self.join()

    def cpu(self, end: float) -> float:
        return max((moment.cpu for moment in self.moments if moment.time <= end), default=0.0)

    def peak(self, end: float) -> int:
        return max(moment.memory for moment in self.moments if moment.time <= end)


def peak_bytes(pid: int) -> int:
    """VmHWM; a process that is ending has none."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
