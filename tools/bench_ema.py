"""The moving average of weights beside a copy of the same bytes, and beside an update step: CPU seconds.

    python tools/bench_ema.py [--size 50m] [--tokens 8192]

`ema_update_` takes float32 averages and weights with the shapes of a Llama's tensors. It reads both and writes one: 12
bytes per weight. The baseline, and the limit, is a copy in as many pieces that moves as many: a piece is half as long
again as its tensor, and 6 bytes per weight are read and 6 written.

The update step is a forward and backward pass over `tokens` tokens in sequences of 512 and the optimizer's step, in one
mini-batch. Beside it stand the average's update as a run makes it, on the optimizer's shards, and the smoothing of as
many importance weights along their sequences, forward and backward (`ops/scan.py`).
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_train import make_samples

from megatron_rl.bench.measuring import take_turns
from megatron_rl.bench.models import SIZES, make_llama
from megatron_rl.bench.rows import Row
from megatron_rl.bench.script import main, parser_of
from megatron_rl.config.schema import ModelConfig, OptimConfig
from megatron_rl.ops.ema import ema_update_
from megatron_rl.ops.scan import exponential_average
from megatron_rl.parallel.mesh import create_mesh, destroy_mesh
from megatron_rl.workers.average import WeightAverage
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.objective import NegativeLogLikelihood

LENGTH, MICRO_BATCH_TOKENS = 512, 4096


def beside_a_copy(worker: ModelWorker, size: str, repeats: int) -> Row:
    shapes = [parameter.shape for model in worker.models for parameter in model.parameters()]
    averages, weights = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    sources, targets = ([torch.randn(math.prod(shape) * 3 // 2) for shape in shapes] for _ in range(2))
    sides = {
        "ema": lambda: ema_update_(averages, weights, 0.99),
        "copy": lambda: torch._foreach_copy_(targets, sources),
    }
    for side in sides.values():
        side()
    turns = take_turns(sides, repeats, calls=dict.fromkeys(sides, 3))
    count = sum(map(math.prod, shapes))
    return Row(
        bench="ema",
        case=f"ema {size} float32, {len(shapes)} tensors",
        times=turns.seconds["ema"],
        baseline="copy of the same bytes",
        ratio=turns.ratio("ema", "copy"),
        limit="copy bandwidth",
        share=turns.ratio("copy", "ema"),
        figures={
            "million weights": count / 1e6,
            "GB/s": 12e-9 * count / turns.median("ema"),
            "copy GB/s": 12e-9 * count / turns.median("copy"),
        },
        wanted={"ratio": 1.15},
    )


def beside_a_step(worker: ModelWorker, size: str, tokens: int, repeats: int) -> Iterator[Row]:
    samples = make_samples([LENGTH] * (tokens // LENGTH), SIZES[size]["vocab_size"])
    plan = worker.plan(samples, MICRO_BATCH_TOKENS)
    average = WeightAverage(worker, lambda updates: 0.99)
    ratios = (0.3 * torch.randn(tokens, generator=torch.Generator().manual_seed(0))).exp().requires_grad_()
    ids = torch.arange(tokens) // LENGTH

    def step() -> None:
        worker.forward_backward(samples, plan, NegativeLogLikelihood())
        assert worker.step().applied

    sides = {
        "average's update": average.update,
        f"scan of {tokens} tokens": lambda: exponential_average(ratios, ids, beta=0.1).sum().backward(),
        "step": step,
    }
    for side in sides.values():
        side()
    turns = take_turns(sides, repeats)
    for name in list(sides)[:-1]:
        yield Row(
            bench="ema",
            case=f"{size} float32 {name}",
            times=turns.seconds[name],
            baseline=f"update step, {tokens} tokens",
            ratio=turns.ratio(name, "step"),
            figures={"step s": turns.median("step")},
            wanted={"ratio": 0.01},
        )


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        make_llama(Path(folder), options.size)
        worker = ModelWorker(ModelConfig(path=folder), OptimConfig(), create_mesh(), total_steps=100)
    yield beside_a_copy(worker, options.size, options.repeats)
    yield from beside_a_step(worker, options.size, options.tokens, options.repeats)
    destroy_mesh()


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--tokens", type=int, default=8192, help="of an update step")
    main("ema", parser, measure, quick={"size": "1m", "tokens": 1024, "repeats": 3})
