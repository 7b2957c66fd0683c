"""How a model's weights are moved: Adam, and the learning rate over the steps."""

from dataclasses import dataclass
from enum import StrEnum


class Schedule(StrEnum):
    """How the learning rate goes from `lr` to `min_lr` after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True)
class OptimConfig:
    lr: float = 1e-6
    min_lr: float = 0.0
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
