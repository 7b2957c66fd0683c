"""The scan along packed sequences, and means over them, beside loops: CPU seconds, and the error against float64.

    python tools/bench_scan.py [--beta 0.1 0.9] [--rows 1 8] [--length 32768]

`rows` sequences of `length` tokens each. The baseline is the recurrence as one would write it in torch, one step for
all rows at a time. `floats` takes one token after the other as a Python number: fast for one row, but with no gradient,
and not where the tensor is. The limit is a copy of the bytes of input and output.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_rl.bench.measuring import take_turns
from megatron_rl.bench.rows import Row
from megatron_rl.bench.script import main, parser_of
from megatron_rl.ops.scan import exponential_average
from megatron_rl.ops.segments import segment_mean

CALLS = 10  # of what takes a millisecond, in a turn
SEGMENT = 512


def loop(weights: Tensor, beta: float) -> Tensor:
    """[rows, length], by its definition with w'_0 = 1."""
    averages = []
    average = torch.ones_like(weights[:, 0])
    for weight in weights.unbind(1):
        average = beta * weight + (1 - beta) * average
        averages.append(average)
    return torch.stack(averages, 1)


def floats(weights: Tensor, beta: float) -> Tensor:
    rows = []
    for row in weights.tolist():
        average, averages = 1.0, []
        for weight in row:
            average = beta * weight + (1 - beta) * average
            averages.append(average)
        rows.append(averages)
    return torch.tensor(rows)


def scan(rows: int, length: int, beta: float, repeats: int) -> Row:
    weights = (0.3 * torch.randn(rows, length, generator=torch.Generator().manual_seed(0))).exp()
    flat, ids = weights.reshape(-1), torch.arange(rows).repeat_interleave(length)
    leaf, target = flat.clone().requires_grad_(), torch.empty_like(flat)
    exact = loop(weights.double(), beta).reshape(-1)
    error = ((exponential_average(flat, ids, beta=beta).double() - exact) / exact).abs().max().item()
    assert error < 1e-4, error
    sides = {
        "scan": lambda: exponential_average(flat, ids, beta=beta),
        "both ways": lambda: exponential_average(leaf, ids, beta=beta).sum().backward(),
        "loop": lambda: loop(weights, beta),
        "floats": lambda: floats(weights, beta),
        "copy": lambda: target.copy_(flat),
    }
    turns = take_turns(sides, repeats, calls=dict.fromkeys(("scan", "both ways", "copy"), CALLS))
    return Row(
        bench="scan",
        case=f"scan [{rows}, {length}] beta {beta:g}",
        times=turns.seconds["scan"],
        baseline="loop over tokens",
        ratio=turns.ratio("scan", "loop"),
        limit="copy of the bytes",
        share=turns.ratio("copy", "scan"),
        figures={
            "times as fast": 1 / turns.ratio("scan", "loop"),
            "times as fast as floats": 1 / turns.ratio("scan", "floats"),
            "ms with backward": 1e3 * turns.median("both ways"),
            "relative error": error,
        },
        wanted={"ratio": 1 / 50},
    )


def mean(rows: int, length: int, repeats: int) -> Row:
    """Of `rows` x `length` tokens in segments, three quarters of which count."""
    values = torch.randn(rows * length, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(len(values)) % 4 > 0
    bounds = torch.arange(0, len(values) + 1, SEGMENT)
    pieces = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    target = torch.empty_like(values)

    def one_by_one() -> Tensor:
        return torch.stack([values[a:b][mask[a:b]].mean() for a, b in pieces])

    torch.testing.assert_close(segment_mean(values, mask, bounds), one_by_one())
    sides = {
        "mean": lambda: segment_mean(values, mask, bounds),
        "loop": one_by_one,
        "copy": lambda: target.copy_(values),
    }
    turns = take_turns(sides, repeats, calls={"mean": CALLS, "copy": CALLS})
    return Row(
        bench="scan",
        case=f"segment mean, {len(pieces)} of {SEGMENT}",
        times=turns.seconds["mean"],
        baseline="loop over segments",
        ratio=turns.ratio("mean", "loop"),
        limit="copy of the values",
        share=turns.ratio("copy", "mean"),
    )


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for rows in options.rows:
        for beta in options.beta:
            yield scan(rows, options.length, beta, options.repeats)
    yield mean(max(options.rows), options.length, options.repeats)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--beta", type=float, nargs="+", default=[0.01, 0.1, 0.5, 0.9, 0.99])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=32768)
    main("scan", parser, measure, quick={"beta": [0.1], "rows": [8], "repeats": 3})
