"""A reward under attack: each sample has the name of its failure, the others their reward, and nothing is left."""

import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
from test_reward_pool import marked, pair

from megatron_rl.rewards import pool
from megatron_rl.rewards.pool import RewardPool

DEADLINE = 2.0

# A bounded bomb: 2**depth processes at most, each in a session of its own, which a kill of the group would miss.
MODULE = """
import ctypes, os, subprocess, sys, time
from pathlib import Path

def bomb(depth):
    for left in reversed(range(depth)):
        if os.fork() == 0:
            os.setsid()
            bomb(left)
    time.sleep(600)

def judge(prompt, rollout):
    deed, _, argument = rollout.text.partition(" ")
    if deed == "loop":
        while True:
            pass
    if deed == "sympy":
        import sympy
        sympy.sympify("9**9**9")
    if deed == "forks":
        bomb(int(argument))
    if deed == "allocate":
        return len(bytes(10 << 30))  # zeros that the kernel makes when they are read: nothing is eaten without a limit
    if deed == "child":
        code = "x = bytes(10 << 30)"
        return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode
    if deed == "segfault":
        ctypes.string_at(0)
    if deed == "score":
        return float(Path("/proc/self/oom_score_adj").read_text())
    if deed == "own":
        return float(Path(f"/proc/{os.getpid()}/stat").read_text().split()[0] == str(os.getpid()))
    return 2.0 * prompt.index
"""

# What a kernel without namespaces for us gives.
PLAIN = "from megatron_rl.rewards import warden, worker; warden._unshare = lambda: False; worker.main()"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("user") / "attacked.py"
    path.write_text(MODULE)
    return f"{path}:judge"


@pytest.fixture
def marker(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of every process that this test starts."""
    name = uuid4().hex
    monkeypatch.setenv("MARKER", name)
    return name


def test_six_attacks_among_ten_thousand_calls(judge: str, marker: str) -> None:
    attacks = {
        1000: ("sympy", {"timeout"}),
        1001: ("loop", {"timeout"}),
        3000: ("forks 9", {"crashed: more than 256 processes"}),
        5000: ("allocate", {"memory"}),
        7000: ("segfault", {"crashed: signal 11"}),
        9999: ("allocate", {"memory"}),
    }
    start = time.monotonic()
    with RewardPool(judge, workers=2, deadline_s=DEADLINE, memory_gb=0.5) as workers:
        if len(marked(marker)) == 4:
            attacks[3000] = ("forks 7", {"timeout"})  # no namespaces here: the deadline ends the bomb
        rewards = workers.score([pair(index, attacks.get(index, ("", None))[0]) for index in range(10_000)])
        assert len(marked(marker)) <= 6, "more than two workers with their wardens"
    assert marked(marker) == set()
    assert time.monotonic() - start < 20.0 + len(attacks) * DEADLINE
    for index, reward in enumerate(rewards):
        if index in attacks:
            assert reward.reason in attacks[index][1]
            assert reward.value != reward.value
        else:
            assert (reward.value, reward.reason) == (2.0 * index, None)


def test_a_sympy_bomb_that_was_lit(tmp_path: Path) -> None:
    """Sympy is loaded before the deadline counts: what takes too long is the expression."""
    path = tmp_path / "algebra.py"
    path.write_text("import sympy\ndef f(prompt, rollout): return float(sympy.sympify(rollout.text))\n")
    with RewardPool(f"{path}:f", workers=1, deadline_s=1.0, memory_gb=1.0) as workers:
        rewards = workers.score([pair(0, "2**3"), pair(1, "9**9**9"), pair(2, "factorial(4)")])
    assert [reward.reason for reward in rewards] == [None, "timeout", None]
    assert [rewards[0].value, rewards[2].value] == [8.0, 24.0]


def test_without_namespaces_nothing_is_left_either(judge: str, marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_COMMAND", [sys.executable, "-c", PLAIN])
    with RewardPool(judge, workers=2, deadline_s=1.0) as workers:
        rewards = workers.score([pair(1), pair(2, "forks 5"), pair(3, "segfault"), pair(4)])
        assert len(marked(marker)) <= 4, "more than two workers with their wardens"
    assert marked(marker) == set()
    assert [reward.reason for reward in rewards] == [None, "timeout", "crashed: signal 11", None]
    assert [rewards[0].value, rewards[3].value] == [2.0, 8.0]


def test_a_reward_that_asks_for_less_than_the_limit_has_it(judge: str) -> None:
    with RewardPool(judge, workers=1, deadline_s=DEADLINE, memory_gb=None) as workers:
        assert workers.score([pair(0, "allocate")])[0].value == 10 << 30


def test_the_limit_holds_in_a_rewards_children_too(judge: str) -> None:
    with RewardPool(judge, workers=1, deadline_s=10.0, memory_gb=1.0) as workers:
        child, score, own = workers.score([pair(0, "child"), pair(1, "score"), pair(2, "own")])
    assert child.value == 1.0, "the exit code of Python after a MemoryError"
    assert score.value == 1000.0, "the kernel takes the reward before the trainer"
    assert own.value == 1.0, "/proc is that of the worker's namespace"


@pytest.mark.parametrize("gigabytes", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(gigabytes: float) -> None:
    with pytest.raises(ValueError, match="memory_gb="):
        RewardPool("exact", workers=1, deadline_s=1.0, memory_gb=gigabytes)
