"""A weight update of an engine beside a copy of the same bytes.

    python tools/bench_sync.py [--size 8m 50m] [--dtype float32 bfloat16]

The update is what a step of training does (`rollout/sync.py`): the trainer's weights under their Hugging Face names,
the checksum of each on its way and again in the engine. Baseline and limit are a copy of as many bytes, tensor by
tensor, from memory to memory. Engines in this process are measured in CPU seconds of one thread if they are `hf`; where
vLLM can be imported, its engine and a server of it beside this process, by the clock on the wall. A server takes the
weights through shared memory, and its pause and everything else counts.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from megatron_rl.bench.measuring import take_turns
from megatron_rl.bench.models import SIZES, make_llama
from megatron_rl.bench.rows import Clock, Row
from megatron_rl.bench.script import main, parser_of
from megatron_rl.config.schema import DType, ModelConfig, OptimConfig
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.parallel.mesh import create_mesh, destroy_mesh
from megatron_rl.rollout.engine import Engine
from megatron_rl.rollout.hf_engine import HFEngine
from megatron_rl.rollout.sync import push
from megatron_rl.rollout.vllm.engine import VLLMEngine
from megatron_rl.rollout.vllm.options import engine_options
from megatron_rl.rollout.vllm.served import ServedEngine
from megatron_rl.rollout.vllm.server import Launch
from megatron_rl.workers.model_worker import ModelWorker

SEQUENCES, TOKENS = 8, 64  # that the engines are made for


def engines(folder: Path, dtype: torch.dtype) -> Mapping[str, Callable[[], Engine]]:
    tokenizer = load_tokenizer(str(folder))
    common = {"dtype": dtype, "stop": (0,), "max_sequences": SEQUENCES}
    made: dict[str, Callable[[], Engine]] = {"hf": lambda: HFEngine(folder, tokenizer, pad=0, **common)}
    if importlib.util.find_spec("vllm") is None:
        print("    vLLM cannot be imported here: its engines are left out")
        return made
    size = {"max_tokens": TOKENS, "kv_cache_gb": 0.25}
    options = engine_options(folder, dtype=dtype, max_sequences=SEQUENCES, tp=1, **size)
    launch = Launch(options=options, host="127.0.0.1", python=None, gpus=(), log=folder / "server.log")
    served = {"servers": [launch], "exchange": None, "restarts": 0, "start_timeout_s": 600.0, "timeout_s": 120.0}
    return made | {
        "vllm": lambda: VLLMEngine(folder, tokenizer, tied=False, **size, **common),
        "vllm_server": lambda: ServedEngine(tokenizer, tied=False, **served, **common),
    }


def compare(worker: ModelWorker, name: str, engine: Engine, case: str, repeats: int) -> Row:
    clock: Clock = "cpu" if name == "hf" else "wall"
    sources = [tensor.detach().clone() for _, tensor in worker.named_hf_weights()]
    targets = [torch.empty_like(source) for source in sources]
    version = 0

    def sync() -> None:
        nonlocal version
        version += 1
        push(worker.named_hf_weights, engine, version)

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    sync()
    copy()
    turns = take_turns({"sync": sync, "copy": copy}, repeats, clock=clock)
    size = sum(source.nbytes for source in sources)
    return Row(
        bench="sync",
        case=f"{case} to {name}",
        times=turns.seconds["sync"],
        clock=clock,
        baseline="copy of the same bytes",
        ratio=turns.ratio("sync", "copy"),
        limit="copy bandwidth",
        share=turns.ratio("copy", "sync"),
        figures={"MiB": size / 2**20, "MiB/s": size / 2**20 / turns.median("sync")},
        wanted={"ratio": 3.0} if name == "hf" else {},
    )


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for size in options.size:
        for dtype in options.dtype:
            with tempfile.TemporaryDirectory() as folder:
                make_llama(Path(folder), size, getattr(torch, dtype))
                model = ModelConfig(path=folder, dtype=DType(dtype))
                worker = ModelWorker(model, OptimConfig(), create_mesh(), total_steps=1)
                for name, make in engines(Path(folder), getattr(torch, dtype)).items():
                    engine = make()
                    try:
                        yield compare(worker, name, engine, f"{size} {dtype}", options.repeats)
                    finally:
                        engine.close()
                destroy_mesh()


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["8m", "50m"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    main("sync", parser, measure, quick={"size": ["1m"], "dtype": ["float32"], "repeats": 3})
