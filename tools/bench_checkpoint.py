"""Seconds to save and to load a checkpoint, against plainly writing and reading its bytes on the same disk, in turns.

    python tools/bench_checkpoint.py [--parameters 17]

A save ends when the disk has the bytes (fsync), their hashes are written, `latest` points at them and the checkpoint
before is deleted; a load begins with checking every hash. The plain write has the files' bytes in memory, writes as
many files, syncs them and their directory, and deletes those before; the plain read takes them into memory. What is
read was written just before, so both read from the page cache. The limit is a copy of the bytes from memory to memory.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_rl.bench.measuring import copy_rate, take_turns
from megatron_rl.bench.rows import Row
from megatron_rl.bench.script import main, parser_of
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


def synced(path: Path) -> None:
    """Waits until the disk has it."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write(files: Mapping[str, bytes], target: Path, before: Path) -> None:
    target.mkdir()
    for name, content in files.items():
        (target / name).write_bytes(content)
        synced(target / name)
    synced(target)
    shutil.rmtree(before, ignore_errors=True)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=".") as place:
        make_config(Path(place, "model"), options.parameters)
        model = ModelConfig(path=f"{place}/model", weights=RANDOM)
        worker = ModelWorker(model, OptimConfig(), create_mesh(), total_steps=1)
        yield from compare(worker, Path(place), options.repeats)
        destroy_mesh()


def compare(worker: ModelWorker, place: Path, repeats: int) -> Iterator[Row]:
    store = CheckpointStore(place / "checkpoints", keep=1)
    step = written = 0

    def latest() -> Path:
        path = store.latest()
        assert path is not None
        return path

    def save() -> None:
        nonlocal step
        step += 1
        store.save(step, {"actor": worker}, {})

    def plain_write() -> None:
        nonlocal written
        written += 1
        write(files, place / f"plain{written}", place / f"plain{written - 1}")

    save()
    files = {path.name: path.read_bytes() for path in sorted(latest().iterdir())}
    sides = {
        "save": save,
        "plain write": plain_write,
        "load": lambda: store.load(latest(), {"actor": worker}),
        "plain read": lambda: [path.read_bytes() for path in sorted(latest().iterdir())],
    }
    for side in sides.values():
        side()
    turns = take_turns(sides, repeats, clock="wall")
    size, rate = sum(map(len, files.values())), copy_rate(clock="wall")
    for name, baseline in (("save", "plain write"), ("load", "plain read")):
        yield Row(
            bench="checkpoint",
            case=f"{name}, {size / 1e6:.0f} MB",
            times=turns.seconds[name],
            clock="wall",
            baseline=f"{baseline} of the same bytes",
            ratio=turns.ratio(name, baseline),
            limit="copy bandwidth",
            share=2 * size / rate / turns.median(name),
            figures={"MB/s": size / 1e6 / turns.median(name), "plain MB/s": size / 1e6 / turns.median(baseline)},
        )


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--parameters", type=float, default=17, help="millions; each is 12 bytes of state")
    main("checkpoint", parser, measure, quick={"repeats": 3})
