"""One format seen as the other: Hugging Face tensors as those of a checkpoint, and the other way round."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.checkpoint.torch_dist import Spec
from megatron_rl.convert.rows import clipped, of_source
from megatron_rl.convert.table import Line
from megatron_rl.convert.tensors import Tensors


class AsMegatron:
    """Hugging Face tensors as the tensors of a checkpoint, a role's."""

    def __init__(self, source: Tensors, lines: Sequence[Line], role: str, dtypes: Mapping[str, torch.dtype]) -> None:
        self.source = source
        self.lines = {f"{role}.{line.key}": line for line in lines}
        self.specs = {key: Spec(dtypes[line.key], line.whole) for key, line in self.lines.items()}

    def read(self, name: str, index: tuple[int, ...], start: int, stop: int, out: Tensor) -> None:
        line = self.lines[name]
        names, filled = line.hf(index), 0
        for run in clipped(line.runs, start, stop):
            into = out[run.at - start : run.at - start + run.rows]
            self.source.read(names[run.source], (), run.start, run.start + run.rows, into)
            filled += run.rows
        out[filled:].zero_()  # padding is at the end


class AsHf:
    """The tensors of one role of a checkpoint as Hugging Face tensors."""

    def __init__(self, source: Tensors, lines: Sequence[Line], role: str) -> None:
        self.source, self.role = source, role
        self.specs: dict[str, Spec] = {}
        self.places: dict[str, tuple[Line, tuple[int, ...], int]] = {}
        for line in lines:
            dtype = source.specs[f"{role}.{line.key}"].dtype
            for index in line.indices():
                for number, (name, shape) in enumerate(zip(line.hf(index), line.hf_shapes, strict=True)):
                    self.specs[name] = Spec(dtype, shape)
                    self.places[name] = line, index, number

    def read(self, name: str, index: tuple[int, ...], start: int, stop: int, out: Tensor) -> None:
        line, at, number = self.places[name]
        for run in of_source(line.runs, number, start, stop):
            into = out[run.start - start : run.start - start + run.rows]
            self.source.read(f"{self.role}.{line.key}", at, run.at, run.at + run.rows, into)


class Resized:
    """Tensors with fewer or more rows of padding than they were saved with."""

    def __init__(self, source: Tensors, specs: Mapping[str, Spec]) -> None:
        self.source, self.specs = source, specs

    def read(self, name: str, index: tuple[int, ...], start: int, stop: int, out: Tensor) -> None:
        rows = self.source.specs[name].shape[len(index)]
        held = max(0, min(stop, rows) - start)
        if held:
            self.source.read(name, index, start, start + held, out[:held])
        out[held:].zero_()
