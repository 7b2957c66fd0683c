"""Distillation through two streamed lm-heads beside the same loss from whole logits: CPU time and peak memory.

    OMP_NUM_THREADS=1 python tools/bench_ops.py [--dtype bf16 fp32] [--k 20 100] [--repeats 2]

`plain` is what one would write in torch: float32 logits of student and teacher, log_softmax, topk, gather. Both are
forward and backward, to the student's hidden states and lm-head, of SDPO's loss (alpha 0.5, k ids and the tail). Each
case has a process of its own; its peak is the largest resident size less that with the inputs made, and holds the
weight's gradient, which every variant needs. The least time of the repeats is quoted. `products` are the five matrix
products that the streamed case cannot do without. The plain case takes some 6 GiB.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor

from megatron_rl.algorithms.distill import buckets, divergence
from megatron_rl.ops.divergence import Head, paired_stats
from megatron_rl.ops.vocab_shard import VocabShard

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALPHA = 0.5


def heads(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> tuple[Head, Head]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, std: float) -> Tensor:
        return torch.empty(*shape, dtype=dtype).normal_(std=std, generator=generator)

    student = Head(draw(tokens, hidden, std=1).requires_grad_(), draw(vocab, hidden, std=2 / hidden**0.5))
    teacher = Head(draw(tokens, hidden, std=0.3).add_(student.hidden.detach()), student.weight.clone())
    student.weight.requires_grad_()
    return student, teacher


def plain(student: Head, teacher: Head, k: int) -> Tensor:
    student_logits = (student.hidden @ student.weight.t()).float()
    student_logp = student_logits.log_softmax(-1)
    s, ids = student_logp.topk(k, -1)
    with torch.no_grad():
        teacher_logits = (teacher.hidden @ teacher.weight.t()).float()
        teacher_logp = teacher_logits.log_softmax(-1)
        t = teacher_logp.gather(1, ids)
    return divergence(*(buckets(x, x[:, 0], "clamped") for x in (s, t)), ALPHA)


def streamed(student: Head, teacher: Head, k: int) -> Tensor:
    labels = torch.zeros(len(student.hidden), dtype=torch.int64)
    shard = VocabShard(0, len(student.weight))
    pair = paired_stats(student, teacher, labels, support="student", k=k, shard=shard, figures=False)
    s, t = (buckets(x.topk_logp, x.tail_logp, "exact") for x in pair)  # type: ignore[arg-type]
    return divergence(s, t, ALPHA)


def products(student: Head, teacher: Head, k: int) -> Tensor:
    """The matrix products of `streamed` and nothing else: two forward, one again, two backward."""
    hidden, weight = student.hidden.detach(), student.weight.detach()
    grad_weight = torch.empty_like(weight)
    for start in range(0, len(weight), 1024):
        rows = slice(start, start + 1024)
        logits = hidden @ weight[rows].t()
        torch.mm(teacher.hidden, teacher.weight[rows].t(), out=logits)
        torch.mm(hidden, weight[rows].t(), out=logits)
        torch.mm(logits.t(), hidden, out=grad_weight[rows])
        logits @ weight[rows]
    return torch.zeros(1, requires_grad=True)


CASES = {"plain": plain, "streamed": streamed, "products": products}


def measure(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    student, teacher = heads(options.tokens, options.hidden, options.vocab, DTYPES[options.dtype[0]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(options.repeats):
        student.hidden.grad = student.weight.grad = None
        start = time.process_time()
        loss = CASES[options.case](student, teacher, options.k[0])
        loss.mean().backward()
        times.append(time.process_time() - start)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": min(times), "mib": peak, "loss": loss.mean().item()}


def child(case: str, dtype: str, k: int, options: argparse.Namespace) -> dict[str, float]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("tokens", "hidden", "vocab", "repeats")]
    command = [sys.executable, __file__, f"--case={case}", f"--dtype={dtype}", f"--k={k}", *sizes]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--k", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--case", choices=CASES, help="one case only, in this process")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options)))
        return
    columns = ("plain s", "streamed s", "ratio", "products s", "plain MiB", "streamed MiB", "ratio", "losses")
    print("dtype   k " + " ".join(f"{column:>12}" for column in columns))
    for dtype in options.dtype:
        for k in options.k:
            slow, fast, floor = (child(case, dtype, k, options) for case in CASES)
            numbers = [
                f"{slow['seconds']:.2f}",
                f"{fast['seconds']:.2f}",
                f"{fast['seconds'] / slow['seconds']:.2f}",
                f"{floor['seconds']:.2f}",
                f"{slow['mib']:.0f}",
                f"{fast['mib']:.0f}",
                f"1/{slow['mib'] / fast['mib']:.1f}",
                f"{slow['loss']:.6f}",
                f"{fast['loss']:.6f}",
            ]
            print(f"{dtype:5} {k:3d} " + " ".join(f"{number:>12}" for number in numbers), flush=True)


if __name__ == "__main__":
    main()
