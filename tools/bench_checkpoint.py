"""Seconds to save and to load a checkpoint, against copying its files on the same disk, in turn within one process.

    python tools/bench_checkpoint.py --parameters 17 --rounds 5

A save ends when the disk has the bytes (fsync), their hashes are written, `latest` points at them and the checkpoint
before is deleted; a load begins with checking every hash. The copy reads and writes the same files, syncs them too, and
deletes the copy before.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from megatron_rl.checkpoint.store import CheckpointStore
from megatron_rl.config.schema import RANDOM, ModelConfig, OptimConfig
from megatron_rl.parallel.mesh import create_mesh, destroy_mesh
from megatron_rl.workers.model_worker import ModelWorker

HIDDEN, LAYERS = 512, 4


def make_config(directory: Path, millions: float) -> None:
    """A Llama of about so many million parameters, most of them in its embedding."""
    from transformers import LlamaConfig

    layer = 4 * HIDDEN**2 + 3 * HIDDEN * 4 * HIDDEN
    vocabulary = int((millions * 1e6 - LAYERS * layer) / (2 * HIDDEN))
    LlamaConfig(
        vocab_size=max(vocabulary, 64),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ).save_pretrained(directory)


def copy(source: Path, target: Path, before: Path) -> None:
    """Copies the files, waits until the disk has them, and deletes the copy before."""
    shutil.copytree(source, target)
    for path in (*target.rglob("*"), target):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(before, ignore_errors=True)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=17, help="millions; each is 12 bytes of state")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as place:
        make_config(Path(place, "model"), arguments.parameters)
        worker = ModelWorker(
            ModelConfig(path=f"{place}/model", weights=RANDOM), OptimConfig(), create_mesh(), total_steps=1
        )
        store = CheckpointStore(Path(place, "checkpoints"), keep=1)
        times: dict[str, list[float]] = {"save": [], "load": [], "copy": []}
        store.save(1, {"actor": worker}, {})
        for number in range(2, arguments.rounds + 2):
            times["save"].append(seconds(lambda step=number: store.save(step, {"actor": worker}, {})))  # type: ignore[misc]
            path = store.latest()
            assert path is not None
            times["load"].append(seconds(lambda path=path: store.load(path, {"actor": worker})))  # type: ignore[misc]
            now, before = Path(place, f"copy{number}"), Path(place, f"copy{number - 1}")
            times["copy"].append(seconds(lambda path=path, now=now, before=before: copy(path, now, before)))  # type: ignore[misc]
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        destroy_mesh()
    print(f"{size:.0f} MB, medians of {arguments.rounds} rounds")
    for name, values in times.items():
        middle = median(values)
        ratios = median(value / copied for value, copied in zip(values, times["copy"], strict=True))
        print(f"{name:<5} {middle:6.3f} s  {size / middle:6.0f} MB/s  {ratios:5.2f} x copy")


if __name__ == "__main__":
    main()
