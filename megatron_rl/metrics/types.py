"""Figures that can be merged over micro-batches and ranks, each in its own way, and read only once at the end.

A mean travels as its total and its count, so that nothing is ever an average of averages.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self


class Reducer(ABC):
    """A partial figure."""

    __slots__ = ()

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """The figure of both halves together."""

    @abstractmethod
    def result(self) -> float:
        """The figure itself; NaN when nothing was measured."""


@dataclass(frozen=True, slots=True)
class Sum(Reducer):
    value: float

    def merge(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value)

    def result(self) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Mean(Reducer):
    total: float
    count: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        values = list(values)
        return cls(math.fsum(values), len(values))

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def result(self) -> float:
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True, slots=True)
class Max(Reducer):
    """The largest value; -inf, its identity, stands for none. A NaN wins over any number."""

    value: float

    def merge(self, other: "Max") -> "Max":
        return Max(math.nan if math.isnan(self.value) or math.isnan(other.value) else max(self.value, other.value))

    def result(self) -> float:
        return math.nan if self.value == -math.inf else self.value


@dataclass(frozen=True, slots=True)
class Min(Reducer):
    """The smallest value; inf, its identity, stands for none. A NaN wins over any number."""

    value: float

    def merge(self, other: "Min") -> "Min":
        return Min(math.nan if math.isnan(self.value) or math.isnan(other.value) else min(self.value, other.value))

    def result(self) -> float:
        return math.nan if self.value == math.inf else self.value


Metrics = dict[str, Reducer]


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Both sets of figures together; a figure that only one of them has is kept as it is."""
    merged = dict(a)
    for name, theirs in b.items():
        ours = merged.get(name)
        if ours is not None and type(ours) is not type(theirs):
            kinds = f"{type(ours).__name__} and {type(theirs).__name__}"
            raise TypeError(f"metric {name!r} is a {kinds}: give it one type")
        merged[name] = theirs if ours is None else ours.merge(theirs)
    return merged


def flatten(metrics: Metrics) -> tuple[list[float], list[float], list[float]]:
    """What is to be summed, maxed and minned over ranks, in the order of the sorted names.

    Every rank must hold the same names with the same types. A NaN extreme leaves as an infinity, because a
    collective's max or min may pass over a NaN.
    """
    sums: list[float] = []
    maxes: list[float] = []
    mins: list[float] = []
    for name in sorted(metrics):
        match metrics[name]:
            case Sum(value):
                sums.append(value)
            case Mean(total, count):
                sums += [total, count]
            case Max(value):
                maxes.append(math.inf if math.isnan(value) else value)
            case Min(value):
                mins.append(-math.inf if math.isnan(value) else value)
    return sums, maxes, mins


def unflatten(like: Metrics, sums: Sequence[float], maxes: Sequence[float], mins: Sequence[float]) -> Metrics:
    """The reverse of `flatten`: figures with the names and types of `like` and the given values."""
    sizes = tuple(map(len, flatten(like)))
    assert (len(sums), len(maxes), len(mins)) == sizes, f"expected {sizes} values to sum, max and min"
    next_sum, next_max, next_min = iter(sums), iter(maxes), iter(mins)
    metrics: Metrics = {}
    for name in sorted(like):
        match like[name]:
            case Sum():
                metrics[name] = Sum(next(next_sum))
            case Mean():
                metrics[name] = Mean(next(next_sum), next(next_sum))
            case Max():
                metrics[name] = Max(next(next_max))
            case Min():
                metrics[name] = Min(next(next_min))
    return metrics


class StepLog(NamedTuple):
    """What one step has to say: figures, values whose distribution is worth seeing, and a record of each sample."""

    scalars: dict[str, float]
    histograms: Mapping[str, Sequence[float]]
    samples: Sequence[Mapping[str, float | None]] = ()
