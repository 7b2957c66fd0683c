"""Hugging Face model directories: slices read from safetensors, whole models written to them."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
# Frequencies that old checkpoints carry and every model computes for itself.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


class SafetensorsReader:
    """Slices of the tensors in a directory's safetensors files, which stay open."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        index = self.directory / INDEX
        self.files: dict[str, str] = {}
        if index.is_file():
            self.files = json.loads(index.read_text())["weight_map"]
        else:
            for path in sorted(self.directory.glob("*.safetensors")):
                with safe_open(path, "pt") as handle:
                    self.files.update(dict.fromkeys(handle.keys(), path.name))
        if not self.files:
            raise ValueError(f"model.path={str(directory)!r} holds no *.safetensors: give a Hugging Face directory")
        missing = sorted({name for name in self.files.values() if not (self.directory / name).is_file()})
        if missing:
            raise ValueError(f"{self.directory}: the index names {', '.join(missing)}, which is not there")
        self.handles: dict[str, Any] = {}

    def check(self, expected: frozenset[str]) -> None:
        """Refuses a checkpoint that lacks a tensor of the model, or holds one the model has no place for."""
        held = {name for name in self.files if not name.endswith(IGNORED_SUFFIX)}
        # A tied model may store its output layer a second time, under the name it is tied to the embedding by.
        surplus = held - expected - ({"lm_head.weight"} if "model.embed_tokens.weight" in expected else set())
        if expected - held:
            raise ValueError(f"{self.directory} lacks {_some(expected - held)}")
        if surplus:
            raise ValueError(f"{self.directory} holds {_some(surplus)}, for which the model's config has no place")

    def _slice(self, name: str) -> Any:
        if name not in self.files:
            raise ValueError(f"{self.directory} has no tensor {name!r}")
        file = self.files[name]
        if file not in self.handles:
            self.handles[file] = safe_open(self.directory / file, "pt")
        return self.handles[file].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def size(self, name: str) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        length = self.shape(name)[0]
        return self._slice(name)[min(start, length) : min(stop, length)]

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        return self._slice(name)[:, start:stop]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _shards(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Groups tensors, in order, into files of at most `limit` bytes (a larger tensor has a file of its own)."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    yield shard


def write_model(
    weights: Iterable[tuple[str, Tensor]],
    directory: str | Path,
    *,
    like: str | Path,
    write: bool,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Drains `weights` (a collective: every rank calls this) and, on the one rank with `write`, stores the model.

    `like` is the directory the model came from: its config, generation config, tokenizer and chat template are copied.
    The directory appears whole, or not at all.
    """
    if not write:
        for _ in weights:
            pass
        return
    target = Path(directory)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    placed: dict[str, int] = {}
    total = count = 0
    dtype = ""
    for count, shard in enumerate(_shards(weights, shard_bytes), start=1):
        save_file(shard, partial / f"{count}.part", metadata={"format": "pt"})
        placed.update(dict.fromkeys(shard, count))
        total += sum(tensor.nbytes for tensor in shard.values())
        dtype = str(next(iter(shard.values())).dtype).removeprefix("torch.")
    names = {1: "model.safetensors"}
    if count > 1:
        names = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    for n, name in names.items():
        (partial / f"{n}.part").rename(partial / name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {key: names[n] for key, n in placed.items()}}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
    for path in Path(like).iterdir():
        if path.suffix in {".json", ".jinja", ".txt", ".model"} and path.name != INDEX:
            shutil.copy2(path, partial / path.name)
    config = json.loads((partial / "config.json").read_text())
    config.pop("torch_dtype", None)
    (partial / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
