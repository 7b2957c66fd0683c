"""How far a long piece of work on bytes has come: a bar on a terminal, a line from time to time elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def counting(doing: str, total: int) -> Iterator[Callable[[int], object]]:
    """Yields what is to be told of every number of bytes that is done."""
    if sys.stderr.isatty():
        columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(doing, total=total)
            yield lambda count: progress.advance(task, count)
        return
    done, spoke = 0, time.monotonic()

    def on_bytes(count: int) -> None:
        nonlocal done, spoke
        done += count
        if time.monotonic() - spoke >= _SECONDS_BETWEEN_LINES:
            spoke = time.monotonic()
            print(f"megatron-rl: {doing}, {done / 1e6:.0f} of {total / 1e6:.0f} MB", file=sys.stderr, flush=True)

    yield on_bytes
