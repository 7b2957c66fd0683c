"""How far this process has come: a count that grows while it works, the step and the phase.

`tick()` is called wherever work gets done: a micro-batch, a generated token, a look at the reward workers. Nothing
happens but a count; `parallel/watchdog.py` looks at it from time to time. Where torchrun was started by `megatron-rl`,
step and phase also stand in a small file, so that they can be told of a process that was killed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# Where `megatron-rl` started torchrun: the folder of its ranks' notes.
NOTES = "MEGATRON_RL_NOTES"
_NOTE_BYTES = 96


class Place(NamedTuple):
    """Where a process is. Step 0 is before the first step; no phase: between two of them."""

    step: int = 0
    phase: str = ""

    def __str__(self) -> str:
        if not self.phase:
            return f"step {self.step}" if self.step else "start-up"
        return f"step {self.step}, phase {self.phase}"


class Progress:
    """The one of this process is `progress`."""

    def __init__(self) -> None:
        self.count = 0
        self.place = Place()
        self._growing: Callable[[], object] | None = None
        self._note: int | None = None

    def tick(self) -> None:
        self.count += 1

    def seen(self) -> tuple[int, object]:
        """Something that differs from what it was before if there was progress."""
        growing = self._growing
        return self.count, growing() if growing else None

    def begin(self, step: int) -> None:
        """Step `step` begins."""
        self._move(Place(step))

    @contextmanager
    def phase(self, name: str, growing: Callable[[], object] | None = None) -> Iterator[None]:
        """What is done inside is called `name`.

        Where that is one long call without ticks, `growing` measures it (the bytes in a directory that is written,
        say): as long as the measure changes, there is progress. It is called from another thread.
        """
        before = self.place, self._growing
        self._growing = growing
        self._move(Place(self.place.step, name))
        try:
            yield
        finally:
            self._growing = before[1]
            self._move(before[0])

    def note_in(self, path: Path) -> None:
        """Keeps a note of this process's id and place in a file, which outlives even a kill."""
        self._note = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT, 0o600)
        self._write_note()
        path.with_suffix(".new").rename(path)

    def _move(self, place: Place) -> None:
        self.place = place
        self.count += 1
        self._write_note()

    def _write_note(self) -> None:
        if self._note is not None:
            note = f"{os.getpid()} {self.place.step} {self.place.phase}".encode()[:_NOTE_BYTES]
            os.pwrite(self._note, note.ljust(_NOTE_BYTES), 0)


def read_note(path: Path) -> tuple[int, Place]:
    """The process id and the place that `Progress.note_in` keeps."""
    pid, step, *phase = path.read_text().split()
    return int(pid), Place(int(step), " ".join(phase))


def bytes_in(directory: Path) -> int:
    """How much the files below a directory hold, also while they come and go."""
    total = 0
    for path in directory.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


progress = Progress()
tick = progress.tick
