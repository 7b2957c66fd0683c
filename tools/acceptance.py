"""Acceptance on a real model: 20 steps of GRPO raise the mean reward of SmolLM2 on one-digit sums, at two dtypes.

    python tools/smollm2.py runs/smollm2/hf
    python tools/acceptance.py runs/smollm2/hf

Both cases train `examples/smollm2/grpo_chain_sum.yaml` on two ranks in a pipeline. Interrupted, the same command goes
on: a run from its last checkpoint, and one whose steps are in `steps.csv` not at all. `summary.md` beside it, with the
first steps held against the last, is made anew each time.
"""

import argparse
import csv
import datetime
import json
import subprocess
import sys
from collections import defaultdict
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import GrpoConfig

CONFIG = Path("examples/smollm2/grpo_chain_sum.yaml")
# Half a unit in the last place of a bfloat16 weight is 2e-4 and more for most of this model's, so that few move within
# 20 steps of 1e-5. The engine's log-probabilities are off by up to 0.3, logits of 20 being a multiple of 1/8.
CASES = {
    "float32": [],
    "bfloat16": [
        "model.dtype=bfloat16",
        "optim.lr=2e-5",
        "rollout.parity_tolerance=1.0",
    ],
}
FIELDS = ("case", "step", "answers", "reward", "accuracy", "problems", "length", "seconds", "tokens_per_s", "date")
GROUP = 8  # answers to a problem
WINDOW = 3  # steps at either end that are compared
NORMAL = 1.960  # the 97.5% point


def train(case: str, options: list[str], run_dir: Path) -> list[dict[str, Any]]:
    """Trains or goes on; the rows of the table."""
    config = load_config(CONFIG, [*options, f"run.dir={run_dir}"])
    assert isinstance(config, GrpoConfig)
    command = [sys.executable, "-m", "megatron_rl", "train", str(CONFIG), *options, f"run.dir={run_dir}"]
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code)
    return [row(case, config, json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def row(case: str, config: GrpoConfig, logged: dict[str, Any]) -> dict[str, Any]:
    """What the table keeps of a step; step 0 is the evaluation before training."""
    figures = {
        "reward": "critic/score/mean",
        "accuracy": "val/accuracy",
        "length": "response_length/mean",
        "seconds": "perf/time_per_step",
        "tokens_per_s": "perf/tokens_per_second",
    }
    return {
        "case": case,
        "step": logged["step"],
        "answers": config.train.batch_size * config.rollout.group_size if logged["step"] else "",
        "problems": config.data.val_task["size"] if "val/accuracy" in logged else "",
        "date": datetime.datetime.fromtimestamp(logged["time"], datetime.UTC).date().isoformat(),
        **{field: f"{logged[key]:.4f}" if key in logged else "" for field, key in figures.items()},
    }


def append(table: Path, rows: list[dict[str, Any]]) -> None:
    """All lines of a run at once."""
    new = not table.exists()
    with table.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(table: Path) -> dict[str, list[dict[str, str]]]:
    """The table's rows by case."""
    cases: dict[str, list[dict[str, str]]] = defaultdict(list)
    if table.exists():
        with table.open(newline="") as lines:
            for line in csv.DictReader(lines):
                cases[line["case"]].append(line)
    return cases


def wilson(share: float, n: int) -> tuple[float, float]:
    """95% interval of a share of n (Wilson, 1927)."""
    z = NORMAL**2 / n
    middle, half = (share + z / 2) / (1 + z), NORMAL / (1 + z) * sqrt(share * (1 - share) / n + z / (4 * n))
    return middle - half, middle + half


def comparison(rows: list[dict[str, str]]) -> list[str]:
    """First and last steps, their difference, and the greedy answers: cells of a Markdown table.

    Answers to one problem are alike, so the interval has two bounds: that of independent answers, and the one of
    answers that are the same for each problem, as many observations as there were problems.
    """
    steps = [row for row in rows if row["answers"]]
    shares = [fmean(float(row["reward"]) for row in part) for part in (steps[:WINDOW], steps[-WINDOW:])]
    answers = WINDOW * int(steps[0]["answers"])
    cells = [f"{share:.3f} {_half_widths([share], answers)}" for share in shares]
    cells.append(f"{shares[1] - shares[0]:+.3f} {_half_widths(shares, answers)}")
    for row in (rows[0], rows[-1]):
        low, high = wilson(float(row["accuracy"]), int(row["problems"]))
        cells.append(f"{float(row['accuracy']):.3f} ({low:.3f} to {high:.3f})")
    return cells


def _half_widths(shares: list[float], answers: int) -> str:
    """Of the 95% interval of a share, or of the difference of two: least and most."""
    least = NORMAL * sqrt(sum(share * (1 - share) for share in shares) / answers)
    return f"± {least:.3f} to {least * sqrt(GROUP):.3f}"


def summary(cases: dict[str, list[dict[str, str]]]) -> str:
    """Rewards and speed as Markdown tables."""
    window = f"mean reward, steps 1 to {WINDOW}", f"last {WINDOW} steps"
    head = ("case", "steps", "answers per step", *window, "difference", "64 problems greedily, before", "after")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case, rows in cases.items():
        lines.append("| " + " | ".join([case, rows[-1]["step"], rows[-1]["answers"], *comparison(rows)]) + " |")
    lines += [
        "",
        "± is half a 95% interval: if answers to one problem were independent, to if they were all the same.",
        "The intervals of the greedy answers are those of Wilson, 95%.",
        "",
        "| case | seconds per step, median | tokens per second, median | date |",
        "|---|---|---|---|",
    ]
    for case, rows in cases.items():
        middle = [sorted(float(row[key]) for row in rows if row[key]) for key in ("seconds", "tokens_per_s")]
        lines.append(f"| {case} | " + " | ".join(f"{v[len(v) // 2]:.1f}" for v in middle) + f" | {rows[-1]['date']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what tools/smollm2.py made")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one")
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/smollm2"))
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    table = arguments.results / "steps.csv"
    for case in arguments.case or CASES:
        if case not in read(table):
            print(f"\n== {case}", flush=True)
            options = [f"model.path={arguments.model}", *CASES[case]]
            append(table, train(case, options, arguments.runs / f"grpo_chain_sum_{case}"))
    (arguments.results / "summary.md").write_text(summary(read(table)))
    print(f"\n{table}\n{arguments.results / 'summary.md'}")


if __name__ == "__main__":
    main()
