"""What torch's profiler sees of chosen steps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiler

from megatron_rl.metrics.timing import Timer

SHOWN_OPERATORS = 40


class Profile:
    """Each rank's trace of the chosen steps, `step-3/rank-0.json.gz`, and the operators that took longest, `.txt`.

    The timer's phases are ranges of the trace.
    """

    def __init__(self, steps: Sequence[int], directory: Path, rank: int) -> None:
        self.steps, self.directory, self.rank = frozenset(steps), directory, rank
        self._trace: profiler | None = None

    @contextmanager
    def of_step(self, step: int, timer: Timer) -> Iterator[None]:
        """Traces what is done inside, if this step is chosen."""
        if step not in self.steps:
            yield
            return
        on_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        before, timer.mark = timer.mark, record_function
        try:
            with profiler(activities=activities) as self._trace:
                yield
        finally:
            timer.mark = before

    def write(self, step: int) -> None:
        """The files of the step that was traced last."""
        assert self._trace is not None
        folder = self.directory / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        self._trace.export_chrome_trace(str(folder / f"rank-{self.rank}.json.gz"))
        longest = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._trace.key_averages().table(sort_by=longest, row_limit=SHOWN_OPERATORS)
        (folder / f"rank-{self.rank}.txt").write_text(table, encoding="utf-8")
        self._trace = None
