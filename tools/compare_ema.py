"""The comparison of smoothed importance weights: runs what is missing, then writes the table and the pictures.

python tools/compare_ema.py [tools/sweeps/ema.yaml]
"""

import argparse
from pathlib import Path

import sweep as sweeps
import yaml

from megatron_rl.report.smoothing import plot_smoothing, read_case, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, nargs="?", default=Path("tools/sweeps/ema.yaml"))
    path = parser.parse_args().sweep
    sweeps.run_sweep(path)
    sweep = yaml.safe_load(path.read_text())
    results = Path(sweep["results"])
    cases = [
        read_case(case, [sweeps.run_directory(sweep, case, seed) / "metrics.jsonl" for seed in sweep["seeds"]])
        for case in sweep["cases"]
    ]
    (results / "table.md").write_text(table(cases))
    plot_smoothing(cases, results / "smoothing.png", title=sweep["title"])
    print(f"{results / 'table.md'}\n{results / 'smoothing.png'}")


if __name__ == "__main__":
    main()
