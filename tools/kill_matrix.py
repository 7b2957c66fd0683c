"""Kill training at random moments, continue it, and compare with the run that was left alone: nothing may differ.

    python tools/kill_matrix.py --model runs/quickstart/sft/hf --data runs/quickstart/data

Ten kills for each of three layouts of two ranks. Each aims at a phase of a step: a SIGKILL falls a random time after
the phase began, on one rank or on both. The run is then started again in the same directory. Every figure of every step
but seconds and rates, and the bytes of the exported model, must be those of the uninterrupted run. Results are appended
to `kills.csv`; a kill that is there already is not repeated. `summary.md` beside it is made anew each time.
"""

import argparse
import csv
import datetime
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

LAYOUTS = {"tp2": ["parallel.tp=2"], "pp2": ["parallel.pp=2"], "dp2": ["parallel.dp=2"]}
# Where a kill aims: (module, class, function), and the longest time it falls after the function is called.
PHASES = {
    "rollout": ("megatron_rl.rollout.hf_engine", "HFEngine", "generate", 0.2),
    "reward": ("megatron_rl.rewards.pool", "RewardPool", "score", 0.01),
    "backward": ("megatron_rl.workers.model_worker", "ModelWorker", "forward_backward", 0.15),
    "optimizer": ("megatron_rl.workers.model_worker", "ModelWorker", "step", 0.01),
    "save": ("megatron_rl.checkpoint.store", "CheckpointStore", "save", 0.1),
    "rename": ("megatron_rl.checkpoint.store", "CheckpointStore", "_point_at", 0.0),
}
KILLS = 10
STEPS, EVERY = 6, 2
OPTIONS = [
    f"train.steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "train.batch_size=8",
    "train.mini_batches_per_step=2",
    "train.epochs_per_step=2",
    "rollout.group_size=4",
    "kl.where=loss",
    "ema.axis=step",
    "eval.every=3",
    "eval.limit=20",
]
RESULT = ("layout", "number", "phase", "step", "delay_ms", "victim", "continued_after", "equal", "date")


class Kill(NamedTuple):
    """A SIGKILL `delay` seconds after the phase of a step began, by or for the victim: a rank, or "all"."""

    phase: str
    step: int
    delay: float
    victim: str


def aim(layout: str, number: int) -> Kill:
    """The kill that this number stands for; six in a row aim at the six phases."""
    dice = random.Random(f"{layout}/{number}")
    phase = list(PHASES)[number % len(PHASES)]
    step = dice.choice(range(EVERY, STEPS + 1, EVERY)) if phase in ("save", "rename") else dice.randint(1, STEPS)
    victim = "0" if phase == "rename" else dice.choice(("0", "1", "all"))  # rank 0 alone renames
    return Kill(phase, step, dice.uniform(0, PHASES[phase][3]), victim)


def _arm(kill: Kill) -> None:
    """Lets this process kill itself when the phase of the step begins."""
    import importlib

    from megatron_rl.trainers.run import Run

    module, owner, name, _ = PHASES[kill.phase]
    where = getattr(importlib.import_module(module), owner)
    original, step_of_run, now = getattr(where, name), Run._step, {"step": 0}

    @functools.wraps(step_of_run)
    def step(self: Any, number: int) -> None:
        now["step"] = number
        step_of_run(self, number)

    @functools.wraps(original)
    def armed(*args: Any, **kwargs: Any) -> Any:
        if now["step"] == kill.step:
            if kill.delay == 0.0:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return original(*args, **kwargs)

    Run._step = step  # type: ignore[method-assign]
    setattr(where, name, armed)


def _rank(rank: int, port: int, config: str, overrides: list[str], kill: Kill | None, log: str) -> None:
    """One rank of a run, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    import torch

    from megatron_rl.config.load import load_config
    from megatron_rl.trainers.run import run

    torch.set_num_threads(1)
    if kill is not None and kill.victim in (str(rank), "all"):
        _arm(kill)
    run(load_config(config, overrides))


def _context() -> Any:
    """Processes that are forked from one which has its imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_rl.trainers.run", "transformers.generation"])
    return context


def train(config: str, overrides: list[str], log: Path, kill: Kill | None = None, patience: float = 20.0) -> list[int]:
    """The exit codes of a run's two ranks. Once one is killed the other has `patience` seconds to end by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = _context()
    ranks = [
        context.Process(target=_rank, args=(rank, port, config, overrides, kill, f"{log}.{rank}")) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    killed_at = None
    while any(process.is_alive() for process in ranks):
        if killed_at is None and any(process.exitcode not in (None, 0) for process in ranks):
            killed_at = time.monotonic()
        if killed_at is not None and (kill is None or kill.victim == "all" or time.monotonic() > killed_at + patience):
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    return [process.exitcode for process in ranks]


def figures(run: Path) -> list[dict[str, Any]]:
    """The logged steps, without what depends on time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: v for key, v in row.items() if key != "time" and not key.startswith(("timing_s/", "perf/"))}
        for row in rows
    ]


def same(run: Path, whole: Path) -> bool:
    """Whether two runs have the same figures and the same final weights, bit by bit."""
    name = Path("hf", "model.safetensors")
    return figures(run) == figures(whole) and (run / name).read_bytes() == (whole / name).read_bytes()


def attempt(config: str, options: list[str], kill: Kill, whole: Path, run: Path) -> tuple[int, bool]:
    """Kills a run, continues it; the step that it continued after, and whether it became the whole one."""
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_suffix(".log")
    codes = train(config, [*options, f"run.dir={run}"], log, kill)
    victims = [0, 1] if kill.victim == "all" else [int(kill.victim)]
    if not any(codes[rank] == -signal.SIGKILL for rank in victims):
        raise RuntimeError(f"{kill} did not take place: the ranks ended with {codes}; see {log}.*")
    latest = run / "checkpoints" / "latest"
    done = int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0
    codes = train(config, [*options, f"run.dir={run}"], log)
    return done, codes == [0, 0] and same(run, whole)


def matrix(config: str, options: list[str], runs: Path, table: Path, kills: int = KILLS) -> list[dict[str, str]]:
    """Every kill that the table lacks; all its rows."""
    rows: list[dict[str, str]] = []
    if table.exists():
        with table.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    done = {(row["layout"], int(row["number"])) for row in rows}
    for layout, cut in LAYOUTS.items():
        whole, chosen = runs / layout / "whole", [*options, *cut]
        for number in range(kills):
            if (layout, number) in done:
                continue
            if not (whole / "hf").is_dir():
                whole.parent.mkdir(parents=True, exist_ok=True)
                codes = train(config, [*chosen, f"run.dir={whole}"], whole.with_suffix(".log"))
                if codes != [0, 0]:
                    raise RuntimeError(f"the uninterrupted run ended with {codes}; see {whole}.log.*")
            kill = aim(layout, number)
            after, equal = attempt(config, chosen, kill, whole, runs / layout / f"kill_{number}")
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            values = (layout, number, kill.phase, kill.step, f"{kill.delay * 1e3:.0f}", kill.victim, after, equal, date)
            rows.append(dict(zip(RESULT, map(str, values), strict=True)))
            print("  ".join(rows[-1].values()), flush=True)
            table.parent.mkdir(parents=True, exist_ok=True)
            with table.open("a", newline="") as lines:
                writer = csv.DictWriter(lines, RESULT, lineterminator="\n")
                if table.stat().st_size == 0:
                    writer.writeheader()
                writer.writerow(rows[-1])
    return rows


def summary(rows: list[dict[str, str]]) -> str:
    """Kills and how many of the continued runs were equal, by layout and phase, as Markdown."""
    every, equal = (
        Counter((row["phase"], row["layout"]) for row in rows if row["equal"] == "True" or not only)
        for only in (False, True)
    )
    lines = ["| aimed at | " + " | ".join(LAYOUTS) + " |", "|---" * (len(LAYOUTS) + 1) + "|"]
    for phase in PHASES:
        cells = (f"{equal[phase, layout]} of {every[phase, layout]}" for layout in LAYOUTS)
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/quickstart/grpo.yaml")
    parser.add_argument("--model", default="runs/quickstart/sft/hf")
    parser.add_argument("--data", default="runs/quickstart/data")
    parser.add_argument("--runs", type=Path, default=Path("runs/kills"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/kills"))
    arguments = parser.parse_args()
    options = [*OPTIONS, f"model.path={arguments.model}"]
    options += [f"data.train={arguments.data}/train.jsonl", f"data.val={arguments.data}/heldout.jsonl"]
    rows = matrix(arguments.config, options, arguments.runs, arguments.results / "kills.csv")
    (arguments.results / "summary.md").write_text(summary(rows))
    return 0 if all(row["equal"] == "True" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
