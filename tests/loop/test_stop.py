"""Runs that are asked to stop: whole trainers, faults planted on one rank."""

import contextlib
import io
import os
import signal
import time
from collections.abc import Callable, Set
from pathlib import Path

import psutil
import torch.distributed as dist

from tests.dist.pool import Pool
from tests.loop.test_trainers import QUICKSTART, place, steps, train  # noqa: F401

SFT = f"{QUICKSTART}/sft.yaml"
OPTIONS = ["parallel.dp=2", "train.batch_size=8", "eval.limit=2"]


def train_with(fault: Callable[[], object], at: int, cwd: str, overrides: list[str]) -> str:
    """A run in which rank 1 meets `fault` at the start of step `at` (0: in the first evaluation); what it prints."""
    from megatron_rl.trainers.evaluate import Evaluator
    from megatron_rl.trainers.sft import SftTrainer

    whole_step, whole_evaluation = SftTrainer.step, Evaluator.__call__

    def meet(step: int) -> None:
        if step == at and dist.get_rank() == 1:
            fault()

    def step(self, number, timer):
        meet(number)
        return whole_step(self, number, timer)

    def evaluation(self, number, *model, **named):
        if number == 0:
            meet(0)
        return whole_evaluation(self, number, *model, **named)

    SftTrainer.step, Evaluator.__call__ = step, evaluation
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train(cwd, SFT, overrides)
    finally:
        SftTrainer.step, Evaluator.__call__ = whole_step, whole_evaluation
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    return said.getvalue()


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def test_one_rank_is_asked_and_all_stop_at_the_boundary(pool: Pool, place: Path, tmp_path: Path) -> None:  # noqa: F811
    """In a step, in the first evaluation and in the last step; the same command goes on to the end."""
    options = [*OPTIONS, "train.steps=3", f"run.dir={tmp_path}/run"]
    latest = tmp_path / "run" / "checkpoints" / "latest"

    said = pool.run(train_with, 2, ask_to_stop, 0, str(place), options)
    assert said[0].splitlines()[-1] == (
        "megatron-rl: stopped by a signal to another rank before the first step; run the same command to go on"
    )
    assert not latest.exists() and [row["step"] for row in steps(tmp_path / "run")] == [0]

    said = pool.run(train_with, 2, ask_to_stop, 1, str(place), options)
    assert "stopped by a signal to another rank after step 1; checkpoint saved; run the same command" in said[0]
    assert said[1] == ""
    assert latest.read_text() == "step_00000001\n" and not (tmp_path / "run" / "hf").exists()

    said = pool.run(train_with, 2, ask_to_stop, 3, str(place), options)
    assert "stopped by" not in said[0]  # there is no boundary before the end
    assert [row["step"] for row in steps(tmp_path / "run")] == [0, 1, 2, 3]
    assert latest.read_text() == "step_00000003\n" and (tmp_path / "run" / "hf" / "model.safetensors").exists()


def processes_in(folder: Path) -> set[psutil.Process]:
    """What works there, a zombie's folder being unknown."""
    return {process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)}


def nothing_is_left(folder: Path, before: Set[psutil.Process] = frozenset()) -> bool:
    """Whether all that was started there has ended, within seconds."""
    deadline = time.monotonic() + 10
    while processes_in(folder) - before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
