"""The scan along packed sequences beside loops over the tokens: CPU time, and error against a loop in float64.

    OMP_NUM_THREADS=1 python tools/bench_scan.py [--beta 0.1 0.9] [--rows 1 8] [--length 32768] [--repeats 5]

`rows` sequences of `length` tokens each. `loop` is the recurrence as one would write it in torch, one step for all rows
at a time. `floats` takes one token after the other as a Python number: fast for one row, but with no gradient, and not
where the tensor is. The least of the repeats is quoted, of the scan with its backward pass too.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_rl.ops.scan import exponential_average


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


def seconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def measure(rows: int, length: int, beta: float, repeats: int) -> str:
    weights = (0.3 * torch.randn(rows, length, generator=torch.Generator().manual_seed(0))).exp()
    flat, ids = weights.reshape(-1), torch.arange(rows).repeat_interleave(length)
    leaf = flat.clone().requires_grad_()

    def both_ways() -> None:
        exponential_average(leaf, ids, beta=beta).sum().backward()

    exact = loop(weights.double(), beta).reshape(-1)
    error = ((exponential_average(flat, ids, beta=beta).double() - exact) / exact).abs().max().item()
    scan = seconds(lambda: exponential_average(flat, ids, beta=beta), 10 * repeats)
    slow = [seconds(partial(function, weights, beta), repeats) for function in (loop, floats)]
    columns = [f"{1e3 * value:9.2f}" for value in (scan, seconds(both_ways, 10 * repeats), *slow)]
    return " ".join([f"{rows:4d} {beta:5.2f} {error:9.1e}", *columns, *(f"{value / scan:8.0f}" for value in slow)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta", type=float, nargs="+", default=[0.01, 0.1, 0.5, 0.9, 0.99])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("rows  beta     error   scan ms   both ms   loop ms floats ms  x loop x floats")
    for rows in options.rows:
        for beta in options.beta:
            print(measure(rows, options.length, beta, options.repeats), flush=True)


if __name__ == "__main__":
    main()
