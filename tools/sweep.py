"""Run the cases of a sweep, one after the other, and keep their learning curves.

    python tools/sweep.py tools/sweeps/layouts.yaml

A sweep names a config, or several by case, `a.b=c` overrides for all cases and for each, and seeds. Every run that ends
appends its steps to `curves.csv` in the sweep's folder of results; a run that is there already is not run again, so
that an interrupted sweep goes on where it stopped. `summary.md` and `curves.png` beside it are made anew each time.
`figures` names more columns, each with the logged figure that it holds; they get a panel and a final value each.
In an override `{seed}` is the run's seed, so that a case can start from what an earlier one has left in `runs`.
"""

import argparse
import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.report.comparison import FIELDS, plot_comparison, summary
from megatron_rl.report.curves import ACCURACY, REWARD


def finished(table: Path) -> set[tuple[str, int]]:
    """The (case, seed) pairs that the table holds."""
    if not table.exists():
        return set()
    with table.open(newline="") as lines:
        return {(row["case"], int(row["seed"])) for row in csv.DictReader(lines)}


def run(config: Path, overrides: list[str], run_dir: Path) -> list[dict[str, Any]]:
    """Trains as anybody would; the steps that were logged."""
    command = [sys.executable, "-m", "megatron_rl", "train", str(config), *overrides, f"run.dir={run_dir}"]
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def append(table: Path, case: str, seed: int, rows: list[dict[str, Any]], more: dict[str, str]) -> None:
    """One line per step, blank where a figure was not measured. All lines of a run are written at once."""
    new = not table.exists()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    with table.open("a", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        if new:
            writer.writerow([*FIELDS, *more])
        for row in rows:
            main, others = (
                [f"{row[key]:.4f}" if row.get(key) is not None else "" for key in keys]
                for keys in ((REWARD, ACCURACY), more.values())
            )
            seconds = f"{row['time'] - rows[0]['time']:.1f}"
            writer.writerow([case, seed, row["step"], *main, seconds, date, *others])


def run_directory(sweep: dict[str, Any], case: str, seed: int) -> Path:
    """Where a case and seed of a sweep is trained."""
    return Path(sweep["runs"]) / f"{case.replace(' ', '_')}_{seed}"


def config_of(sweep: dict[str, Any], case: str) -> Path:
    """`config` is one file, or a table of them by case."""
    config = sweep["config"]
    return Path(config[case] if isinstance(config, dict) else config)


def run_sweep(path: Path) -> None:
    """Runs what the table of results lacks, and draws it."""
    sweep = yaml.safe_load(path.read_text())
    results = Path(sweep["results"])
    results.mkdir(parents=True, exist_ok=True)
    table, more = results / "curves.csv", sweep.get("figures", {})
    done = finished(table)
    for seed in sweep["seeds"]:
        for case, overrides in sweep["cases"].items():
            if (case, seed) in done:
                continue
            print(f"\n== {path.stem}: {case}, seed {seed}", flush=True)
            options = [text.replace("{seed}", str(seed)) for text in [*sweep.get("options", []), *overrides]]
            options += [f"train.seed={seed}"]
            append(table, case, seed, run(config_of(sweep, case), options, run_directory(sweep, case, seed)), more)
    (results / "summary.md").write_text(summary(table, more=tuple(more)))
    plot_comparison(table, results / "curves.png", title=sweep["title"], more=tuple(more))
    print(f"\n{table}\n{results / 'curves.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    run_sweep(parser.parse_args().sweep)


if __name__ == "__main__":
    main()
