"""Named tensors that are read by rows, wherever they lie: what every conversion reads from."""

import hashlib
import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_rl.checkpoint.hf import IGNORED_SUFFIX, SafetensorsReader
from megatron_rl.checkpoint.scratch import room
from megatron_rl.checkpoint.torch_dist import Spec, read_bytes

# Of safetensors. Only `FLOATS` are converted; what else there is may be left out by name.
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = FLOATS | {
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in FLOATS.items()}


class Tensors(Protocol):
    """`specs` says what there is, by name."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    def read(self, name: str, index: tuple[int, ...], start: int, stop: int, out: Tensor) -> None:
        """Fills `out` with rows [start, stop) of the tensor, or of the one at `index` of a stack, in `out`'s dtype."""


class _Place(NamedTuple):
    """Where a tensor's bytes are."""

    file: str
    offset: int


class HfTensors:
    """A Hugging Face directory's tensors, read into memory that the caller has: nothing is mapped.

    Mapped pages would count as memory of this process for as long as the files are open.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.specs: dict[str, Spec] = {}
        self._places: dict[str, _Place] = {}
        self._open: dict[str, FileIO] = {}
        files = {name: file for name, file in SafetensorsReader(directory).files.items() if _counts(name)}
        for file in sorted(set(files.values())):
            held = _header(self.directory / file)
            for name in sorted(name for name, where in files.items() if where == file):
                self._place(name, file, held)

    def _place(self, name: str, file: str, held: dict[str, Any]) -> None:
        path = self.directory / file
        if name not in held:
            raise ValueError(f"{path} has no tensor {name!r}, as the index says")
        dtype, shape, (start, _) = (held[name][key] for key in ("dtype", "shape", "data_offsets"))
        if dtype not in DTYPES:
            raise ValueError(f"{path} holds {name} as {dtype}, which is not known here")
        self.specs[name] = Spec(DTYPES[dtype], tuple(shape))
        self._places[name] = _Place(file, held[""] + start)

    def files(self) -> dict[str, os.stat_result]:
        """The files that hold them, and what the system says of each."""
        return {
            file: (self.directory / file).stat() for file in sorted({place.file for place in self._places.values()})
        }

    def identity(self) -> dict[str, Any]:
        """Size, and SHA-256 of the header, of each file: which tensors it has, not what is in them."""
        return {
            file: {
                "bytes": held.st_size,
                "header_sha256": hashlib.sha256(_header_bytes(self.directory / file)).hexdigest(),
            }
            for file, held in self.files().items()
        }

    def read(self, name: str, index: tuple[int, ...], start: int, stop: int, out: Tensor) -> None:
        spec, place = self.specs[name], self._places[name]
        if place.file not in self._open:
            self._open.setdefault(place.file, FileIO(self.directory / place.file))
        same = out.dtype == spec.dtype and out.is_contiguous()
        raw = out if same else room("raw", tuple(out.shape), spec.dtype)
        read_bytes(self._open[place.file].fileno(), raw, place.offset + start * spec.row_bytes)
        if not same:
            out.copy_(raw)


def _counts(name: str) -> bool:
    return not name.endswith(IGNORED_SUFFIX)


def _header(path: Path) -> dict[str, Any]:
    """What a file, which SafetensorsReader has checked, says of its tensors; under "" where their bytes begin."""
    text = _header_bytes(path)
    return {**json.loads(text), "": 8 + len(text)}


def _header_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
