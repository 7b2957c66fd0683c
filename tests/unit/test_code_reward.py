"""Programs that a model wrote: judged by tests they cannot forge, behind walls they cannot climb."""

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_reward_pool import pair

from megatron_rl.rewards.asserts import plan
from megatron_rl.rewards.code import Code, last_block
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.sandbox import walls
from megatron_rl.rewards.sandbox.client import Sandbox
from megatron_rl.types import Reward

DOUBLE = "def f(x):\n    return 2 * x"


@pytest.fixture(scope="module")
def code() -> Iterator[Code]:
    """One sandbox, which lives through all attacks of this module."""
    reward = Code()
    reward.prepare(memory_gb=0.25)
    assert reward._sandbox is not None
    jail = reward._sandbox._jail
    yield reward
    assert reward._sandbox._jail is jail and jail.poll() is None
    reward._sandbox.close()


def judge(code: Code, program: str, tests: Any, **options: Any) -> Reward:
    prompt, rollout = pair(0, f"My program:\n```python\n{program}\n```\n")
    return code(replace(prompt, row={"tests": tests}), rollout, **({"memory_gb": 0.25} | options))


def feedback(code: Code, program: str, tests: Any = ({"input": "", "output": "42"},), **options: Any) -> str:
    """What is said of a program that passes nothing."""
    reward = judge(code, program, list(tests) if isinstance(tests, tuple) else tests, **options)
    assert (reward.value, reward.parts["accuracy"]) == (0.0, 0.0)
    assert reward.feedback is not None and len(reward.feedback) <= 1000
    assert str(Path.home()) not in reward.feedback and "megatron_rl" not in reward.feedback
    return reward.feedback


def test_a_program_that_passes_all_has_no_feedback(code: Code) -> None:
    tests = ["assert f(2) == 4", "import math\nassert math.isclose(f(0.1), 0.2)", "assert not f(0)", "assert f(1)"]
    assert judge(code, DOUBLE, tests) == Reward(value=1.0, parts={"accuracy": 1.0, "passed": 1.0, "format": 1.0})
    pairs = {"inputs": ["3\n", "4"], "outputs": ["6", "8\n"]}
    assert judge(code, "print(2 * int(input()))  \nprint()", pairs).value == 1.0


def test_the_share_of_tests_counts_and_the_first_failure_is_told(code: Code) -> None:
    tests = ["assert f(2) == 4", "assert f(3) == 7", "assert 9 == f(4)", "assert abs(f(0.5) - 1.0) < 1e-6"]
    reward = judge(code, DOUBLE, tests)
    assert reward.value == 0.5
    assert reward.parts == {"accuracy": 0.0, "passed": 0.5, "format": 1.0}
    assert reward.feedback == "Failed: assert f(3) == 7\nExpected: 7\nGot: 6"
    assert judge(code, DOUBLE, tests, all_or_nothing=True).value == 0.0
    reward = judge(code, "print(int(input()) + 2)", [{"input": "2", "output": "4"}, {"input": "3", "output": "6"}])
    assert (reward.value, reward.feedback) == (0.5, "Failed on the input:\n3\nExpected output:\n6\nGot:\n5")


def test_the_last_block_is_the_program(code: Code) -> None:
    assert last_block("```python\na\n```\n```py\nb\n```\n```\nc\n```\n```python\nopen") == "b\n"
    prompt, rollout = pair(0, "I would print 42.")
    reward = code(replace(prompt, row={"tests": ["assert f(2) == 4"]}), rollout)
    assert reward.parts == {"accuracy": 0.0, "passed": 0.0, "format": 0.0}
    assert reward.feedback == "The response has no complete ```python block."
    _, whole = pair(0, DOUBLE)
    assert code(replace(prompt, row={"tests": ["assert f(2) == 4"]}), whole, whole_response=True).value == 1.0


def test_errors_are_told_with_the_programs_own_lines(code: Code) -> None:
    told = feedback(code, "def f(x):\n    return 1 / 0", ["assert f(2) == 4"])
    assert told.startswith("Failed: assert f(2) == 4\n") and told.endswith("ZeroDivisionError: division by zero")
    assert 'File "<program>", line 2, in f\n    return 1 / 0' in told
    told = feedback(code, "def f(x:\n    return", ["assert f(2) == 4"])
    assert 'File "<program>", line 1' in told and "SyntaxError" in told
    assert "ModuleNotFoundError: No module named 'numpy'" in feedback(code, "import numpy")


@pytest.mark.parametrize(
    ("program", "told"),
    [
        # Through Python: the program is told what is not allowed.
        ("open('/etc/passwd').read()", "opening '/etc/passwd' is not allowed"),
        ("import os\nos.listdir('/')", "opening '/' is not allowed"),
        ("open('/proc/self/mem', 'r+b')", "writing '/proc/self/mem' is not allowed"),
        ("import os\nopen(f'/proc/{os.getppid()}/environ')", "/environ' is not allowed"),
        ("open('here.txt', 'w')", "writing 'here.txt' is not allowed"),
        ("import os\nos.remove('/etc/hostname')", "changing files (os.remove) is not allowed"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 1))", "the network is not allowed"),
        ("import subprocess\nsubprocess.run(['true'])", "starting a process is not allowed"),
        ("import os\nos.system('true')", "starting a process is not allowed"),
        ("import os\nos.fork()", "starting a process is not allowed"),
        ("try:\n    open('/etc/shadow')\nexcept OSError:\n    pass", "Tried: opening '/etc/shadow'."),
        # Around Python: the kernel stops it, and its parent sees that.
        ("import ctypes\nctypes.CDLL(None).fork()", "a system call that is not allowed"),
        ("import ctypes\nctypes.CDLL(None).socket(2, 1, 0)", "a system call that is not allowed"),
        ("import ctypes\nctypes.CDLL(None).execv(b'/bin/true', (ctypes.c_char_p * 2)(b'true'))", "a system call"),
        ("import ctypes\nctypes.CDLL(None).ptrace(0, 0, 0, 0)", "a system call that is not allowed"),
        ("import os\nos.kill(os.getppid(), 9)", "a system call that is not allowed"),
        ("import ctypes\nctypes.string_at(0)", "The program crashed with SIGSEGV."),
        # Limits.
        ("x = bytes(10 << 30)", "The memory limit of 0.25 GiB was reached."),
        ("x = []\nwhile True: x.append(bytes(8 << 20))", "The memory limit of 0.25 GiB was reached."),
        ("while True: print('x' * 100_000)", "The output limit of 1 MiB was reached."),
        (
            "import ctypes\nctypes.CDLL(None).setrlimit(9, (ctypes.c_ulong * 2)(-1, -1))\nx = bytes(1 << 30)",
            "The memory",
        ),
    ],
)
def test_attempts_are_stopped_and_told(code: Code, program: str, told: str) -> None:
    assert told in feedback(code, program)


def test_what_goes_around_python_gets_nothing(code: Code) -> None:
    """The kernel's answers to libc, where no hook of Python is asked: the program prints them."""
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for call in (
    lambda: libc.open(b"/etc/passwd", os.O_RDONLY),
    lambda: libc.open(b"/proc/self/mem", os.O_RDWR),
    lambda: libc.open(b"/dev/null", os.O_RDWR),
    lambda: libc.open(os.__file__.encode(), os.O_RDWR),
    lambda: libc.open(b"/tmp/written", os.O_CREAT | os.O_WRONLY, 0o600),
    lambda: libc.mkdir(b"/tmp/made", 0o700),
    lambda: libc.prctl(1, 0, 0, 0, 0),
    lambda: libc.memfd_create(b"x", 0),
):
    print(call(), ctypes.get_errno())
"""
    denied = ["-1 13"] * 5 + ["-1 1"] * 3  # EACCES of Landlock, EPERM of seccomp
    assert judge(code, program, [{"input": "", "output": "\n".join(denied)}]).feedback is None
    assert not Path("/tmp/written").exists() and not Path("/tmp/made").exists()


def test_time_is_limited(code: Code) -> None:
    start = time.monotonic()
    loop = "def f(x):\n    while True: pass"
    assert feedback(code, loop, ["assert f(1) == 1"], time_s=0.3).endswith("The time limit of 0.3 s was reached.")
    pairs = ({"input": "a", "output": "b"}, {"input": "c", "output": "d"})
    told = feedback(code, "import time\ntime.sleep(60)", pairs, time_s=0.3)
    assert told == "Failed on the input:\na\nThe time limit of 0.3 s was reached."
    assert time.monotonic() - start < 5.0


def test_tests_before_the_limit_count(code: Code) -> None:
    program = "def f(x):\n    while x > 2: pass\n    return 2 * x"
    assert judge(code, program, ["assert f(1) == 2", "assert f(2) == 4", "assert f(3) == 6"], time_s=0.5).parts == {
        "accuracy": 0.0,
        "passed": pytest.approx(2 / 3),
        "format": 1.0,
    }


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "class All:\n    def __eq__(self, other): return True\n    __lt__ = __gt__ = __eq__\ndef f(x): return All()",
        "class All(int):\n    def __eq__(self, other): return True\ndef f(x): return All()",
        "class Near(float):\n    __sub__ = lambda s, o: 0.0\n    __abs__ = lambda s: 0.0\ndef f(x): return Near(7)",
        "import builtins, math\nbuiltins.abs = lambda x: 0\nmath.isclose = lambda *a, **k: True\ndef f(x): return 7",
        "import builtins\nbuiltins.AssertionError = None\ndef f(x): raise SystemExit(0)",
        "import os\nfor n in range(1, 5): os.write(3, b'{\"step\": %d}\\n' % n)\nos._exit(0)",
        'import os\nfor n in range(1, 5): os.write(3, b\'{"step": %d, "value": true}\\n\' % n)\nos._exit(0)',
        'import os\nfor n in range(1, 5): os.write(3, b\'{"step": %d, "value": ["x", "4", 1]}\\n\' % n)\nos._exit(0)',
        "import os\nos.write(3, b'{' * 100_000 + b'\\xff\\n[1, 2]\\n\"passed\"\\n')\nprint('passed')\nos._exit(0)",
        'import json\njson.dumps = lambda *a, **k: \'{"step": 1, "value": true}\'\ndef f(x): return 0',
    ],
)
def test_a_verdict_cannot_be_forged(code: Code, program: str) -> None:
    tests = ["assert f(2) == 4", "assert abs(f(0.25) - 0.5) < 1e-6", "import math\nassert math.isclose(f(3), 6)"]
    assert feedback(code, program, tests)


def test_neither_expected_values_nor_outputs_come_into_the_sandbox(code: Code) -> None:
    """The program searches all of its process for an answer that only the row holds."""
    answer = "SECRET"
    program = """
import gc, sys
needle = "".join(reversed("TERCES"))
def f(x):
    frame, found = sys._getframe(), []
    while frame is not None:
        found += [v for v in frame.f_locals.values() if needle in repr(v)[:100_000] and v is not needle]
        frame = frame.f_back
    found += [o for o in gc.get_objects() if isinstance(o, (list, dict, tuple)) and 0 < len(o) < 50
              and any(type(v) is str and needle in v and v is not needle
                      for v in (o.values() if type(o) is dict else o))]
    return [v for v in found if v is not found][:3] and needle
"""
    told = feedback(code, program, [f"assert f(2) == {answer!r}"])
    assert "Got: []" in told


def test_tests_that_run_beside_the_program_are_refused_unless_allowed(code: Code) -> None:
    for test in (
        "assert isinstance(f(1), int)",
        "assert f(1) == f(1)",
        "assert abs(f(1) * 1 - 2) < 1e-6",
        "assert isclose(f(1), 2) == True",
        "assert f(1) == 2 and f(2) == 4",
        "check(f)",
        "for x in (1, 2):\n    assert f(x) == 2 * x",
    ):
        with pytest.raises(ValueError, match=r"reward\.options\.forgeable=true"):
            plan(test, forgeable=False)
    script = "def check(g):\n    assert g(1) == 2\ncheck(f)\nassert isinstance(f(1), int)"
    assert judge(code, DOUBLE, script, forgeable=True).parts["accuracy"] == 1.0
    told = feedback(code, "def f(x):\n    return 'no'", script, forgeable=True)
    assert told.startswith("Failed: check(f)") and told.endswith("AssertionError")
    assert feedback(code, "import os\nos._exit(0)", script, forgeable=True).endswith(
        "The program ended before this test."
    )


@pytest.mark.parametrize(
    ("test", "good", "bad"),
    [
        ("assert set(f()) == set([1, 2])", "[2, 1, 1]", "[1]"),
        ("assert f() == {'a': [1, (2.5, None)], 3: {4}, b'x': 1j}", "{'a': [1, (2.5, None)], 3: {4}, b'x': 1j}", "{}"),
        ("assert f() is None", "None", "0"),
        ("assert f() is True", "True", "1"),
        ("assert f() != 3", "4", "3"),
        ("assert 3 in f()", "[3]", "[4]"),
        ("assert f() < 10", "9", "10"),
        ("assert f().upper()[0] == 'A'", "'ab'", "'b'"),
        ("assert f() == 10 ** 2 or True", "", ""),
    ],
)
def test_forms_of_asserts(code: Code, test: str, good: str, bad: str) -> None:
    if not good:
        with pytest.raises(ValueError, match="could forge"):
            plan(test, forgeable=False)
        return
    assert judge(code, f"def f(): return {good}", [test]).feedback is None
    assert "Got: " in feedback(code, f"def f(): return {bad}", [test])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"other": 1}, "tests_key='tests' is not a field of row 0; set it to one of: 'other'"),
        ({"tests": []}, "has no tests"),
        ({"tests": [{"input": "1"}]}, "has no tests"),
        ({"tests": "x = 1"}, "assert nothing"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "not as many outputs"),
    ],
)
def test_rows_that_cannot_be_judged_are_errors(code: Code, row: dict[str, Any], message: str) -> None:
    prompt, rollout = pair(0, f"```python\n{DOUBLE}\n```")
    with pytest.raises(ValueError, match=message):
        code(replace(prompt, row=row), rollout)


def test_feedback_is_bounded(code: Code) -> None:
    told = feedback(code, "print('x' * 5000)", ({"input": "y" * 5000, "output": "z" * 5000},))
    assert len(told) < 1000 and "y ..." in told and "z ..." in told and "x ..." in told
    assert len(feedback(code, "print(1)", feedback_chars=40)) <= 40


def test_without_a_wall_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(walls.WallError, match="a list of system calls for riscv64"):
        walls._filter("riscv64", 1)
    for machine in walls._MACHINES:
        assert len(walls._filter(machine, 1)) // 8 < 4096, "more than the kernel takes"
    real = subprocess.Popen

    def without_landlock(command: list[str], **options: Any) -> Any:
        blind = "import megatron_rl.rewards.sandbox.walls as w; w._CREATE_RULESET = 9999; main()"
        return real([part.replace("\nmain()", f"\n{blind}") for part in command], **options)

    monkeypatch.setattr(subprocess, "Popen", without_landlock)
    with pytest.raises(ValueError, match="lacks a wall, so nothing was run: no Landlock"):
        Sandbox()


def test_in_the_pool_a_killed_worker_takes_the_sandbox_with_it() -> None:
    prompt, rollout = pair(0, "```python\nwhile True: pass\n```")
    hanging = (replace(prompt, row={"tests": ["assert f(2) == 4"]}), rollout)
    good = (hanging[0], replace(rollout, text=f"```python\n{DOUBLE}\n```"))
    before = jails()
    with RewardPool("code", {"time_s": 60.0}, workers=2, deadline_s=3.0, memory_gb=2.0) as workers:
        rewards = workers.score([good, hanging, good, good])
    assert [reward.reason for reward in rewards] == [None, "timeout", None, None]
    assert [reward.value for reward in rewards if reward.reason is None] == [1.0, 1.0, 1.0]
    assert jails() <= before
    with pytest.raises(ValueError, match=r"lower it, or raise reward\.memory_gb"):
        RewardPool("code", {"memory_gb": 3.0}, workers=1, deadline_s=1.0, memory_gb=2.0)


def jails() -> set[int]:
    """Processes that run the jail, whoever started them."""
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if b"megatron_rl.rewards.sandbox.jail" in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.add(int(entry))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return found
