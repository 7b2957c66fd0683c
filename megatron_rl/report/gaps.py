"""Values that a run should have logged and has not: steps without any, figures with holes or an early end, NaN."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_rl.report.series import Curve, RunData

_SHOWN = 5
# A figure with fewer values has no rhythm that could be missed.
_FEWEST = 5
# One that lacks more is logged on some steps only.
_REGULAR = 0.9
# As many not-finite values in a row at the end are no accident.
_FOR_GOOD = 3


class Gap(NamedTuple):
    """What is missing, from which step on; `for_good` where it has not come back."""

    name: str
    step: int
    evidence: str
    cause: str
    remedy: str
    for_good: bool = False


def gaps(run: RunData) -> list[Gap]:
    """All that a run has."""
    steps = run.steps
    return [*_missing_steps(steps), *_early_ends(run, steps), *_holes(run), *_not_finite(run)]


def _missing_steps(steps: NDArray[np.int64]) -> Iterator[Gap]:
    holes = _gaps_in(steps)
    if holes:
        shown = ", ".join(f"{left} to {right}" for left, right in holes[:_SHOWN])
        yield Gap(
            "missing_steps",
            holes[0][0],
            f"nothing was logged between steps {shown}" + _more(holes),
            "the run was killed and went on at a later checkpoint, or a file of its figures is missing",
            "look for other event files of this run; compare with the checkpoints that it went on from",
        )


def _early_ends(run: RunData, steps: NDArray[np.int64]) -> Iterator[Gap]:
    """Figures that came at a steady pace and stopped long before the run."""

    def ended(curve: Curve) -> bool:
        pace = np.diff(curve.steps)
        steady = len(curve.steps) >= _FEWEST and np.mean(pace == np.median(pace)) >= _REGULAR
        return bool(steady and steps[-1] - curve.steps[-1] > 3 * np.median(pace))

    found = _named(run, ended)
    if found:
        first = min(int(run.curves[name].steps[-1]) for name in found)
        shown = ", ".join(f"{name} at step {run.curves[name].steps[-1]}" for name in found[:_SHOWN])
        yield Gap(
            "early_end",
            first,
            f"the run has figures up to step {steps[-1]}, but these end before: {shown}" + _more(found),
            "a part of the run was switched off or failed without a word",
            "look at the log around that step",
        )


def _holes(run: RunData) -> Iterator[Gap]:
    """Figures that nearly every step has, and some have not."""

    def holed(curve: Curve) -> bool:
        # Of a run whose every step is missing the figure does not lack any by itself.
        here = steps[(steps >= curve.steps[0]) & (steps <= curve.steps[-1])]
        return len(curve.steps) >= _FEWEST and _REGULAR * len(here) <= len(curve.steps) < len(here)

    steps = _common_steps(run)
    found = _named(run, holed)
    if found:
        lacking = {name: np.setdiff1d(steps, run.curves[name].steps) for name in found}
        inside = {name: int(at[at >= run.curves[name].steps[0]][0]) for name, at in lacking.items()}
        shown = ", ".join(f"{name} at step {inside[name]}" for name in found[:_SHOWN])
        yield Gap(
            "holes",
            min(inside.values()),
            f"logged on nearly every step, but not on all: {shown}" + _more(found),
            "some batches had nothing to measure, or values were lost",
            "look at these steps; a mean over a few values only is noise",
        )


def _not_finite(run: RunData) -> Iterator[Gap]:
    found = _named(run, lambda curve: not np.isfinite(curve.values).all())
    # The severe ones, which have ended in NaN for good, by themselves.
    lost = [name for name in found if not np.isfinite(run.curves[name].values[-_FOR_GOOD:]).any()]
    for names, for_good in ((lost, True), ([name for name in found if name not in lost], False)):
        if not names:
            continue
        wrong = {name: run.curves[name].steps[~np.isfinite(run.curves[name].values)] for name in names}
        shown = ", ".join(
            f"{name} on {len(wrong[name])} of {len(run.curves[name].steps)} steps, first {wrong[name][0]}"
            for name in names[:_SHOWN]
        )
        yield Gap(
            "not_finite",
            min(int(steps[0]) for steps in wrong.values()),
            f"{shown}{_more(names)}" + ("; not finite to the end" if for_good else ""),
            "a loss or gradient overflowed, or there was nothing to take a mean of",
            "go back to a checkpoint before the first of these steps, with a lower optim.lr or in float32"
            if for_good
            else "look at the samples and rewards of these steps",
            for_good,
        )


def _common_steps(run: RunData) -> NDArray[np.int64]:
    """Steps with at least half as many figures as most."""
    if not run.curves:
        return np.empty(0, np.int64)
    steps, counts = np.unique(np.concatenate([curve.steps for curve in run.curves.values()]), return_counts=True)
    return steps[counts * 2 >= np.median(counts)]


def _gaps_in(steps: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Neighbours that are further apart than most."""
    if len(steps) < _FEWEST:
        return []
    pace = np.diff(steps)
    (wide,) = np.nonzero(pace > np.median(pace))
    return [(int(steps[place]), int(steps[place + 1])) for place in wide]


def _named(run: RunData, wrong: Callable[[Curve], bool]) -> list[str]:
    return [name for name in sorted(run.curves) if len(run.curves[name].steps) and wrong(run.curves[name])]


def _more(found: Sequence[object]) -> str:
    return f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
