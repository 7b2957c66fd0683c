"""Reward for a Python program: the share of the row's tests that it passes in a sandbox, with feedback on what failed.

Importing this is cheap: the sandbox starts when a worker prepares the reward.
"""

import json
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.rewards.asserts import Test, plain, plan
from megatron_rl.rewards.sandbox.client import Outcome, Sandbox
from megatron_rl.types import Prompt, Reward, Rollout

_BLOCK = re.compile(r"^[ \t]*```(?:python|py)[ \t]*\r?\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_DEADLY = "the network, starting a process, or reaching into another one"
_PIECE = 300  # characters of one input, output or value in the feedback


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    time_s: float
    memory_gb: float
    output_mb: float


class Code:
    """The last fenced python block of the response, against `prompt.row[tests_key]`; docs/code_reward.md has the forms.

    The value is the share of tests passed, or 1 for all of them with `all_or_nothing`. Parts: `accuracy` (1 if all
    passed), `passed` (the share), `format` (1 if a block was there). `time_s` is for all tests of a row together.
    """

    def __init__(self) -> None:
        self._sandbox: Sandbox | None = None

    def prepare(self, *, memory_gb: float = 1.0, output_mb: float = 1.0, **options: Any) -> None:
        """Start the sandbox, which tries its walls, before any response is judged."""
        positive = {"memory_gb": memory_gb, "output_mb": output_mb}
        positive |= {name: options[name] for name in ("time_s", "feedback_chars") if name in options}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be greater than 0")
        self._start(memory_gb, output_mb)

    def _start(self, memory_gb: float, output_mb: float) -> Sandbox:
        if self._sandbox is None:
            self._sandbox = Sandbox(memory_gb=memory_gb, output_mb=output_mb)
        return self._sandbox

    def __call__(
        self,
        prompt: Prompt,
        rollout: Rollout,
        *,
        tests_key: str = "tests",
        whole_response: bool = False,
        all_or_nothing: bool = False,
        forgeable: bool = False,
        time_s: float = 5.0,
        memory_gb: float = 1.0,
        output_mb: float = 1.0,
        feedback_chars: int = 1000,
    ) -> Reward:
        tests = _tests(prompt, tests_key)
        program = rollout.text if whole_response else last_block(rollout.text)
        if program is None:
            parts = {"accuracy": 0.0, "passed": 0.0, "format": 0.0}
            return Reward(value=0.0, parts=parts, feedback="The response has no complete ```python block.")
        limits = _Limits(time_s=time_s, memory_gb=memory_gb, output_mb=output_mb)
        run = self._start(memory_gb, output_mb).run
        try:
            if isinstance(tests, str):
                passed, feedback = _by_asserts(run, program, tests, limits, forgeable)
            else:
                passed, feedback = _by_output(run, program, tests, limits)
        except RuntimeError:
            if self._sandbox is not None:
                self._sandbox.close()
            self._sandbox = None  # the next call has a new one
            raise
        share = sum(passed) / len(passed)
        accuracy = float(all(passed))
        return Reward(
            value=accuracy if all_or_nothing else share,
            parts={"accuracy": accuracy, "passed": share, "format": 1.0},
            feedback=None if feedback is None else _cut(feedback, feedback_chars),
        )


def last_block(text: str) -> str | None:
    """The content of the last complete ```python block."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def _tests(prompt: Prompt, key: str) -> str | list[tuple[str, str]]:
    """The row's tests: a script of asserts, or (input, output) pairs. Any form may also stand there as JSON text."""
    if key not in prompt.row:
        fields = ", ".join(map(repr, prompt.row)) or "none"
        raise ValueError(f"tests_key={key!r} is not a field of row {prompt.index}; set it to one of: {fields}")
    tests = prompt.row[key]
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        tests = json.loads(tests)
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= set(tests):
        if len(tests["inputs"]) != len(tests["outputs"]):
            raise ValueError(f"{key} of row {prompt.index} has not as many outputs as inputs; correct the row")
        tests = [{"input": given, "output": wanted} for given, wanted in zip(tests["inputs"], tests["outputs"])]
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    if isinstance(tests, str) and tests.strip():
        return tests
    pairs = tests if isinstance(tests, list) else []
    if pairs and all(isinstance(test, Mapping) and {"input", "output"} <= set(test) for test in pairs):
        return [(str(test["input"]), str(test["output"])) for test in pairs]
    raise ValueError(
        f"{key} of row {prompt.index} has no tests: give a list of assert statements, a script of them, or a list of "
        "{input, output}"
    )


def _by_output(
    run: Callable[..., Outcome], program: str, pairs: list[tuple[str, str]], limits: _Limits
) -> tuple[list[bool], str | None]:
    """Each pair in a run of its own, the output compared here, where the program is not."""
    passed: list[bool] = []
    feedback: str | None = None
    end = time.monotonic() + limits.time_s
    for given, wanted in pairs:
        if (left := end - time.monotonic()) <= 0:
            passed.append(False)
            continue
        outcome = run(program, stdin=given, time_s=left)
        problem = _problem(outcome, 0, limits)
        passed.append(problem is None and _lines(outcome.output) == _lines(wanted))
        if not passed[-1] and feedback is None:
            problem = problem or f"Expected output:\n{_cut(wanted)}\nGot:\n{_cut(outcome.output) or '(nothing)'}"
            feedback = f"{_tried(outcome)}Failed on the input:\n{_cut(given)}\n{problem}"
    if not all(passed) and feedback is None:
        feedback = _time_limit(limits)
    return passed, feedback


def _by_asserts(
    run: Callable[..., Outcome], program: str, script: str, limits: _Limits, forgeable: bool
) -> tuple[list[bool], str | None]:
    """All tests in one run, their values judged here."""
    wanted = plan(script, forgeable=forgeable)
    if not wanted.tests:
        raise ValueError(f"the tests {script[:200]!r} assert nothing; correct the row")
    outcome = run(program, wanted.steps, time_s=limits.time_s)
    broken = None if "error" not in outcome.reports.get(0, {}) else _problem(outcome, 0, limits)
    verdicts = [broken or _verdict(test, outcome, limits) for test in wanted.tests]
    failed = [(test, verdict) for test, verdict in zip(wanted.tests, verdicts) if verdict is not None]
    passed = [verdict is None for verdict in verdicts]
    if not failed:
        return passed, None
    test, verdict = failed[0]
    return passed, _tried(outcome) + (broken or f"Failed: {_cut(test.text)}\n{verdict}")


def _verdict(test: Test, outcome: Outcome, limits: _Limits) -> str | None:
    """Why this test fails; None if it passes."""
    report = outcome.reports.get(test.step)
    if report is None or "error" in report or "exit" in report:
        return _problem(outcome, test.step, limits) or "The program ended before this test."
    if test.holds is None:
        return None
    try:
        value = plain(report["value"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return "The program's value is no plain data."
    try:
        if test.holds(value) is True:
            return None
    except (TypeError, ValueError, OverflowError):
        return f"Expected: {_cut(test.expected)}\nGot: {_cut(repr(value))}, which does not compare"
    return f"Expected: {_cut(test.expected)}\nGot: {_cut(_shown(value))}"


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # a whole number of more than 4300 digits
        return "a very large number"


def _problem(outcome: Outcome, step: int, limits: _Limits) -> str | None:
    """What went wrong up to this step, other than its value: a limit, a wall, an error."""
    report = outcome.reports.get(step, {})
    if outcome.late or outcome.code in (-signal.SIGXCPU,):
        return None if report and "error" not in report else _time_limit(limits)
    if "error" in report:
        return _named_error(report, limits)
    if "exit" in report and step:
        return "The program exited."
    if outcome.code < 0 and not report:
        if outcome.code == -signal.SIGSYS:
            return f"The program was stopped at a system call that is not allowed: {_DEADLY}."
        return f"The program crashed with {signal.Signals(-outcome.code).name}."
    return None


def _tried(outcome: Outcome) -> str:
    """What the program tried and may not, also where it caught the error."""
    return "".join(f"Tried: {_cut(note)}. That is not allowed.\n" for note in outcome.notes[:2])


def _named_error(report: Mapping[str, Any], limits: _Limits) -> str:
    text = str(report["error"])[-700:]
    if report.get("type") == "MemoryError":
        return f"The memory limit of {limits.memory_gb:g} GiB was reached.\n{text}"
    if report.get("errno") == 27:  # EFBIG, by RLIMIT_FSIZE
        return f"The output limit of {limits.output_mb:g} MiB was reached.\n{text}"
    return text


def _time_limit(limits: _Limits) -> str:
    return f"The time limit of {limits.time_s:g} s was reached."


def _lines(text: str) -> list[str]:
    """Lines without the spaces at their ends, and without empty lines at the end of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _cut(text: str, most: int = _PIECE) -> str:
    text = text.rstrip()
    return text if len(text) <= most else f"{text[: max(0, most - 4)]} ..."


code = Code()
