"""A reinforcement learning step here and in TRL: seconds, tokens and memory of both, in turns on the same two cores.

    make venv-trl
    python tools/bench_vs_trl.py [--case grpo-forced grpo-natural sdpo] [--size 1m 8m] [--engine hf vllm] [--json FILE]

Both systems train the same random Llama on the same prompts, with the same groups, token limit, learning rate and
reward: 8 prompts of 32 tokens with 8 answers each and one update a step (sdpo: 2 prompts). In `grpo-natural` one in 64
tokens ends an answer, so that lengths are about geometric with a mean of 64, cut off at 256; in the other cases nothing
can end one, and each has 64 tokens, which is checked. Each run is a process of its own (or several, see `layout`) with
two threads together: here `megatron-rl train`, there TRL's trainer, without checkpointing of gradients, logs or saves.

First every variant of a system runs once; then the best of each runs `--rounds` times more, in turns. `seconds` are
from the end of one step to the end of the next, whatever lies between; `gen` those of drawing the answers; `train` the
rest; sdpo is compared by `train`.
Medians of `--steps` steps a run, after `--warmup` that are left out. `cpu` are the CPU seconds of all processes. Where
lengths are drawn, times are compared by the token. `peak` is the largest sum of the peak resident sets (VmHWM) of the
processes that lived at one time, launchers and reward workers included, until the last measured step.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from random_llama import MEAN, PROMPT_TOKENS, make_model
from watched import Watch

ROOT = Path(__file__).parents[1]
GROUP, LONGEST, TOPK = 8, 256, 100
TRL = "trl"
LAYOUTS = {"1x2": 1, "dp2": 2, "tp2": 2}  # processes; they share two threads


class Case(NamedTuple):
    trainer: str
    prompts: int
    new_tokens: int
    ends: bool  # whether answers can end before the limit


CASES = {
    "grpo-forced": Case("grpo", 8, MEAN, ends=False),
    "grpo-natural": Case("grpo", 8, LONGEST, ends=True),
    "sdpo": Case("sdpo", 2, MEAN, ends=False),
}


class Variant(NamedTuple):
    """A system (here by the engine's name), how its processes share the work, and what it computes in."""

    system: str
    layout: str
    dtype: str


class Step(NamedTuple):
    """Seconds, and the tokens of all answers."""

    seconds: float
    gen: float
    cpu: float
    tokens: int


class Result(NamedTuple):
    steps: list[Step]
    peak: int  # bytes

    def median(self, name: str) -> float:
        return statistics.median(getattr(step, name) for step in self.steps)

    @property
    def per_token(self) -> float:
        return statistics.median(step.seconds / step.tokens for step in self.steps)

    @property
    def train_per_token(self) -> float:
        return statistics.median((step.seconds - step.gen) / step.tokens for step in self.steps)


def ours(variant: Variant, case: Case, place: Path, options: argparse.Namespace) -> list[str]:
    """The command of a run here, which leaves `place/run/metrics.jsonl`."""
    model = place.parent / "model"
    overrides = {
        "trainer": case.trainer,
        "model.path": model,
        "model.dtype": variant.dtype,
        "data.train": model / "prompts.jsonl",
        "data.max_prompt_tokens": PROMPT_TOKENS,
        "parallel.tp": 2 if variant.layout == "tp2" else 1,
        "parallel.dp": 2 if variant.layout == "dp2" else 1,
        "optim.lr": options.lr,
        "train.steps": options.warmup + options.steps,
        "train.batch_size": case.prompts,
        "train.max_tokens_per_micro_batch": options.micro_batch,
        "rollout.engine": variant.system,
        "rollout.group_size": GROUP,
        "rollout.max_new_tokens": case.new_tokens,
        "reward.name": f"{ROOT}/tools/odd_word.py:judge",
        "reward.workers": 1,
        "run.dir": place / "run",
    }
    config = place / "config.yaml"
    config.write_text(f"trainer: {overrides.pop('trainer')}\n")
    python = options.vllm_python if variant.system == "vllm" else sys.executable
    settings = [f"{name}={value}" for name, value in overrides.items()]
    return [str(python), "-m", "megatron_rl", "train", str(config), *settings, *options.set]


def theirs(variant: Variant, case: Case, place: Path, options: argparse.Namespace) -> list[str]:
    """The command of a run of TRL, which leaves `place/steps.jsonl`."""
    model, processes = place.parent / "model", LAYOUTS[variant.layout]
    workload = {
        **case._asdict(),
        "model": str(model),
        "data": str(model / "prompts.jsonl"),
        "dtype": variant.dtype,
        "processes": processes,
        "group": GROUP,
        "steps": options.warmup + options.steps,
        "lr": options.lr,
        "topk": TOPK,
        "trl_rows": options.trl_rows,
        "continuous": variant.system == "trl-continuous",
    }
    (place / "workload.json").write_text(json.dumps(workload))
    script = [f"{ROOT}/tools/trl_side.py", str(place / "workload.json"), str(place / "steps.jsonl")]
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [str(options.trl_python), *(several if processes > 1 else []), *script]


def read_steps(place: Path, case: Case, *, trl: bool) -> list[dict[str, float]]:
    """End, seconds of drawing and tokens of each step; AssertionError where a step did not do the whole work."""
    samples = case.prompts * GROUP
    rows = [
        json.loads(line) for line in (place / ("steps.jsonl" if trl else "run/metrics.jsonl")).read_text().splitlines()
    ]
    if not trl:
        rows = [
            {
                "end": row["time"],
                "gen": row["timing_s/gen"],
                "tokens": round(row["response_length/mean"] * samples),
                "longest": row["response_length/max"],
                "targets": row.get("self_distillation/target_fraction"),
            }
            for row in rows
        ]
    for row in rows:
        assert case.ends or row["tokens"] == samples * case.new_tokens, f"{row['tokens']} tokens in a step"
        assert row["longest"] <= case.new_tokens
        assert case.trainer != "sdpo" or row["targets"] > 0.9, f"only {row['targets']} of the rows have a teacher"
    return rows


def measure(variant: Variant, case: Case, place: Path, options: argparse.Namespace) -> Result:
    """One run. RuntimeError where it fails."""
    trl = variant.system.startswith(TRL)
    place.mkdir()
    command = (theirs if trl else ours)(variant, case, place, options)
    threads = str(2 // LAYOUTS[variant.layout])
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": "" if trl else str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    with (place / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=place, stdout=log, stderr=subprocess.STDOUT, env=environment)
        watch = Watch(process)
        watch.start()
        try:
            code = process.wait()
        finally:
            watch.end()
    if code:
        tail = (place / "log.txt").read_text()[-4000:]
        raise RuntimeError(f"{' '.join(command)}\nended with exit code {code}:\n{tail}")
    rows = read_steps(place, case, trl=trl)
    steps = [
        Step(
            now["end"] - before["end"], now["gen"], watch.cpu(now["end"]) - watch.cpu(before["end"]), int(now["tokens"])
        )
        for before, now in zip(rows[options.warmup - 1 :], rows[options.warmup :])
    ]
    return Result(steps, watch.peak(rows[-1]["end"]))


def together(results: Sequence[Result]) -> Result:
    return Result([step for result in results for step in result.steps], max(result.peak for result in results))


def variants(case: Case, options: argparse.Namespace) -> list[Variant]:
    continuous = ["trl-continuous"] if options.continuous and case.trainer == "grpo" else []
    return [
        Variant(system, layout, dtype)
        for system in [TRL, *continuous, *options.engine]
        for layout in options.layout
        for dtype in options.dtype
        if not (system.startswith(TRL) and layout == "tp2")
    ]


def contest(name: str, size: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: every variant; `ratio` and `peak_ratio` are the best TRL's over the row's."""
    case = CASES[name]
    key = "train_per_token" if case.trainer == "sdpo" else "per_token"
    runs: dict[Variant, list[Result]] = {variant: [] for variant in variants(case, options)}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", size, ends=case.ends)

        def run(variant: Variant) -> None:
            place = Path(folder) / f"{'-'.join(variant)}-{len(runs[variant])}"
            runs[variant].append(measure(variant, case, place, options))
            print(
                f"# {name} {size} {' '.join(variant)}: {getattr(runs[variant][-1], key) * 1e6:.0f} us/token", flush=True
            )

        def best(system: str) -> Variant:
            mine = [
                variant
                for variant in runs
                if (variant.system.startswith(TRL) if system == TRL else variant.system == system)
            ]
            return min(mine, key=lambda variant: getattr(together(runs[variant]), key))

        for variant in runs:
            run(variant)
        finalists = [best(system) for system in [TRL, *options.engine]]
        for _ in range(options.rounds):
            for variant in finalists:
                run(variant)
    totals = {variant: together(results) for variant, results in runs.items()}
    base = totals[finalists[0]]
    return [
        {
            "case": name,
            "size": size,
            **variant._asdict(),
            "best": variant in finalists,
            "seconds": total.median("seconds"),
            "gen": total.median("gen"),
            "train": statistics.median(step.seconds - step.gen for step in total.steps),
            "cpu": total.median("cpu"),
            "tokens": total.median("tokens"),
            "steps": len(total.steps),
            "us_per_token": getattr(total, key) * 1e6,
            "peak_mib": total.peak / 2**20,
            "ratio": getattr(base, key) / getattr(total, key),
            "peak_ratio": base.peak / total.peak,
        }
        for variant, total in totals.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; the best of each system has a star."""
    names = ["case", "size", "system", "layout", "dtype", "seconds", "gen", "train", "cpu", "tokens", "us_per_token"]
    names += ["peak_mib", "ratio", "peak_ratio"]
    forms = {"tokens": ".0f", "us_per_token": ".0f", "peak_mib": ".0f"}
    lines = [f"| {' | '.join(names)} | |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [
            f"{row[name]:{forms.get(name, '.2f')}}" if isinstance(row[name], float) else str(row[name])
            for name in names
        ]
        lines.append(f"| {' | '.join(cells)} | {'*' if row['best'] else ''} |")
    return "\n".join(lines)


def environment(lock: str) -> Path:
    """The interpreter of the environment that the Makefile makes of a lock."""
    digest = sha256((ROOT / ".ci" / f"{lock}-cpu.lock").read_bytes()).hexdigest()[:12]
    return ROOT / f".venv-{lock}-{digest}" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--size", nargs="+", choices=["1m", "8m", "50m"], default=["1m", "8m"], help="of the grpo cases"
    )
    parser.add_argument("--engine", nargs="+", choices=["hf", "vllm"], default=["hf", "vllm"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--warmup", type=int, default=3, help="at least 1; here the first two steps compare with the engine"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--micro-batch", type=int, default=8192, help="tokens, here")
    parser.add_argument("--trl-rows", type=int, default=8, help="rows of TRL's micro-batches")
    parser.add_argument("--continuous", action="store_true", help="try TRL's continuous batching as well")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="more options of megatron-rl train")
    parser.add_argument("--trl-python", type=Path, default=environment("trl"))
    parser.add_argument("--vllm-python", type=Path, default=environment("vllm"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    rows = []
    for name in options.case:
        for size in options.size if CASES[name].trainer == "grpo" else ["wide"]:
            rows += contest(name, size, options)
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
