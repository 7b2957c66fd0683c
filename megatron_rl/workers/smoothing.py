"""EMA-smoothed importance weights inside the policy loss, and the record of what was smoothed.

The definitions are in `algorithms/ema_weights.py`, the scan over tokens in `ops/scan.py`; this is where they meet a
micro-batch.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_rl.algorithms.ema_weights import (
    EPSILON,
    Gradient,
    StepAverages,
    raw_metrics,
    smoothing_metrics,
    with_gradient,
)
from megatron_rl.data.collate import MicroBatch
from megatron_rl.ops.scan import Init, exponential_average

Axis = Literal["none", "token", "step"]
# Of no meaning on the policy itself, where every weight is one but for rounding.
RATIOS = ("ema/variance_reduction_ratio", "ema/smoothing_strength", "ema/range_reduction")


class Record(NamedTuple):
    """The weights [N] of one micro-batch, before and after, without gradient, and their sequences' sample ids [N]."""

    raw: Tensor
    smoothed: Tensor
    sample_ids: Tensor


class Smoother:
    """Smooths the weights of each micro-batch it is given, over its tokens or over the visits to its samples.

    `visit` counts the passes over the rollout batch from 0, and is the trainer's to set. What was seen since `begin`
    is in `records`. With the axis `none` weights pass as they are, and are recorded.
    """

    def __init__(self, *, axis: Axis, beta: float, init: Init, gradient: Gradient) -> None:
        self.axis, self.beta, self.init, self.gradient = axis, beta, init, gradient
        self.averages = StepAverages(beta=beta, init=init)
        self.visit = 0
        self.records: list[Record] = []

    def begin(self) -> None:
        """Another update: forgets the records, and keeps the averages."""
        self.records = []

    def forget(self) -> None:
        """Another rollout batch: forgets the averages too."""
        self.begin()
        self.averages.clear()
        self.visit = 0

    def __call__(self, weights: Tensor, batch: MicroBatch) -> Tensor:
        ids = batch.sequence_ids
        if self.axis == "none":
            smoothed = weights
        elif self.axis == "token":
            average = exponential_average(weights, ids, beta=self.beta, init=self.init)
            smoothed = with_gradient(weights, average, beta=self.beta, gradient=self.gradient)
        else:
            average = self.averages.update(batch.sample_ids, weights, ids, visit=self.visit)
            smoothed = with_gradient(weights, average, beta=self.beta, gradient=self.gradient)
        names = torch.tensor(batch.sample_ids, dtype=torch.int64)[ids.cpu()]
        self.records.append(Record(weights.detach().cpu(), smoothed.detach().cpu(), names))
        return smoothed

    def metrics(self, records: Sequence[Record], states: int) -> dict[str, float]:
        """`ema/*` over the records of all ranks, which hold averages of so many samples on the step axis.

        There are no ratios of variances where the weights vary by no more than the e that steadies the ratios.
        """
        if not records:
            return {}
        raw, smoothed, names = (torch.cat(parts) for parts in zip(*records))
        if self.axis == "none":
            return raw_metrics(raw)
        held = states if self.axis == "step" else None
        figures = smoothing_metrics(raw, smoothed, names, beta=self.beta, states=held)
        varies = figures["ema/raw_weights_variance"] > EPSILON
        return {name: value for name, value in figures.items() if varies or name not in RATIOS}
