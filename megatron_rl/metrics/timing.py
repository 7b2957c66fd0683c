"""Where the seconds of a step go."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from megatron_rl.metrics.progress import progress


class Timer:
    """Adds up wall-clock seconds by name: `with timer("gen"): ...` becomes `timing_s/gen`.

    Spans may nest; an outer one includes its inner ones. A span is a phase of the process's progress. Work queued on a
    GPU counts where the host waits for it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            with progress.phase(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - start

    def metrics(self) -> dict[str, float]:
        return {f"timing_s/{name}": seconds for name, seconds in self._seconds.items()}

    def reset(self) -> None:
        self._seconds.clear()
