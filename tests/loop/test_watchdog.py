"""A run in which a rank hangs: a whole trainer, a fault planted on one rank.

It costs the pool its workers, so its name puts it after the other loops.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.parallel.stop import HUNG
from tests.dist.pool import Pool
from tests.loop.test_stop import OPTIONS, nothing_is_left, train_with
from tests.loop.test_trainers import place, steps  # noqa: F401


def hang_in_a_loop() -> None:
    while True:
        time.sleep(0.01)


def stand_still() -> None:
    time.sleep(1)  # a few records of where that was
    os.kill(os.getpid(), signal.SIGSTOP)


def train_and_hang(fault: Callable[[], object], cwd: str, overrides: list[str], said: str) -> None:
    """A run that does not return. It speaks into a file, for the worker's own streams are the test session's."""
    with Path(said).open("w") as errors:
        os.dup2(errors.fileno(), 2)
        train_with(fault, 2, cwd, overrides)


@pytest.mark.parametrize(
    ("fault", "codes", "first_line", "stack"),
    [
        (
            hang_in_a_loop,
            [HUNG, HUNG],
            "megatron-rl: rank 1 has made no progress for 5 s: step 2, phase step; the run ends .run.hang_timeout",
            ["in hang_in_a_loop", "time.sleep(0.01)", "in _step"],
        ),
        pytest.param(
            stand_still,
            [HUNG, -signal.SIGKILL],
            "megatron-rl: rank 1 has given no sign of life for [345] s: last seen in step 2, phase step on ",
            [],
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_run_in_which_a_rank_hangs_ends_and_names_it(
    pool: Pool,
    place: Path,  # noqa: F811
    tmp_path: Path,
    fault: Callable[[], object],
    codes: list[int],
    first_line: str,
    stack: list[str],
) -> None:
    """With its stack where its interpreter still runs; nothing is left of the run, and only one rank speaks."""
    shared_memory = set(os.listdir("/dev/shm"))
    options = [*OPTIONS, "train.steps=3", "run.hang_timeout_s=5", f"run.dir={tmp_path}/run"]
    with pytest.raises(EOFError):  # a worker is gone
        pool.run(train_and_hang, 2, fault, str(place), options, str(tmp_path / "said"))
    ranks = [process for process, _ in pool.workers[:2]]
    for rank in ranks:
        rank.join(timeout=10)
    pool.close()
    assert [rank.exitcode for rank in ranks] == codes
    said = (tmp_path / "said").read_text()
    assert said.count("megatron-rl: ") == 1 and re.search(first_line, said)
    assert "  rank 0, step 2, phase update_actor/forward_backward/reduce_gradients: waits for others" in said
    assert all(line in said for line in stack) and "Traceback" not in said
    assert [row["step"] for row in steps(tmp_path / "run")] == [0, 1]
    assert nothing_is_left(place)
    assert set(os.listdir("/dev/shm")) <= shared_memory
