"""Rewards that hang, crash or misbehave cost their own sample, and leave no process behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from megatron_rl.rewards.pool import RewardPool, count_failures, score_groups
from megatron_rl.types import Prompt, Reward, Rollout, RolloutGroup

DEADLINE = 0.75

# A user's module: the response's text says how to misbehave.
MODULE = """
import os, signal, subprocess, sys, time
from megatron_rl.types import Reward

def judge(prompt, rollout, *, scale=1.0):
    deed, _, argument = rollout.text.partition(" ")
    if deed == "hang":
        while True:
            pass
    if deed == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    if deed == "sleep":
        time.sleep(float(argument))
    if deed == "raise":
        raise KeyError("no such thing")
    if deed == "return":
        return {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None, "true": True}[argument]
    if deed == "reward":
        return Reward(**eval(argument))
    if deed == "exit":
        os._exit(3)
    if deed == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if deed == "print":
        for stream in (sys.stdout, sys.__stdout__):
            print("x" * 100_000, file=stream, flush=True)
        os.write(1, b"raw bytes")
        subprocess.run(["echo", "from a child"])
    if deed == "read":
        return len(sys.stdin.read())
    if deed == "children":
        os.environ["MARKER"], _, how = argument.partition(" ")
        spawned = subprocess.Popen(["sleep", "600"])
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        # An orphan in a session of its own, whose parent is gone.
        subprocess.run(["sh", "-c", "setsid sleep 600 & exit 0"])
        if how == "exit":
            os._exit(5)
        time.sleep(600)
    if deed == "escape" and os.fork() == 0:
        return -1.0
    return scale * prompt.index
"""


def pair(index: int, text: str = "") -> tuple[Prompt, Rollout]:
    rollout = Rollout(
        prompt_index=index,
        sample_index=0,
        token_ids=(1,),
        text=text,
        log_probs=(0.0,),
        log_kept_mass=(0.0,),
        finish_reason="stop",
        policy_version=0,
    )
    return Prompt(index=index, text="?", token_ids=(1,), row={"answer": "1"}), rollout


def processes_of(session_leaders: set[int]) -> set[int]:
    """Processes, zombies too, in the sessions of these leaders."""
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if int(fields[3]) in session_leaders or int(entry) in session_leaders:
            found.add(int(entry))
    return found


def marked(marker: str) -> set[int]:
    """Processes whose environment holds the marker, in whatever session they are."""
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if marker.encode() in Path(f"/proc/{entry}/environ").read_bytes():
                found.add(int(entry))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked, or is another user's
    return found


def worker_pids(pool: RewardPool) -> set[int]:
    return {worker._process.pid for worker in pool._workers}


def wait_until_gone(pids: set[int], seconds: float = 5.0) -> None:
    """A zombie counts as gone: when an orphan is reaped is up to the system."""
    end = time.monotonic() + seconds
    while alive := {pid for pid in pids if running(pid)}:
        assert time.monotonic() < end, f"still running: {alive}"
        time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("user") / "my_reward.py"
    path.write_text(MODULE)
    return f"{path}:judge"


@pytest.fixture(scope="module")
def two(judge: str) -> Iterator[RewardPool]:
    """Two workers, which live through all misdeeds of this module."""
    with RewardPool(judge, {"scale": 2.0}, workers=2, deadline_s=DEADLINE) as pool:
        yield pool
        assert len(worker_pids(pool)) == 2


def test_many_calls_in_order(two: RewardPool) -> None:
    start = time.monotonic()
    rewards = two.score([pair(index) for index in range(2000)])
    assert [reward.value for reward in rewards] == [2.0 * index for index in range(2000)]
    assert time.monotonic() - start < 5.0  # 10,000 in a few seconds, with room for a busy machine
    assert two.score([]) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hang", "timeout"),
        ("stubborn", "timeout"),
        ("sleep 30", "timeout"),
        ("raise", "error: KeyError: 'no such thing'"),
        ("return nan", "not finite"),
        ("return inf", "not finite"),
        ("return text", "wrong type: str"),
        ("return none", "wrong type: NoneType"),
        ("reward {'value': '1'}", "wrong type: str"),
        ("reward {'value': 1.0, 'parts': {'accuracy': float('nan')}}", "not finite"),
        ("reward {'value': float('nan'), 'reason': 'no tests: empty'}", "no tests: empty"),
        ("exit", "crashed: exit code 3"),
        ("segfault", "crashed: signal 11"),
    ],
)
def test_a_failure_costs_its_sample_only(two: RewardPool, text: str, reason: str) -> None:
    start = time.monotonic()
    rewards = two.score([pair(1), pair(2, text), *(pair(index) for index in range(3, 9))])
    assert time.monotonic() - start < DEADLINE + 2.0
    assert rewards[1].reason == reason
    assert rewards[1].value != rewards[1].value
    assert [reward.value for reward in rewards if reward is not rewards[1]] == [2, 6, 8, 10, 12, 14, 16]
    assert all(reward.reason is None for reward in rewards if reward is not rewards[1])


def test_a_finite_reward_with_a_reason_is_refused(two: RewardPool) -> None:
    (reward,) = two.score([pair(0, "reward {'value': 1.0, 'reason': 'why'}")])
    assert reward.reason is not None
    assert reward.reason.startswith("error: ValueError: Reward has the finite value 1.0")


def test_a_reward_keeps_its_parts_and_feedback(two: RewardPool) -> None:
    (reward, truth) = two.score(
        [pair(0, "reward {'value': 1, 'parts': {'a': True}, 'feedback': 'f' * 300_000}"), pair(0, "return true")]
    )
    assert reward == Reward(value=1.0, parts={"a": 1.0}, feedback="f" * 300_000)
    assert truth.value == 1.0


def test_the_deadline_counts_per_call_and_not_per_batch(two: RewardPool) -> None:
    start = time.monotonic()
    rewards = two.score([pair(index, f"sleep {0.5 * DEADLINE}") for index in range(6)])
    assert [reward.value for reward in rewards] == [2.0 * index for index in range(6)]
    assert 1.5 * DEADLINE <= time.monotonic() - start < 3.0 * DEADLINE + 2.0, "not two at a time"


def test_failures_are_counted_by_kind(two: RewardPool) -> None:
    texts = ["raise", "return nan", "return text", "exit", "", "raise"]
    rewards = two.score([pair(index, text) for index, text in enumerate(texts)])
    assert count_failures(rewards) == {"error": 2, "not_finite": 1, "wrong_type": 1, "crashed": 1}


def test_printing_and_reading_do_not_touch_the_protocol(two: RewardPool, capfd: pytest.CaptureFixture[str]) -> None:
    rewards = two.score([pair(3, "print"), pair(0, "read"), pair(4, "print")])
    assert [reward.value for reward in rewards] == [6.0, 0.0, 8.0]
    assert capfd.readouterr().out == ""


def test_a_message_larger_than_the_pipe(two: RewardPool) -> None:
    assert [reward.value for reward in two.score([pair(1, " " + "x" * 2_000_000), pair(2)])] == [2.0, 4.0]


@pytest.mark.parametrize(("how", "reason"), [("wait", "timeout"), ("exit", "crashed: exit code 5")])
def test_children_of_the_reward_are_killed_with_it(two: RewardPool, how: str, reason: str) -> None:
    """Those in the worker's process group, those in sessions of their own, and orphans."""
    marker = uuid4().hex
    start = time.monotonic()
    rewards = two.score([pair(1, f"children {marker} {how}"), pair(2)])
    assert (rewards[0].reason, rewards[1].value) == (reason, 4.0)
    assert time.monotonic() - start < DEADLINE + 2.0
    assert marked(marker) == set()


def test_a_forked_child_that_returns_cannot_answer(two: RewardPool) -> None:
    rewards = two.score([pair(index, "escape") for index in range(1, 7)])
    assert [reward.value for reward in rewards] == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]


def test_a_worker_that_dies_between_calls_costs_nothing(judge: str) -> None:
    with RewardPool(judge, workers=2, deadline_s=DEADLINE) as pool:
        pool.score([pair(1, "escape"), pair(2, "escape")])
        for pid in worker_pids(pool):
            os.kill(pid, signal.SIGKILL)
            wait_until_gone({pid})
        assert [reward.value for reward in pool.score([pair(1), pair(2), pair(3)])] == [1.0, 2.0, 3.0]


def test_groups_get_a_reward_for_each_rollout(two: RewardPool) -> None:
    groups = []
    for index, size in ((1, 2), (2, 0), (3, 3)):
        prompt, rollout = pair(index)
        rollouts = tuple(replace(rollout, sample_index=sample) for sample in range(size))
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts))
    scored = score_groups(two, groups)
    assert [[reward.value for reward in group.rewards] for group in scored] == [[2.0, 2.0], [], [6.0] * 3]
    assert [replace(group, rewards=()) for group in scored] == groups


def test_nothing_is_left_after_close_or_an_exception(judge: str) -> None:
    for error in (None, KeyboardInterrupt):
        leaders: set[int] = set()
        try:
            with RewardPool(judge, workers=3, deadline_s=DEADLINE) as pool:
                leaders |= worker_pids(pool)
                pool.score([pair(0, "hang"), pair(1), pair(2, "exit")])
                leaders |= worker_pids(pool)
                if error is not None:
                    raise error
        except KeyboardInterrupt:
            pass
        assert len(leaders) == 5
        assert processes_of(leaders) == set()
        with pytest.raises(ValueError, match="closed"):
            pool.score([pair(0)])


def test_an_interrupted_call_closes_the_pool(judge: str) -> None:
    pool = RewardPool(judge, workers=2, deadline_s=DEADLINE)
    leaders = worker_pids(pool)
    unpicklable = (replace(pair(1)[0], row={"answer": lambda: 1}), pair(1)[1])
    with pytest.raises(Exception, match="pickle"):
        pool.score([pair(0, "hang"), unpicklable])
    assert processes_of(leaders) == set()
    pool.close()


def test_workers_die_with_a_killed_trainer(judge: str) -> None:
    code = (
        "import sys, megatron_rl.rewards.pool as rewards\n"
        f"pool = rewards.RewardPool({judge!r}, workers=2, deadline_s=60)\n"
        "print(*(worker._process.pid for worker in pool._workers), flush=True)\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from test_reward_pool import pair\n"
        "print('busy', flush=True)\n"
        "pool.score([pair(0, 'hang'), pair(1, 'hang')])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        workers = set(map(int, trainer.stdout.readline().split()))
        assert trainer.stdout.readline() == "busy\n"
        time.sleep(0.1)
        trainer.kill()
    assert len(workers) == 2
    wait_until_gone(workers)


def test_a_slow_import_is_not_charged_to_a_call(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(0.6)\ndef f(prompt, rollout): return 1\n")
    with RewardPool(f"{tmp_path}/slow.py:f", workers=1, deadline_s=0.3) as pool:
        assert pool.score([pair(0)])[0].value == 1.0


def test_a_users_module_is_found_as_in_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "house_rewards.py").write_text("def half(prompt, rollout): return 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    with RewardPool("house_rewards:half", workers=1, deadline_s=1.0) as pool:
        assert pool.score([pair(0)])[0].value == 0.5
