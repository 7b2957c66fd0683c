"""What a terminal shows while problems are being answered."""

import sys
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Answered(Protocol):
    """How many problems are answered, and the accuracy so far."""

    def show(self, problems: int, accuracy: float) -> None: ...

    def close(self) -> None: ...


def display(total: int, name: str) -> Answered:
    """A bar on a terminal, lines in a pipe."""
    return AnsweredBar(total, name) if sys.stdout.isatty() else AnsweredLines(total, name)


class AnsweredLines:
    """One line per chunk, for log files and pipes."""

    def __init__(self, total: int, name: str) -> None:
        self.total, self.name = total, name

    def show(self, problems: int, accuracy: float) -> None:
        print(f"{self.name}: {problems}/{self.total} problems  accuracy {accuracy:.3g}", flush=True)

    def close(self) -> None:
        """Nothing is held."""


class AnsweredBar:
    """A progress bar that knows when the last problem will be answered."""

    def __init__(self, total: int, name: str, console: Console | None = None) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("accuracy {task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            expand=True,
            console=console,
        )
        self.task = self.progress.add_task(name, total=total, accuracy="-")
        self.progress.start()

    def show(self, problems: int, accuracy: float) -> None:
        self.progress.update(self.task, completed=problems, accuracy=f"{accuracy:.3g}")

    def close(self) -> None:
        self.progress.stop()
