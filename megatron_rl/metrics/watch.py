"""The monitor that applies rules to a run's figures, step by step.

It is fed by the guards of a running job, and can be fed the rows of a finished job's `metrics.jsonl`: both find the
same.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from megatron_rl.metrics.rule import LOWER_BOUNDS, Kind, Rule

MEANS = (Kind.fall, Kind.collapse, Kind.parting)


class Alarm(NamedTuple):
    """One finding: which rule, where, and by how much. `threshold` is what the value was compared with."""

    step: int
    rule: Rule
    figure: str
    value: float
    threshold: float

    @property
    def seen(self) -> str:
        """The figure, its value and what that was compared with."""
        rule = self.rule
        side = "below" if self.value < self.threshold else "above"
        seen = f"the mean of {self.figure}" if rule.kind in MEANS else self.figure
        if rule.kind is Kind.close:
            seen = f"the distance of {self.figure} to {rule.against}"
        steps = f" on {rule.patience} steps in a row" if rule.patience > 1 else ""
        reason = {
            Kind.jump: f", which is {rule.limit:g} more than the value before",
            Kind.drift: f", which is {rule.limit:g} from its first value",
        }.get(rule.kind, "")
        # Adding zero makes zero of a negative zero.
        return f"{seen} is {self.value + 0.0:.4g}, {side} {self.threshold:.4g}{reason}{steps}"

    @property
    def message(self) -> str:
        """What was seen, the likely cause and what to try, in one line."""
        rule = self.rule
        return f"step {self.step}: {rule.name}: {self.seen}. Likely cause: {rule.cause}. To try: {rule.remedy}"


class Watch:
    """Rules over a run's figures, step by step. A rule that has raised an alarm is silent until it has recovered.

    What it remembers is plain JSON, so that a continued run raises the alarms of the uninterrupted one.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = list(rules)
        self.memory: dict[str, dict[str, Any]] = {}

    def __call__(self, step: int, figures: Mapping[str, float | None]) -> list[Alarm]:
        """The alarms that this step raises. `figures` are the step's row of `metrics.jsonl`, or what goes there."""
        row = {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
        found = (self._judge(step, rule, figure, row) for rule in self.rules for figure in rule.figures)
        return [alarm for alarm in found if alarm is not None]

    def _judge(self, step: int, rule: Rule, figure: str, row: Mapping[str, float]) -> Alarm | None:
        if figure not in row or (rule.against and rule.against not in row):
            return None
        memory = self.memory.setdefault(f"{rule.name} {figure}", {"in_a_row": 0})
        value, threshold, below = _compare(rule, figure, row, memory)
        excused = rule.unless is not None and row.get(rule.unless[0], -math.inf) >= rule.unless[1]
        wrong = threshold is not None and not excused and (value < threshold if below else value > threshold)
        memory["in_a_row"] = memory["in_a_row"] + 1 if wrong else 0
        if threshold is None or memory["in_a_row"] != rule.patience:
            return None
        return Alarm(step, rule, figure, value, threshold)

    def state_dict(self) -> dict[str, Any]:
        """All that later alarms depend on, as JSON."""
        return {key: {name: _copy(value) for name, value in memory.items()} for key, memory in self.memory.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.memory = {key: {name: _copy(value) for name, value in memory.items()} for key, memory in state.items()}


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _compare(
    rule: Rule, figure: str, row: Mapping[str, float], memory: dict[str, Any]
) -> tuple[float, float | None, bool]:
    """What is to be compared with what, and whether below is wrong. The second is None while too little has been seen.

    Adds to the memory.
    """
    value = row[figure]
    if rule.kind in (Kind.outside, Kind.drift):
        center = rule.center if rule.kind is Kind.outside else memory.setdefault("first", value)
        below = value < center
        return value, center - rule.limit if below else center + rule.limit, below
    below = rule.kind in LOWER_BOUNDS
    if rule.kind in (Kind.above, Kind.below):
        return value, rule.limit, below
    if rule.kind is Kind.close:
        return row[rule.against] - value, rule.limit, below
    if rule.kind is Kind.ahead:
        scale = memory["scale"] = max(memory.get("scale", 0.0), row.get(rule.scale, 0.0))
        return value, (row[rule.against] + rule.limit) * scale if scale else None, below
    if rule.kind is Kind.jump:
        before, memory["before"] = memory.get("before"), value
        return value, None if before is None else before + rule.limit, below
    if rule.kind in MEANS:
        return *_compare_means(rule, value, row, memory), below
    seen: list[float] = memory.setdefault("seen", [])
    if rule.kind is Kind.above_median:
        threshold = max(rule.limit * median(seen), rule.floor) if len(seen) >= rule.window // 2 else None
        memory["seen"] = [*seen, value][-rule.window :]
        return value, threshold, below
    if len(seen) < rule.window:
        seen.append(value)
        return value, None, below
    return value, max(rule.limit * median(seen), rule.floor if rule.kind is Kind.above_start else -math.inf), below


def _compare_means(
    rule: Rule, value: float, row: Mapping[str, float], memory: dict[str, Any]
) -> tuple[float, float | None]:
    """`_compare` for means over a window."""
    seen = memory["seen"] = [*memory.get("seen", []), value][-rule.window :]
    if rule.kind is Kind.fall:
        memory["scale"] = max(memory.get("scale", 0.0), row.get(rule.scale, 0.0))
    if rule.kind is Kind.parting:
        other = memory["other"] = [*memory.get("other", []), row[rule.against]][-rule.window :]
        half = rule.window // 2
        if len(seen) < rule.window or fmean(other[half:]) <= fmean(other[:half]):
            return value, None
        return fmean(seen[half:]), fmean(seen[:half]) - rule.limit
    full, mean = len(seen) == rule.window, fmean(seen)
    if rule.kind is Kind.fall and not (full and memory["scale"]):
        return value, None
    # Means of fewer values count at the start of a collapse: an early one leaves no good mean of a whole window.
    best = memory["best"] = max(memory.get("best", mean), mean)
    if rule.kind is Kind.fall:
        return mean, best - rule.limit * memory["scale"]
    return abs(mean), rule.limit * best if full and best > rule.floor else None
