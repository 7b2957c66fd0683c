"""Where the seconds of a run's steps went."""

from megatron_rl.metrics.timing import phases
from megatron_rl.report.series import RunData


def seconds_by_phase(run: RunData) -> list[tuple[str, float, float]]:
    """(phase, seconds per step, share of the steps' time), the longest first, each with its parts after it."""
    whole = run.curves.get("timing_s/step")
    if whole is None or not len(whole.finite().steps):
        return []
    steps, total = len(whole.finite().steps), float(whole.finite().values.sum())
    names = [name for name in run.curves if name.startswith("timing_s/")]
    spent = {name: float(run.curves[name].finite().values.sum()) for name in names}
    of_phases = {f"timing_s/{name}": seconds for name, seconds in phases(spent).items()}
    ordered = []
    for phase in sorted(of_phases, key=lambda name: (-spent[name], name)):
        ordered += [phase, *sorted(name for name in names if name.startswith(f"{phase}/"))]
    return [(name, spent[name] / steps, spent[name] / total) for name in ordered]
