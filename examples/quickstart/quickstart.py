"""Make a tiny model, fine-tune it, train it by reinforcement learning, and say what came of it.

    python examples/quickstart/quickstart.py [--seed 1] [--layout tp2] [--engine hf]

Everything lands in runs/quickstart. `--layout` names ranks per axis: tp2, pp2, dp2, tp2pp2, ...; `--engine` is hf or,
where it is installed, vllm.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import task

from megatron_rl.report.curves import plot_learning_curve

HERE = Path(__file__).parent
OUT = Path("runs/quickstart")


def parallel_overrides(layout: str) -> list[str]:
    """From tp2pp2 to parallel.tp=2 parallel.pp=2."""
    if not re.fullmatch(r"((tp|pp|dp)[1-9]\d*)+", layout):
        raise SystemExit(f"LAYOUT={layout!r} is not a layout: write tp2, pp2, dp2 or a combination such as tp2pp2")
    return [f"parallel.{axis}={size}" for axis, size in re.findall(r"(tp|pp|dp)(\d+)", layout)]


def train(stage: str, overrides: list[str]) -> list[dict[str, float]]:
    """Runs one stage as anybody would, and returns its logged steps."""
    print(f"\n== {stage}: megatron-rl train {HERE.name}/{stage}.yaml {' '.join(overrides)}", flush=True)
    command = [sys.executable, "-m", "megatron_rl", "train", str(HERE / f"{stage}.yaml"), *overrides]
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code)
    return [json.loads(line) for line in (OUT / stage / "metrics.jsonl").read_text().splitlines()]


def accuracies(steps: list[dict[str, float]]) -> list[float]:
    return [step["val/accuracy"] for step in steps if "val/accuracy" in step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layout", default="tp2")
    parser.add_argument("--engine", default="hf", choices=("hf", "vllm"))
    options = parser.parse_args()
    overrides = [*parallel_overrides(options.layout), f"train.seed={options.seed}", f"rollout.engine={options.engine}"]
    start = time.monotonic()

    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "base").mkdir(parents=True)
    task.make_tokenizer(OUT / "base")
    task.make_model(OUT / "base", options.seed)
    task.make_data(OUT / "data", options.seed)

    sft = train("sft", overrides)
    grpo = train("grpo", overrides)

    picture = OUT / "learning_curve.png"
    plot_learning_curve(
        {stage.upper(): OUT / stage / "metrics.jsonl" for stage in ("sft", "grpo")},
        picture,
        title=f"Two-digit addition, layout {options.layout}, seed {options.seed}",
    )
    summary = {
        "accuracy_base": accuracies(sft)[0],
        "accuracy_sft": accuracies(sft)[-1],
        "accuracy_rl": accuracies(grpo)[-1],
        "seconds": round(time.monotonic() - start, 1),
        "layout": options.layout,
        "seed": options.seed,
        "hf_dir": str(OUT / "grpo" / "hf"),
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    rate = statistics.median(step["perf/tokens_per_second"] for step in grpo if "perf/tokens_per_second" in step)
    print(
        f"""
Held-out greedy accuracy on {task.HELD_OUT} problems
  before SFT   {summary["accuracy_base"]:6.1%}
  after SFT    {summary["accuracy_sft"]:6.1%}
  after GRPO   {summary["accuracy_rl"]:6.1%}
{rate:.0f} tokens per second in GRPO (answer, judge, update), {summary["seconds"]:.0f} s in all, layout {options.layout}

  learning curve      {picture}
  TensorBoard         tensorboard --logdir {OUT}
  figures per step    {OUT / "grpo" / "metrics.jsonl"}
  Hugging Face model  {summary["hf_dir"]}
  this summary        {OUT / "summary.json"}

Next: the same job, cut another way:  make quickstart LAYOUT={"dp2" if options.layout == "pp2" else "pp2"}"""
    )


if __name__ == "__main__":
    main()
