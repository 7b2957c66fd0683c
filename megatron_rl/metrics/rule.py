"""A rule: a figure, what is wrong with it, the likely cause and what to try."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """How a figure x is judged against a rule's limit c."""

    above = "above"  # x > c
    below = "below"  # x < c
    above_median = "above_median"  # x > c m, m the median of the last `window` values, once half of them are there
    above_start = "above_start"  # x > c s, s the median of the first `window` values
    below_start = "below_start"  # x < c s
    fall = "fall"  # the mean of the last `window` values < the best such mean - c times the largest `scale` so far
    collapse = (
        "collapse"  # |the mean of the last `window` values| < c times the best such mean, once that is > `floor`;
    )
    # at the start, means of the first few values are among them
    jump = "jump"  # x > the value before + c
    outside = "outside"  # |x - `center`| > c
    drift = "drift"  # |x - the first value| > c
    parting = "parting"  # the mean of half a `window` is c below that of the half before, while `against` rose
    close = "close"  # `against` - x < c
    ahead = "ahead"  # x > (`against` + c) times the largest `scale` so far


LOWER_BOUNDS = frozenset({Kind.below, Kind.below_start, Kind.fall, Kind.collapse, Kind.parting, Kind.close})


class Action(StrEnum):
    """What an alarm does."""

    warn = "warn"
    stop = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One thing to watch. Each of `figures` is judged by itself; one that is not logged, or not finite, is passed over.

    `patience` is the number of steps in a row on which the condition must hold. `floor` is the least threshold that
    `above_median` and `above_start` come to. `scale` names the figure that measures a `fall` or what is `ahead`,
    `against` the one that `parting`, `close` and `ahead` hold a figure against. With `unless` (a figure and a value)
    the rule keeps silent while that figure is at least the value. With `keep_samples` the step's samples are written
    beside the alarm. `option` names the option that sets the limit or the patience, where it has one of its own.
    `severe`: a run that shows this is not worth going on with as it is; what stops a run always is.
    """

    name: str
    figures: tuple[str, ...]
    kind: Kind
    limit: float
    patience: int = 1
    window: int = 0
    floor: float = 0.0
    scale: str = ""
    against: str = ""
    center: float = 0.0
    unless: tuple[str, float] | None = None
    action: Action = Action.warn
    severe: bool = False
    keep_samples: bool = False
    option: str = ""
    cause: str
    remedy: str

    @property
    def is_severe(self) -> bool:
        """Whether a report counts it as severe."""
        return self.severe or self.action is Action.stop

    @property
    def reads(self) -> tuple[str, ...]:
        """Every figure that it looks at."""
        others = (self.scale, self.against, self.unless[0] if self.unless else "")
        return (*self.figures, *(name for name in others if name))

    def condition(self) -> str:
        """When it fires, as a reader would write it."""
        c, steps = f"{self.limit:g}", f" on {self.patience} steps in a row" if self.patience > 1 else ""
        least = f", and > {self.floor:g}" if self.floor else ""
        unless = f", unless `{self.unless[0]}` >= {self.unless[1]:g}" if self.unless else ""
        text = {
            Kind.above: f"> {c}",
            Kind.below: f"< {c}",
            Kind.above_median: f"> {c} x the median of the last {self.window}{least}",
            Kind.above_start: f"> {c} x the median of the first {self.window}{least}",
            Kind.below_start: f"< {c} x the median of the first {self.window}",
            Kind.fall: f"mean of the last {self.window} < the best such mean - {c} x the largest `{self.scale}`",
            Kind.collapse: f"mean of the last {self.window} (fewer count for the best at the start), without sign, "
            f"< {c} x the best such mean, once that is > {self.floor:g}",
            Kind.jump: f"> {c} + the value before",
            Kind.outside: f"more than {c} away from {self.center:g}",
            Kind.drift: f"more than {c} away from its first value",
            Kind.parting: f"mean of the last {self.window // 2} < that of the {self.window // 2} before - {c}, while "
            f"that of `{self.against}` rose",
            Kind.close: f"less than {c} below `{self.against}`",
            Kind.ahead: f"> (`{self.against}` + {c}) x the largest `{self.scale}`",
        }[self.kind]
        return text + steps + unless


# Where this holds, a policy without variety is one that has learned its task.
SOLVED = ("rollout/correct", 0.9)
