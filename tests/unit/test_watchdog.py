"""The watchdog's judgement, with a clock that the test turns."""

import os
import re
import signal
import subprocess
import sys
import traceback

import pytest

from megatron_rl.parallel.watchdog import Observer, Record, Verdict, message, waits


def record(beat: int, seen: int, *, phase: str = "gen", step: int = 7, **more) -> Record:
    return Record(beat, str(seen), step, phase, "node-a", 1000 + beat, **more)


def observed(observer: Observer, *rows: tuple[float, dict[int, Record]]) -> list[Verdict | None]:
    return [observer.observe(records, now) for now, records in rows]


def test_a_slow_rank_that_works_is_left_alone() -> None:
    """Rank 0 waits in a collective for ten timeouts, rank 1 ticks just in time."""
    observer = Observer(2, timeout_s=10.0, now=0.0)
    rows = [(9.0 * i, {0: record(i, 0, waits=True), 1: record(i, i)}) for i in range(1, 12)]
    assert observed(observer, *rows) == [None] * 11


def test_the_rank_that_does_not_wait_is_the_one_that_hangs() -> None:
    observer = Observer(3, timeout_s=10.0, now=0.0)
    row = {0: record(1, 5, waits=True), 1: record(1, 5, phase="reward"), 2: record(1, 5, waits=True)}
    assert observer.observe(row, 1.0) is None
    later = {rank: entry._replace(beat=2) for rank, entry in row.items()}
    assert observer.observe(later, 11.0) is None
    assert observer.observe({rank: entry._replace(beat=3) for rank, entry in row.items()}, 11.5) == Verdict(
        (1,), True, 10.5
    )


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    observer = Observer(2, timeout_s=10.0, now=0.0)
    rows = [(6.0 * i, {rank: record(i, 0, waits=True) for rank in range(2)}) for i in range(1, 4)]
    assert observed(observer, *rows) == [None, None, Verdict((0, 1), True, 12.0)]
    said = message(Verdict((0, 1), True, 12.0), observer, 2)
    assert said.startswith("megatron-rl: ranks 0, 1 have made no progress for 12 s (each waits for the others): step 7")


def test_a_rank_without_a_sign_of_life_is_named_though_others_work() -> None:
    observer = Observer(2, timeout_s=10.0, now=0.0)
    dead = record(4, 9, step=6, phase="update_actor")
    rows = [(4.0 * i, {0: record(i, i), 1: dead}) for i in range(1, 5)]
    verdict = observed(observer, *rows)
    assert verdict == [None, None, None, Verdict((1,), False, 12.0)]
    assert message(verdict[-1], observer, 2).splitlines() == [
        "megatron-rl: rank 1 has given no sign of life for 12 s: last seen in step 6, phase update_actor on node-a; "
        "the run ends (run.hang_timeout_s=10)",
        "  rank 0, step 7, phase gen: at work",
    ]


def test_a_rank_that_fell_silent_after_its_last_progress_is_out_of_reach() -> None:
    """It sent a few records more, and then nothing, no stack either."""
    observer = Observer(2, timeout_s=10.0, now=0.0)
    rows = [(i, {0: record(i, 0, waits=i > 5), 1: record(min(i, 3), 0)}) for i in range(1, 13)]
    assert observed(observer, *rows) == [None] * 11 + [Verdict((1,), False, 9.0)]


def test_a_store_that_does_not_answer() -> None:
    """Nothing is heard of the others: they are out of reach, or we are."""
    observer = Observer(3, timeout_s=10.0, now=0.0)
    everybody = {rank: record(1, 1) for rank in range(3)}
    rows = [(1.0, everybody), (11.0, {0: record(2, 2)}), (11.5, {0: record(3, 3)})]
    assert observed(observer, *rows) == [None, None, Verdict((1, 2), False, 10.5)]


def test_start_up_is_not_timed_and_death_in_it_is() -> None:
    observer = Observer(2, timeout_s=10.0, now=0.0)
    rows = [(6.0 * i, {rank: record(i, 0, step=0, phase="") for rank in range(2)}) for i in range(1, 6)]
    assert observed(observer, *rows) == [None] * 5
    rows = [(30.0 + 6.0 * i, {0: record(9 + i, 0, step=0, phase="")}) for i in range(1, 3)]
    assert observed(observer, *rows) == [None, Verdict((1,), False, 12.0)]


def test_a_rank_that_is_done_is_not_missed() -> None:
    observer = Observer(2, timeout_s=10.0, now=0.0)
    rows = [(8.0 * i, {0: record(i, i, phase="export"), 1: record(1, 1, done=True)}) for i in range(1, 6)]
    assert observed(observer, *rows) == [None] * 5
    rows = [(40.0 + 8.0 * i, {0: record(5 + i, 5, phase="export"), 1: record(1, 1, done=True)}) for i in range(1, 3)]
    assert observed(observer, *rows) == [None, Verdict((0,), True, 16.0)]


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("/x/torch/distributed/distributed_c10d.py", "work = group.allreduce([tensor], opts)", True),
        ("/x/megatron/core/pipeline_parallel/p2p_communication.py", "req.wait()", True),
        ("/x/megatron_rl/parallel/collect.py", "return bool(raised.item())", True),
        ("/x/torch/nn/modules/linear.py", "return F.linear(input, self.weight, self.bias)", False),
        ("/x/my_data.py", "while True:", False),
    ],
)
def test_what_waiting_looks_like(file: str, line: str, expected: bool) -> None:
    caller = traceback.FrameSummary("/x/run.py", 1, "run", line="train()")
    stack = traceback.StackSummary.from_list([caller, traceback.FrameSummary(file, 9, "f", line=line)])
    assert waits(stack) is expected


STORE = """
import sys, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""
RANKS = """
import os, time, torch.distributed as dist
from megatron_rl.parallel.watchdog import Watchdog
for rank in range(2):
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    Watchdog(1.2, rank, 2, store).start()
print("started", flush=True)
time.sleep(60)
"""


def test_a_rank_whose_store_does_not_answer_ends_with_what_started_it() -> None:
    """The store's process is stopped; a shell stands for torchrun."""
    store = subprocess.Popen([sys.executable, "-c", STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert store.stdout is not None
    port = store.stdout.readline().strip()
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"}
    torchrun = subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1"; echo outlived', sys.executable, RANKS],
        env=os.environ | names,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert torchrun.stdout is not None and torchrun.stdout.readline() == "started\n"
        store.send_signal(signal.SIGSTOP)
        out, errors = torchrun.communicate(timeout=30)
    finally:
        torchrun.kill()
        store.kill()
        store.communicate()
    assert (torchrun.returncode, out) == (-signal.SIGKILL, "")
    store_name = re.escape(f"torchrun's store at 127.0.0.1:{port}")
    line = rf"^megatron-rl: rank [01] has had no answer from {store_name} for 1 s: .*; start-up on "
    assert re.search(line, errors, re.MULTILINE)
