"""How weights are averaged: for an evaluation beside the weights themselves, and for a teacher."""

from dataclasses import dataclass
from enum import StrEnum


class AverageSchedule(StrEnum):
    """How the decay of averaged weights goes with the number of updates; see ops/ema.py and docs/averages.md."""

    constant = "constant"
    warmup = "warmup"


@dataclass(kw_only=True)
class AverageConfig:
    """A moving average of the model's weights: average <- decay average + (1 - decay) weights."""

    schedule: AverageSchedule = AverageSchedule.constant
    rate: float = 0.01  # of constant: what the new weights count, 1 - decay
    inv_gamma: float = 1.0  # of warmup: decay = 1 - (1 + n / inv_gamma)^-power, between min and max
    power: float = 2 / 3
    min: float = 0.0
    max: float = 0.9999
    update_after: int = 0  # of warmup: updates that are plain copies, beyond the first two
    offload: bool = False  # keep it in host memory
