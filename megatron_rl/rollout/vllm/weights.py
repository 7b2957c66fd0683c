"""Weights on their way to vLLM: the output layer by its name, and files that servers read."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.metrics.progress import tick

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "index.json"
BUCKET_BYTES = 1 << 29


def with_output_layer(weights: Iterable[tuple[str, Tensor]], tied: bool) -> Iterator[tuple[str, Tensor]]:
    """A tied output layer is not in a checkpoint, and vLLM keeps a packed copy: it goes by a name of its own."""
    for name, tensor in weights:
        yield name, tensor
        if tied and name == EMBEDDING:
            yield OUTPUT, tensor


class WeightFiles:
    """One version of a model in a folder: buckets of tensors, each a safetensors file, and an index.

    A new version replaces file by file, each at once, and the index last. Whoever still reads an old file keeps it.
    """

    def __init__(self, folder: Path, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.folder, self.bucket_bytes = folder, bucket_bytes
        self.bytes = 0  # of the version that is there

    def write(self, weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        """One bucket is held in memory at a time, beside the one tensor that fills it."""
        bucket: dict[str, Tensor] = {}
        held = files = self.bytes = 0
        for name, tensor in weights:
            bucket[name] = tensor.detach().cpu().contiguous()
            held += tensor.nbytes
            if held >= self.bucket_bytes:
                self._put(bucket, files)
                self.bytes += held
                bucket, held, files = {}, 0, files + 1
        if bucket:
            self._put(bucket, files)
            self.bytes += held
            files += 1
        index = self.folder / f"{INDEX}.partial"
        index.write_text(json.dumps({"label": label, "files": [_bucket(number) for number in range(files)]}))
        os.replace(index, self.folder / INDEX)

    def _put(self, bucket: dict[str, Tensor], number: int) -> None:
        tick()
        partial = self.folder / f"{_bucket(number)}.partial"
        save_file(bucket, partial)
        os.replace(partial, self.folder / _bucket(number))


def read_weights(folder: Path, label: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of that label; ValueError where the folder holds others."""
    index = json.loads((folder / INDEX).read_text())
    if index["label"] != label:
        raise ValueError(f"{folder} holds the weights {index['label']}, not {label}")
    for file in index["files"]:
        with safe_open(folder / file, "pt") as bucket:
            names = bucket.keys()
            for key in names:
                yield key, bucket.get_tensor(key)


def _bucket(number: int) -> str:
    return f"bucket-{number:05d}.safetensors"
