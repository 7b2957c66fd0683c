"""`megatron-rl bench [NAME ...]`: runs the scripts `tools/bench_*.py`, each in a process of its own."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from megatron_rl.bench.comparison import compared
from megatron_rl.bench.rows import Report, read_report, write_report

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
SCRIPTS = {
    "ops": "bench_ops.py",
    "scan": "bench_scan.py",
    "ema": "bench_ema.py",
    "train": "bench_train.py",
    "rollout": "bench_rollouts.py",
    "sync": "bench_sync.py",
    "checkpoint": "bench_checkpoint.py",
    "convert": "bench_convert.py",
    "rl-step": "bench_step.py",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="megatron-rl bench",
        description="Measures this machine's CPU: every case beside a baseline and a limit. docs/performance.md says "
        "how to read it. Exits with 1 where a bench failed.",
    )
    made.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SCRIPTS)} (default: all)")
    made.add_argument("--repeats", type=int, metavar="N", help="medians are over so many (default: 5, quick 3)")
    made.add_argument("--quick", action="store_true", help="small shapes, for a look")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    made.add_argument("--compare", type=Path, metavar="OLD.json", help="hold the rows against those of another time")
    return made


def bench(options: argparse.Namespace) -> int:
    """The exit code: 1 where a bench failed, otherwise 0. ValueError where the options ask for what is not there."""
    names = check_names(options.names)
    if not TOOLS.is_dir():
        raise ValueError(
            f"the benches are scripts in tools/ of a checkout, and {ROOT} has none: clone the repository and install "
            "it with `pip install --editable .`"
        )
    old = None if options.compare is None else read_report(options.compare)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json={options.json}: there is no directory {options.json.absolute().parent}")
    flags = [*(["--quick"] if options.quick else []), *([f"--repeats={options.repeats}"] if options.repeats else [])]
    reports, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            file = Path(folder, f"{name}.json")
            code = run(name, [*flags, f"--json={file}"])
            print(flush=True)
            if code:
                failed.append(f"{name} (exit code {code})")
            else:
                reports.append(read_report(file))
    if reports:
        report = Report(reports[0].machine, reports[0].date, [row for each in reports for row in each.rows])
        if options.json is not None:
            write_report(report, options.json)
        if old is not None:
            print("\n".join(compared(old, report)))
    if failed:
        print(f"megatron-rl: failed: {', '.join(failed)}; the reasons are above", file=sys.stderr)
    return int(bool(failed))


def check_names(names: Sequence[str]) -> list[str]:
    """In the order of the table, each once; all where none is named."""
    for name in names:
        if name not in SCRIPTS:
            near = get_close_matches(name, SCRIPTS, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no bench {name!r}: there are {', '.join(SCRIPTS)}{meant}")
    return [name for name in SCRIPTS if name in names or not names]


def run(name: str, flags: Sequence[str]) -> int:
    """One script, with this package; its exit code."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(TOOLS / SCRIPTS[name]), *flags]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode
