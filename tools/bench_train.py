"""Tokens per second of the update's forward and backward pass, beside a plain Hugging Face loop in the same process.

    OMP_NUM_THREADS=1 python tools/bench_train.py [--size 8m 50m] [--dtype float32 bfloat16] [--repeats 5]

Both sides compute the gradient of the same loss (mean negative log-likelihood of every next token) of the same weights
on the same sequences: here packed, through megatron-core; there padded, through transformers with SDPA. `equal` are
eight sequences of 512 tokens, `ragged` sixteen of 40 to 512 (46% of the padded rectangle). The sides take turns,
medians are quoted, and only real tokens count.

MFU = model FLOPs / (CPU seconds x the GEMM rate per core that is measured in this process, in the same dtype), with
FLOPs = 6 x (parameters without the input embedding) x tokens + 6 x layers x hidden x sum of squared lengths.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rl.config.schema import DType, ModelConfig, OptimConfig
from megatron_rl.data.samples import Sample, from_example, weighed
from megatron_rl.parallel.mesh import create_mesh, destroy_mesh
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.objective import NegativeLogLikelihood

SHAPES = {
    "8m": {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 704, "vocab_size": 4096},
    "50m": {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408, "vocab_size": 8192},
}
LENGTHS = {
    "equal": [512] * 8,
    "ragged": [40, 512, 96, 300, 150, 420, 60, 210, 130, 380, 75, 260, 180, 445, 110, 400],
}
MICRO_BATCH = 8  # sequences in one padded batch of the plain loop


class Timing(NamedTuple):
    wall: float
    cpu: float


def make_samples(lengths: Sequence[int], vocabulary: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return weighed([from_example(i, ids[:1], ids[1:]) for i, ids in enumerate(tokens)], "token-mean")


def plain_loss(model: Any, samples: Sequence[Sample]) -> float:
    """One gradient the usual way: pad, mask, cross-entropy over all logits."""
    model.zero_grad()
    tokens = sum(sample.response_length for sample in samples)
    total = 0.0
    for start in range(0, len(samples), MICRO_BATCH):
        ids = [sample.token_ids for sample in samples[start : start + MICRO_BATCH]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        real = torch.arange(padded.shape[1])[None] < torch.tensor([len(x) for x in ids])[:, None]
        mask = None if bool(real.all()) else real.long()
        logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = torch.where(real[:, 1:], padded[:, 1:], -100)
        loss = (
            torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / tokens
        )
        loss.backward()
        total += loss.item()
    return total


def timed(step: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP per CPU second of a 1024^3 product, median of ten."""
    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    a @ b
    return statistics.median(2 * 1024**3 / timed(lambda: a @ b).cpu for _ in range(10))


def flops(config: LlamaConfig, parameters: int, lengths: Sequence[int]) -> float:
    dense = parameters - config.vocab_size * config.hidden_size
    attention = 6 * config.num_hidden_layers * config.hidden_size * sum(length**2 for length in lengths)
    return 6.0 * dense * sum(lengths) + attention


def compare(size: str, dtype: str, repeats: int) -> None:
    config = LlamaConfig(
        **SHAPES[size],
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).to(getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        worker = ModelWorker(ModelConfig(path=folder, dtype=DType(dtype)), OptimConfig(), create_mesh(), total_steps=1)
    for name, lengths in LENGTHS.items():
        print(f"{size:>4} {dtype:<9} {name:<7}", measure(worker, plain, lengths, repeats), flush=True)
    destroy_mesh()


def measure(worker: ModelWorker, plain: Any, lengths: Sequence[int], repeats: int) -> str:
    """Both sides in turn, `repeats` times; a row of medians."""
    samples = make_samples(lengths, plain.config.vocab_size)
    plan = worker.plan(samples, MICRO_BATCH * 512)

    def here() -> float:
        return worker.forward_backward(samples, plan, NegativeLogLikelihood())["sft/loss"].result()

    def there() -> float:
        return plain_loss(plain, samples)

    assert abs(here() - there()) < (1e-4 if plain.dtype == torch.float32 else 2e-2)
    rate = gemm_rate(plain.dtype)
    turns = [(timed(here), timed(there)) for _ in range(repeats)]
    rate = (rate + gemm_rate(plain.dtype)) / 2
    mine, other = (Timing(*map(statistics.median, zip(*side))) for side in zip(*turns))
    tokens, work = sum(lengths), flops(plain.config, worker.num_parameters, lengths)
    return (
        f"fill {tokens / (len(lengths) * max(lengths)):4.0%}  here {tokens / mine.wall:7.0f} tok/s  "
        f"plain {tokens / other.wall:7.0f} tok/s  ratio {other.wall / mine.wall:5.2f} "
        f"(CPU {other.cpu / mine.cpu:5.2f})  MFU {work / (mine.cpu * rate):4.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    for size in options.size:
        for dtype in options.dtype:
            compare(size, dtype, options.repeats)


if __name__ == "__main__":
    main()
