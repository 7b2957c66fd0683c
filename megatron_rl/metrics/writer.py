"""Where a run's figures go: `metrics.jsonl`, the backends, and the terminal. One process writes, rank 0."""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_rl.metrics.backends import Backend, TensorBoard, WeightsAndBiases


class Figure(NamedTuple):
    """A metric worth a place on the terminal."""

    key: str
    label: str
    format: str


FIGURES = (
    Figure("critic/score/mean", "reward", "{:.3g}"),
    Figure("val/accuracy", "accuracy", "{:.3g}"),
    Figure("sft/loss", "loss", "{:.3g}"),
    Figure("actor/loss", "loss", "{:.3g}"),
    Figure("actor/pg_loss", "pg_loss", "{:.3g}"),
    Figure("actor/entropy", "entropy", "{:.3g}"),
    Figure("actor/grad_norm", "grad_norm", "{:.3g}"),
    Figure("response_length/mean", "len", "{:.1f}"),
    Figure("perf/tokens_per_second", "tok/s", "{:.0f}"),
    Figure("timing_s/step", "", "{:.1f} s"),
)

SHOWN_STEPS = 12


class Writer:
    """Writes `<run_dir>/metrics.jsonl` and `<run_dir>/tensorboard`, and shows the main figures of each step.

    `first_step` is the first step that will be logged: what an earlier process logged for it or for later steps is
    dropped, so that a resumed run has every step once. `name` titles the live table on a terminal. `wandb` names a
    Weights & Biases project to log to as well; `config` is what its page shows as the run's options.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        name: str,
        *,
        first_step: int = 0,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._backends: list[Backend] = []
        # First, because it may refuse: nothing has been dropped or opened by then.
        if wandb is not None:
            self._backends.append(WeightsAndBiases(wandb, run_dir, config or {}, first_step))
        self._backends.append(TensorBoard(run_dir / "tensorboard", first_step))
        path = run_dir / "metrics.jsonl"
        drop_from(path, first_step)
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        self._display: Display = LiveTable(total_steps, name) if sys.stdout.isatty() else PlainLines(total_steps)

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Sequence[float]] = {}) -> None:
        """One step's figures, and distributions for the backends.

        JSON knows no NaN and no infinity: in the file these are null. Histograms count finite values only, and one
        without any is left out.
        """
        finite = {key: value if math.isfinite(value) else None for key, value in scalars.items()}
        row = {"step": step, "time": round(time.time(), 3), **finite}
        self._lines.write(json.dumps(row, allow_nan=False) + "\n")
        counted = {key: [value for value in values if math.isfinite(value)] for key, values in histograms.items()}
        for backend in self._backends:
            for key, values in counted.items():
                if values:
                    backend.histogram(step, key, values)
            backend.scalars(step, scalars)
        self._display.show(step, scalars)

    def text(self, step: int, name: str, text: str) -> None:
        """A text sample, as Markdown, to the backends."""
        for backend in self._backends:
            backend.text(step, name, text)

    def image(self, step: int, name: str, path: Path) -> None:
        """A PNG file, to the backends."""
        for backend in self._backends:
            backend.image(step, name, path)

    def close(self) -> None:
        self._display.close()
        for backend in self._backends:
            backend.close()
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def drop_from(path: Path, first_step: int) -> None:
    """Keeps the lines before `first_step`. A line without its newline is what a killed process left: it goes too."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step]
    shorter = path.with_name(path.name + ".new")
    shorter.write_text("".join(kept), encoding="utf-8")
    os.replace(shorter, path)


class Display(Protocol):
    """What a terminal shows of a step."""

    def show(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class PlainLines:
    """One line per step, for log files and pipes."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        figures = (f"{f.label} {f.format.format(scalars[f.key])}".strip() for f in FIGURES if f.key in scalars)
        print("  ".join((f"step {step}/{self.total_steps}", *figures)), flush=True)

    def close(self) -> None:
        """Nothing is held."""


class LiveTable:
    """The latest steps as a table, over a progress bar that knows when the run will end."""

    def __init__(self, total_steps: int, name: str, console: Console | None = None) -> None:
        self.name = name
        self.rows: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=SHOWN_STEPS)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            expand=True,
        )
        self.task = self.progress.add_task(name, total=total_steps)
        self.live = Live(get_renderable=self._picture, console=console, refresh_per_second=2)
        self.live.start()

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        self.rows.append((step, scalars))
        self.progress.update(self.task, completed=step)

    def close(self) -> None:
        self.live.stop()

    def _picture(self) -> Group:
        rows = list(self.rows)
        present = [f for f in FIGURES if any(f.key in scalars for _, scalars in rows)]
        table = Table(title=self.name, expand=True)
        for label in ("step", *(f.label or "time" for f in present)):
            table.add_column(label, justify="right")
        for step, scalars in rows:
            cells = (f.format.format(scalars[f.key]) if f.key in scalars else "" for f in present)
            table.add_row(str(step), *cells)
        return Group(table, self.progress)
