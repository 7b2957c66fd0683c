"""Where the seconds of a step go."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter

from megatron_rl.metrics.progress import progress

STEP = "step"
# Beside the phases of a step: what stands between two steps, and what ran while a step did.
NOT_OF_A_STEP = frozenset({"profile", "testing", "save_checkpoint", "export", "gen_ahead"})
_PREFIX = "timing_s/"


class Timer:
    """Adds up wall-clock seconds by name: `with timer("gen"): ...` becomes `timing_s/gen`.

    A span inside another is a part of it, and named so: `timing_s/update_actor/optimizer`. Only `step`, the whole, is
    no part of a name. A span is a phase of the process's progress, where `growing` measures one long call (see there),
    and stands inside `mark(name)`. Work queued on a GPU counts where the host waits for it.
    """

    def __init__(self) -> None:
        self.mark: Callable[[str], AbstractContextManager[object]] = nullcontext
        self._seconds: dict[str, float] = {}
        self._outer = ""

    @contextmanager
    def __call__(self, name: str, growing: Callable[[], object] | None = None) -> Iterator[None]:
        outer = self._outer
        name = outer + name
        self._outer = "" if name == STEP else f"{name}/"
        start = perf_counter()
        try:
            with progress.phase(name, growing), self.mark(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - start
            self._outer = outer

    def metrics(self) -> dict[str, float]:
        return {_PREFIX + name: seconds for name, seconds in self._seconds.items()}

    def reset(self) -> None:
        self._seconds.clear()


def phases(figures: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase of one step, by name, of what was logged: they add up to `timing_s/step`."""
    seconds = {name.removeprefix(_PREFIX): value for name, value in figures.items() if name.startswith(_PREFIX)}
    return {name: value for name, value in seconds.items() if name not in NOT_OF_A_STEP | {STEP} and "/" not in name}
