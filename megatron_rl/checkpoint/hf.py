"""Hugging Face model directories: slices read from safetensors, whole models written to them."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
# Frequencies that old checkpoints carry and every model computes for itself.
IGNORED_SUFFIX = "rotary_emb.inv_freq"

FLOATS = ("F32", "BF16", "F16")
# Config, generation config, tokenizer, chat template; not what describes the tensors of the directory itself.
COMPANIONS = {".json", ".jinja", ".txt", ".model"}
NOT_COMPANIONS = {INDEX, "conversion.json"}
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


class SafetensorsReader:
    """Slices of the tensors in a directory's safetensors files, which stay open."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        index = self.directory / INDEX
        self.handles: dict[str, Any] = {}
        self.files: dict[str, str] = {}
        if index.is_file():
            self.files = _read_index(index)
        else:
            for path in sorted(self.directory.glob("*.safetensors")):
                self.files.update(dict.fromkeys(self._handle(path.name).keys(), path.name))
        if not self.files:
            raise ValueError(f"model.path={str(directory)!r} holds no *.safetensors: {_instead(self.directory)}")
        missing = sorted({name for name in self.files.values() if not (self.directory / name).is_file()})
        if missing:
            raise ValueError(f"{self.directory}: the index names {', '.join(missing)}, which is not there")

    def check(self, expected: frozenset[str]) -> None:
        """Refuses a checkpoint that lacks a tensor of the model, or holds one the model has no place for."""
        held = {name for name in self.files if not name.endswith(IGNORED_SUFFIX)}
        # A tied model may store its output layer a second time, under the name it is tied to the embedding by.
        surplus = held - expected - ({"lm_head.weight"} if "model.embed_tokens.weight" in expected else set())
        if expected - held:
            raise ValueError(f"{self.directory} lacks {_some(expected - held)}")
        if surplus:
            raise ValueError(f"{self.directory} holds {_some(surplus)}, for which the model's config has no place")

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses tensors of another model's shape, and those that are not floating point; reads headers only."""
        for name, shape in expected.items():
            held, dtype = self.shape(name), self._slice(name).get_dtype()
            if held != shape or dtype not in FLOATS:
                raise ValueError(
                    f"{self.directory / self.files[name]} holds {name} as {dtype} {list(held)}; the model's config "
                    f"asks for {' or '.join(FLOATS)} {list(shape)}"
                )

    def _slice(self, name: str) -> Any:
        if name not in self.files:
            raise ValueError(f"{self.directory} has no tensor {name!r}")
        handle = self._handle(self.files[name])
        try:
            return handle.get_slice(name)
        except SafetensorError as error:
            raise ValueError(
                f"{self.directory / self.files[name]} has no tensor {name!r}, as the index says"
            ) from error

    def _handle(self, file: str) -> Any:
        if file not in self.handles:
            try:
                self.handles[file] = safe_open(self.directory / file, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{self.directory / file} is damaged or no safetensors file: {error}; fetch it again"
                ) from error
        return self.handles[file]

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


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file, which must lie in the same directory and be safetensors."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    files = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(files, dict):
        raise ValueError(f"{path} has no weight_map of tensor names and files")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: {name} must lie in a *.safetensors file of this directory, not {file!r}")
    return files


def _instead(directory: Path) -> str:
    """What to do in a directory without safetensors."""
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLES)
    if not pickles:
        return "give a Hugging Face directory"
    return (
        f"{_some(pickles)} may hold any program and is never opened; if you trust it, convert it once with "
        "transformers: AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)"
    )


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
    changes: Mapping[str, Any] = {},
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Drains `weights` (a collective: every rank calls this) and, on the one rank with `write`, stores the model.

    `like` is the directory the model came from: its config, with `changes`, generation config, tokenizer and chat
    template are copied.
    The directory appears whole, or not at all; one that was there goes only when the new one is complete.
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
    copy_companions(like, partial, dtype=dtype, changes=changes)
    put_in_place(partial, target)


def copy_companions(like: str | Path, into: Path, *, dtype: str, changes: Mapping[str, Any] = {}) -> None:
    """What a model is beside its tensors: config, with `changes`, generation config, tokenizer and chat template."""
    for path in Path(like).iterdir():
        if path.suffix in COMPANIONS and path.name not in NOT_COMPANIONS:
            shutil.copy2(path, into / path.name)
    config = json.loads((into / "config.json").read_text())
    config.pop("torch_dtype", None)
    (into / "config.json").write_text(json.dumps(config | {**changes, "dtype": dtype}, indent=2) + "\n")


def put_in_place(partial: Path, target: Path) -> None:
    """Renames a complete directory; what was there before goes only now."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
