"""The vocabulary operators beside plain torch and beside their own matrix products: CPU seconds and peak memory.

    python tools/bench_ops.py [--op sdpo logp] [--dtype bfloat16 float32] [--k 20 100] [--tokens 2048]

`sdpo` is the loss of SDPO through two lm-heads (the student's k most likely ids, ties to the smaller id, the exact
tail, alpha 0.5), `logp` log-probability and entropy through one; forward and backward, to hidden states and lm-head.

The baseline is what one would write in torch: float32 logits, log_softmax, topk and gather, or the entropy; autograd.
The limit are the matrix products that the operator executed, noted while it ran and executed again by themselves;
`products` says how many of the head's size they are, and `GEMM peak` what share of the rate of a 1024^3 product the
operator reaches with them.

Operator, products and baseline take turns, but with `--plain-once` for the baseline, of which the first call is timed
then, which flatters the ratio, for later calls find their memory made: in bfloat16 it takes minutes on a CPU without
instructions for it. Peaks are of the first call of each at this size: the most that was resident at once, less what was
with the inputs made. They hold the weight's gradient, which every variant needs. The plain case takes some 6 GiB.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.algorithms.distill import buckets, divergence
from megatron_rl.bench.measuring import Turns, Work, gemm_rate, peak_of, resident, take_turns
from megatron_rl.bench.products import Products
from megatron_rl.bench.rows import Row
from megatron_rl.bench.script import main, parser_of
from megatron_rl.ops.divergence import Head, paired_stats
from megatron_rl.ops.linear_stats import linear_stats
from megatron_rl.ops.vocab_shard import VocabShard

ALPHA, ENTROPY_BONUS = 0.5, 0.01
# Upper bounds: of the time over that of the products, and of the peak over plain torch's.
WANTED = {
    ("sdpo", "bfloat16"): {"x products": 1.8, "x plain peak": 1 / 20},
    ("sdpo", "float32"): {"x products": 1.3},
    ("logp", "bfloat16"): {"x products": 2.0, "x plain peak": 1 / 20},
}


class Inputs(NamedTuple):
    student: Head
    teacher: Head
    labels: Tensor


def make_inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, std: float) -> Tensor:
        return torch.empty(*shape, dtype=dtype).normal_(std=std, generator=generator)

    student = Head(draw(tokens, hidden, std=1).requires_grad_(), draw(vocab, hidden, std=2 / hidden**0.5))
    teacher = Head(draw(tokens, hidden, std=0.3).add_(student.hidden.detach()), student.weight.clone())
    student.weight.requires_grad_()
    return Inputs(student, teacher, torch.randint(vocab, (tokens,), generator=generator))


def sdpo(inputs: Inputs, k: int) -> Tensor:
    shard = VocabShard(0, len(inputs.student.weight))
    pair = paired_stats(
        inputs.student, inputs.teacher, inputs.labels, support="student", k=k, shard=shard, figures=False
    )
    s, t = (buckets(x.topk_logp, x.tail_logp, "exact") for x in pair)  # type: ignore[arg-type]
    return divergence(s, t, ALPHA).mean()


def plain_sdpo(inputs: Inputs, k: int) -> Tensor:
    student, teacher, _ = inputs
    s, ids = (student.hidden @ student.weight.t()).float().log_softmax(-1).topk(k, -1)
    with torch.no_grad():
        t = (teacher.hidden @ teacher.weight.t()).float().log_softmax(-1).gather(1, ids)
    return divergence(*(buckets(x, x[:, 0], "clamped") for x in (s, t)), ALPHA).mean()


def logp(inputs: Inputs, k: int) -> Tensor:
    student, _, labels = inputs
    stats = linear_stats(student.hidden, student.weight, labels, shard=VocabShard(0, len(student.weight)))
    assert stats.entropy is not None
    return (-stats.logp - ENTROPY_BONUS * stats.entropy).mean()


def plain_logp(inputs: Inputs, k: int) -> Tensor:
    student, _, labels = inputs
    logp = (student.hidden @ student.weight.t()).float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return (-logp.gather(1, labels[:, None])[:, 0] - ENTROPY_BONUS * entropy).mean()


OPS = {"sdpo": (sdpo, plain_sdpo), "logp": (logp, plain_logp)}


def both_ways(loss: Callable[[Inputs, int], Tensor], inputs: Inputs, k: int) -> float:
    """The loss; its gradients take the place of earlier ones."""
    inputs.student.hidden.grad = inputs.student.weight.grad = None
    value = loss(inputs, k)
    value.backward()
    return value.item()


def compare(op: str, dtype: str, k: int, options: argparse.Namespace) -> Row:
    tokens, hidden, vocab = options.tokens, options.hidden, options.vocab
    small = make_inputs(64, hidden, 2048, getattr(torch, dtype))
    for loss in OPS[op]:  # what the libraries load and compile at their first call
        both_ways(loss, small, k)
    inputs = make_inputs(tokens, hidden, vocab, getattr(torch, dtype))
    start, losses, peaks = resident(), [], []
    here, plain = (partial(both_ways, loss, inputs, k) for loss in OPS[op])
    first = {}
    for name, side in (("here", here), ("plain", plain)):
        begin = time.process_time()
        peaks.append(peak_of(lambda side=side: losses.append(side())) - start)  # type: ignore[misc]
        first[name] = time.process_time() - begin
    assert abs(losses[0] / losses[1] - 1) < 0.02, losses
    products = Products()
    with products:
        here()
    products()
    rate = gemm_rate(getattr(torch, dtype))
    sides: dict[str, Work] = {"here": here, "products": products}
    turns = take_turns(sides if options.plain_once else sides | {"plain": plain}, options.repeats)
    if options.plain_once:
        turns = Turns({**turns.seconds, "plain": (first["plain"],) * options.repeats})
    whole = products.flops / (2 * tokens * hidden * vocab)
    return Row(
        bench="ops",
        case=f"{op} {dtype} {tokens}x{hidden}x{vocab}{f' k{k}' if op == 'sdpo' else ''}",
        times=turns.seconds["here"],
        baseline="plain torch",
        ratio=turns.ratio("here", "plain"),
        limit=f"its {whole:.2g} products",
        share=turns.ratio("products", "here"),
        figures={
            "x products": turns.ratio("here", "products"),
            "products": whole,
            "calls of them": len(products),
            "GEMM peak": products.flops / (turns.median("here") * rate),
            "plain s": turns.median("plain"),
            "peak MiB": peaks[0] / 2**20,
            "plain peak MiB": peaks[1] / 2**20,
            "x plain peak": peaks[0] / peaks[1],
        },
        wanted=WANTED.get((op, dtype), {}),
    )


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for op in options.op:
        for dtype in options.dtype:
            for k in options.k if op == "sdpo" else [0]:
                yield compare(op, dtype, k, options)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--k", type=int, nargs="+", default=[20])
    parser.add_argument("--plain-once", action="store_true", help="time the baseline once")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    main("ops", parser, measure, quick={"tokens": 256, "hidden": 64, "vocab": 16384, "repeats": 3})
