"""What event files hold: figures by step, distributions, texts."""

import math
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto

from megatron_rl.report.records import RecordFile

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
KEPT_TEXTS = 3
_SUFFIX = "/text_summary"  # what torch's writer puts behind the name of a text
_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # of tensors


class Distribution(NamedTuple):
    """A histogram, as its values at QUANTILES."""

    step: int
    quantiles: list[float]


class Text(NamedTuple):
    step: int
    text: str


class Points:
    """A figure's values in the order in which they were written."""

    __slots__ = ("steps", "values")

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def drop_from(self, step: int) -> None:
        """Forgets this step and all later ones."""
        if any(known >= step for known in self.steps):
            keep = [known < step for known in self.steps]
            self.steps = array("q", compress(self.steps, keep))
            self.values = array("d", compress(self.values, keep))


class Events:
    """The content of a run's event files, oldest first.

    A writer that starts again at a step says so, and what was written of that step and later ones is dropped.
    """

    def __init__(self) -> None:
        self.points: dict[str, Points] = {}
        self.distributions: dict[str, list[Distribution]] = {}
        self.texts: dict[str, deque[Text]] = {}
        self.damages: list[str] = []

    def read(self, path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> None:
        """Adds one file."""
        records = RecordFile(path, on_bytes)
        unreadable = 0
        for record in records:
            try:
                event = Event.FromString(record)
            except DecodeError:
                unreadable += 1
                continue
            if event.HasField("summary"):
                for value in event.summary.value:
                    self._add(event.step, value)
            elif event.HasField("session_log") and event.session_log.status == SessionLog.START:
                self._drop_from(event.step)
        if unreadable:
            records.damages.append(f"{path.name}: {unreadable} records are no events and were left out")
        self.damages += records.damages

    def _add(self, step: int, value: Summary.Value) -> None:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            self._scalar(value.tag, step, value.simple_value)
        elif kind == "histo":
            self._distribution(value.tag, step, value.histo)
        elif kind == "tensor":
            self._tensor(step, value)

    def _scalar(self, tag: str, step: int, value: float) -> None:
        points = self.points.get(tag)
        if points is None:
            points = self.points[tag] = Points()
        points.add(step, value)

    def _distribution(self, tag: str, step: int, histogram: HistogramProto) -> None:
        found = quantiles(histogram.bucket_limit, histogram.bucket, histogram.min, histogram.max)
        if found:
            self.distributions.setdefault(tag, []).append(Distribution(step, found))

    def _tensor(self, step: int, value: Summary.Value) -> None:
        plugin = value.metadata.plugin_data.plugin_name
        if plugin == "text" or value.tensor.string_val:
            if value.tensor.string_val:
                texts = self.texts.setdefault(value.tag.removesuffix(_SUFFIX), deque(maxlen=KEPT_TEXTS))
                texts.append(Text(step, value.tensor.string_val[0].decode("utf-8", "replace")))
            return
        numbers = _numbers(value.tensor)
        if plugin == "histograms" and len(numbers) and len(numbers) % 3 == 0:
            left, right, count = numbers.reshape(-1, 3).T
            found = quantiles(right.tolist(), count.tolist(), float(left[0]), float(right[-1]))
            if found:
                self.distributions.setdefault(value.tag, []).append(Distribution(step, found))
        elif len(numbers) == 1:
            self._scalar(value.tag, step, float(numbers[0]))

    def _drop_from(self, step: int) -> None:
        for points in self.points.values():
            points.drop_from(step)
        for tag, distributions in self.distributions.items():
            self.distributions[tag] = [one for one in distributions if one.step < step]
        for tag, texts in self.texts.items():
            self.texts[tag] = deque((one for one in texts if one.step < step), maxlen=KEPT_TEXTS)


def _numbers(tensor: TensorProto) -> NDArray[np.float64]:
    """The values of a tensor of numbers, flat; none of other types."""
    kind = _TYPES.get(tensor.dtype)
    if kind is None:
        return np.empty(0)
    if tensor.tensor_content:
        return np.frombuffer(tensor.tensor_content, kind).astype(np.float64)
    given = (tensor.float_val, tensor.double_val, tensor.int_val, tensor.int64_val)
    return np.array([number for numbers in given for number in numbers], dtype=np.float64)


def quantiles(limits: Sequence[float], counts: Sequence[float], low: float, high: float) -> list[float]:
    """Of a histogram whose bucket i holds `counts[i]` values up to `limits[i]`; even within a bucket."""
    total = math.fsum(counts)
    if not total > 0 or not math.isfinite(total):
        return []
    edges = np.clip(np.concatenate([[low], limits]), low, high)
    shares = np.concatenate([[0.0], np.cumsum(counts)]) / total
    # Buckets that are empty have no room in the inverse.
    keep = np.concatenate([[True], np.diff(shares) > 0])
    first = int(np.argmax(keep[1:]))  # the first bucket with values begins where the empty ones before it end
    starts, shares = np.concatenate([[edges[first]], edges[keep][1:]]), shares[keep]
    found: list[float] = np.interp(QUANTILES, shares, starts).tolist()
    return [low, *found[1:-1], high]
