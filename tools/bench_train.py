"""The update's forward and backward pass, beside a plain Hugging Face loop in the same process: CPU seconds.

    python tools/bench_train.py [--size 1m 8m 50m] [--dtype float32 bfloat16]

Both sides compute the gradient of the same loss (mean negative log-likelihood of every next token) of the same weights
on the same sequences: here packed, through megatron-core; there padded, through transformers with SDPA. `equal` are
eight sequences of 512 tokens, `ragged` sixteen of 40 to 512 (46% of the padded rectangle). The sides take turns, on one
thread, and only real tokens count. In bfloat16 on a CPU without instructions for it the plain loop takes minutes a
step: `--shorten 8` measures an eighth of the tokens.

MFU = model FLOPs / (CPU seconds x the GEMM rate per core that is measured in this process, in the same dtype), with
FLOPs = 6 x (parameters without the input embedding) x tokens + 6 x layers x hidden x sum of squared lengths.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_rl.bench.measuring import gemm_rate, take_turns
from megatron_rl.bench.models import SIZES, dense_parameters, make_llama
from megatron_rl.bench.rows import Row
from megatron_rl.bench.script import main, parser_of
from megatron_rl.config.schema import DType, ModelConfig, OptimConfig
from megatron_rl.data.samples import Sample, from_example, weighed
from megatron_rl.parallel.mesh import create_mesh, destroy_mesh
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.objective import NegativeLogLikelihood

LENGTHS = {
    "equal": [512] * 8,
    "ragged": [40, 512, 96, 300, 150, 420, 60, 210, 130, 380, 75, 260, 180, 445, 110, 400],
}
MICRO_BATCH = 8  # sequences in one padded batch of the plain loop


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


def flops(model: Any, lengths: Sequence[int]) -> float:
    config = model.config
    attention = 6 * config.num_hidden_layers * config.hidden_size * sum(length**2 for length in lengths)
    return 6.0 * dense_parameters(model) * sum(lengths) + attention


def compare(worker: ModelWorker, plain: Any, case: str, lengths: Sequence[int], repeats: int) -> Row:
    samples = make_samples(lengths, plain.config.vocab_size)
    plan = worker.plan(samples, MICRO_BATCH * 512)

    def here() -> float:
        return worker.forward_backward(samples, plan, NegativeLogLikelihood())["sft/loss"].result()

    def there() -> float:
        return plain_loss(plain, samples)

    assert abs(here() - there()) < (1e-4 if plain.dtype == torch.float32 else 2e-2)
    rate = gemm_rate(plain.dtype)
    turns = take_turns({"here": here, "plain": there}, repeats)
    rate = (rate + gemm_rate(plain.dtype)) / 2
    tokens = sum(lengths)
    return Row(
        bench="train",
        case=case,
        times=turns.seconds["here"],
        baseline="padded Hugging Face loop",
        ratio=turns.ratio("here", "plain"),
        limit="GEMM peak (MFU)",
        share=flops(plain, lengths) / (turns.median("here") * rate),
        figures={
            "times as fast": 1 / turns.ratio("here", "plain"),
            "tokens/s": tokens / turns.median("here"),
            "plain tokens/s": tokens / turns.median("plain"),
            "fill": tokens / (len(lengths) * max(lengths)),
        },
    )


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for size in options.size:
        for dtype in options.dtype:
            with tempfile.TemporaryDirectory() as folder:
                plain = make_llama(Path(folder), size, getattr(torch, dtype))
                model = ModelConfig(path=folder, dtype=DType(dtype))
                worker = ModelWorker(model, OptimConfig(), create_mesh(), total_steps=1)
            for name in options.lengths:
                lengths = [length // options.shorten for length in LENGTHS[name]]
                case = f"{size} {dtype} {name}{f' / {options.shorten}' if options.shorten > 1 else ''}"
                yield compare(worker, plain, case, lengths, options.repeats)
            destroy_mesh()


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["1m", "8m", "50m"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--shorten", type=int, default=1, metavar="N", help="divide all lengths by N, at most 20")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    main("train", parser, measure, quick={"size": ["1m"], "dtype": ["float32"], "repeats": 3})
