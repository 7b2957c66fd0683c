"""Measured scaling of the update over data, tensor and pipeline parallelism, beside what planning/speed.py predicts.

    OMP_NUM_THREADS=1 python tools/bench_scaling.py [--size 8m 50m] [--ranks 1 2 4] [--steps 5] [--json]

Each number of ranks is one torchrun over gloo with a thread per rank, and each row a real ModelWorker on a layout: its
forward and backward pass over random sequences and the optimizer's step; medians of `--steps` steps after a first one,
of the slowest rank. `strong` shares out the same sequences, `weak` takes as many for each rank. Efficiency is tokens/s
over ranks times those of one rank; with more ranks than cores, cores are what is shared out (marked *).

`waits` are seconds inside of torch.distributed's `Work.wait`: collectives and messages, and waiting for the others.
Rates of the machine (matrix products and attention at the model's sizes, copies beyond the caches, gloo's bandwidth
and latency) are measured in the same process group, on all ranks at once, and given to the model.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_train import make_samples
from transformers import LlamaConfig

from megatron_rl.bench.models import SIZES
from megatron_rl.config.schema import ModelConfig, OptimConfig
from megatron_rl.data.samples import Sample
from megatron_rl.models.hf_config import ModelShape
from megatron_rl.parallel.mesh import create_mesh, destroy_mesh, join_world
from megatron_rl.planning.activations import Build
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.machine import Machine
from megatron_rl.planning.speed import Batch, Model, update_seconds
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.objective import NegativeLogLikelihood

FLOAT32 = 4
BEYOND_CACHES = 16 * 2**20  # numbers of a copy
AXES = ("dp", "tp", "pp")
RATES = ("products", "attention", "memory", "link", "link_latency")
# Of a prediction, what is communication or waiting.
EXCHANGED = ("tensor parallel", "stage to stage", "bubble", "gradients", "weights")


class Options(NamedTuple):
    """What a worker is told, as JSON."""

    sizes: list[str]
    steps: int
    sequences: int  # of one rank
    length: int
    micro_batches: int  # of one rank
    folder: str


def layouts(ranks: int) -> list[dict[str, int]]:
    """Each axis alone, and on four ranks also two of them by two."""
    found = [{axis: ranks} for axis in AXES] if ranks > 1 else [{}]
    pairs = [{"tp": 2, "dp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "dp": 2}]
    return found + (pairs if ranks == 4 else [])


@contextmanager
def counted_waits() -> Iterator[list[float]]:
    """Seconds of each wait for a collective or a message inside."""
    seconds: list[float] = []
    before = dist.Work.wait

    def wait(work: dist.Work, *arguments: Any) -> bool:
        start = time.perf_counter()
        try:
            return before(work, *arguments)
        finally:
            seconds.append(time.perf_counter() - start)

    dist.Work.wait = wait
    try:
        yield seconds
    finally:
        dist.Work.wait = before


def timed(work: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds, all ranks at once, mean over ranks."""
    found = []
    work()
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return mean_over_ranks(median(found))


def mean_over_ranks(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def largest_over_ranks(value: float) -> float:
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def measured_machine(shape: ModelShape, tokens: int, length: int) -> Machine:
    """This one, with all ranks at work; sizes are those of one micro-batch."""
    ranks = dist.get_world_size()
    rows, weight = torch.randn(tokens, shape.hidden_size), torch.randn(shape.hidden_size, shape.ffn_hidden_size)
    result = rows @ weight
    products = timed(lambda: (rows @ weight, result @ weight.T, rows.T @ result))  # as forward and backward
    heads = torch.randn(tokens // length, shape.num_heads, length, shape.head_dim)
    attention = timed(lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True))
    small, large = torch.zeros(1), torch.zeros(2**20)
    old, new = torch.zeros(2, BEYOND_CACHES)
    copied = timed(lambda: new.copy_(old))
    latency, bandwidth = 0.0, math.inf  # of one rank nothing is asked
    if ranks > 1:
        hops = 2 * (ranks - 1)
        latency = timed(lambda: dist.all_reduce(small), 51) / hops
        hop = timed(lambda: dist.all_reduce(large)) / hops
        bandwidth = FLOAT32 * large.numel() / ranks / max(hop - latency, 1e-9)
    return Machine(
        products=3 * 2 * rows.numel() * shape.ffn_hidden_size / products,
        attention=2 * shape.num_heads * shape.head_dim * tokens * length / attention,
        memory=2 * FLOAT32 * BEYOND_CACHES / copied,
        link=bandwidth,
        link_latency=latency,
        network=bandwidth,
        network_latency=latency,
        node=ranks,
    )


def measured(worker: ModelWorker, samples: Sequence[Sample], tokens: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step, and those spent waiting, of the rank where they are most."""
    plan = worker.plan(samples, tokens)
    found = []
    for _ in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        with counted_waits() as waits:
            worker.forward_backward(samples, plan, NegativeLogLikelihood(entropy=False))
            worker.step()
        found.append((time.perf_counter() - start, sum(waits)))
    seconds, waited = (median(of) for of in zip(*found[1:], strict=True))
    return largest_over_ranks(seconds), largest_over_ranks(waited)


def row(size: str, kind: str, where: dict[str, int], options: Options) -> dict[str, Any]:
    """One layout, measured and predicted."""
    ranks = dist.get_world_size()
    sequences = options.sequences * (ranks if kind == "weak" else 1)
    budget = options.sequences // options.micro_batches * options.length
    mesh = create_mesh(**where)
    model = ModelConfig(path=str(Path(options.folder, size)), weights="random")
    worker = ModelWorker(model, OptimConfig(), mesh, total_steps=options.steps + 1)
    layout = Layout(tp=mesh.tp_size, pp=mesh.pp_size, dp=mesh.dp_size)
    samples = make_samples([options.length] * sequences, worker.shape.vocab_size)
    machine = measured_machine(worker.shape, budget, options.length)
    seconds, waited = measured(worker, samples, budget, options.steps)
    micro_batches = worker.plan(samples, budget).num_micro_batches
    each = sequences / (layout.dp * micro_batches)
    batch = Batch(
        tokens=each * options.length, loss_tokens=each * (options.length - 1), squares=each * options.length**2
    )
    setting = Model(shape=worker.shape, layout=layout, machine=machine, width=FLOAT32, build=Build.local)
    parts = update_seconds(setting, batch, micro_batches)
    worker.close()
    return {
        "size": size,
        "kind": kind,
        "layout": " ".join(f"{axis}={n}" for axis, n in where.items()) or "one rank",
        "ranks": ranks,
        "shared": ranks > len(os.sched_getaffinity(0)),
        "tokens": sequences * options.length,
        "micro_batches": micro_batches,
        "seconds": seconds,
        "tokens_per_second": sequences * options.length / seconds,
        "waits": waited,
        "predicted": parts.total,
        "predicted_waits": sum(parts.get(name, 0.0) for name in EXCHANGED),
        "error": parts.total / seconds - 1,
        "parts": parts,
        "machine": {name: rate for name in RATES if math.isfinite(rate := getattr(machine, name))},
    }


def work(options: Options) -> None:
    """On each rank of one torchrun: all rows of its number of ranks, as JSON lines of rank 0."""
    ranks = int(os.environ["WORLD_SIZE"])
    kinds = ("strong", "weak") if ranks > 1 else ("strong",)
    for number, (size, kind, where) in enumerate(
        (size, kind, where) for size in options.sizes for kind in kinds for where in layouts(ranks)
    ):
        join_world(f"row{number}")
        found = row(size, kind, where, options)
        if dist.get_rank() == 0:
            with Path(options.folder, "rows.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
        destroy_mesh()


def launch(ranks: int, options: Options) -> list[dict[str, Any]]:
    """The rows of one torchrun."""
    file = Path(options.folder, "rows.jsonl")
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, __file__, "--work", json.dumps(options)], check=True, env=environment)
    return [json.loads(line) for line in file.read_text().splitlines()]


def shown(found: dict[str, Any], alone: dict[str, Any]) -> str:
    """A line; efficiency against the rate of one rank in the same run."""
    cores = min(found["ranks"], len(os.sched_getaffinity(0)))
    efficiency = found["tokens_per_second"] / (cores * alone["tokens_per_second"])
    where = found["layout"] + ("*" if found["shared"] else "")
    return (
        f"{found['size']:>4}  {found['kind']:<6} {where:<11} {found['tokens']:>6} tokens  "
        f"{found['micro_batches']:>2} x  {found['seconds']:7.3f} s  {found['tokens_per_second']:7.0f} tok/s  "
        f"efficiency {efficiency:4.0%}  waits {found['waits']:6.3f} s  predicted {found['predicted']:7.3f} s, "
        f"waits {found['predicted_waits']:6.3f} s  error {found['error']:+4.0%}"
    )


def rates(found: dict[str, Any]) -> str:
    of = found["machine"]
    exchanged = f", gloo {of['link'] / 1e9:.2f} GB/s and {of['link_latency'] * 1e6:.0f} us" if "link" in of else ""
    return (
        f"{found['size']:>4}  {found['ranks']} rank(s) at once: products {of['products'] / 1e9:.1f} GFLOP/s, attention "
        f"{of['attention'] / 1e9:.1f} GFLOP/s, copies {of['memory'] / 1e9:.1f} GB/s{exchanged}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["8m", "50m"])
    parser.add_argument("--ranks", nargs="+", type=int, choices=(2, 4), default=[2, 4], help="beside one")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=8, help="of one rank, a multiple of --micro-batches")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="rows as JSON lines")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(Options(*json.loads(options.work)))
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    """All rows, one torchrun after the other; that of one rank first."""
    cores = len(os.sched_getaffinity(0))
    if not options.json:
        print(f"torch {torch.__version__}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as folder:
        for size in options.size:
            heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024}
            LlamaConfig(**SIZES[size], **heads, tie_word_embeddings=False).save_pretrained(Path(folder, size))
        told = Options(options.size, options.steps, options.sequences, options.length, options.micro_batches, folder)
        alone: dict[str, Any] = {}
        for ranks in (1, *options.ranks):
            seen = set()
            for found in launch(ranks, told):
                alone.setdefault(found["size"], found)
                if options.json:
                    print(json.dumps(found), flush=True)
                    continue
                if found["size"] not in seen:
                    print(rates(found), flush=True)
                    seen.add(found["size"])
                print(shown(found, alone[found["size"]]), flush=True)


if __name__ == "__main__":
    main()
