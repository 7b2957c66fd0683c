"""What the scripts `tools/bench_*.py` have in common: options, the table as it grows, the file of rows."""

import argparse
import datetime
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rl.bench.measuring import this_machine
from megatron_rl.bench.rows import Report, Row, write_report
from megatron_rl.bench.table import heading, lines

REPEATS, FEWEST = 5, 3


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"medians are over so many ({REPEATS})")
    parser.add_argument("--quick", action="store_true", help="small shapes, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows are written to")
    return parser


def main(
    bench: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Iterable[Row]],
    *,
    quick: Mapping[str, Any],
    arguments: Sequence[str] | None = None,
) -> None:
    """Measures and prints row by row; `quick` are the defaults of small shapes, for which nothing is wanted."""
    early, _ = parser.parse_known_args(arguments)
    if early.quick:
        parser.set_defaults(**quick)
    options = parser.parse_args(arguments)
    if options.repeats < FEWEST:
        parser.error(f"--repeats={options.repeats}: at least {FEWEST}, or nothing is known of the spread")
    if torch.cuda.is_available():
        sys.exit("this measures CPUs, and torch sees a GPU: set CUDA_VISIBLE_DEVICES= in front of the command")
    torch.set_num_threads(1)
    print(heading(bench), flush=True)
    rows = []
    for row in measure(options):
        assert row.bench == bench, (row.bench, bench)
        if options.quick:
            row = replace(row, wanted={})
        print(lines(row), flush=True)
        rows.append(row)
    if options.json is not None:
        write_report(Report(this_machine(), f"{datetime.date.today()}", rows), options.json)
