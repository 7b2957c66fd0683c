"""The verdict of the library math-verify, which reads LaTeX and plain expressions out of free text."""

from functools import cache
from types import ModuleType
from typing import Any

from megatron_rl.rewards.exact import true_answers
from megatron_rl.types import Prompt, Reward, Rollout


@cache
def library() -> ModuleType:
    """math-verify. It says at every start that its alarm is off, which is as wanted: the pool has the deadline."""
    import logging  # late, as a worker starts the sooner for it

    try:
        import math_verify
    except ImportError as error:
        raise ImportError(
            f"this reward needs the package math-verify ({error}): pip install 'megatron_rl[tasks]'"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def extract(text: str) -> list[Any]:
    """What math-verify finds in `text`: expressions, then their source; empty where there is none."""
    return library().parse(text, parsing_timeout=None)


def verifies(answer: str, truth: str) -> bool:
    """Does math-verify find `truth`, as a formula, in `answer`?"""
    return agree(extract(answer), truth)


def agree(found: list[Any], truth: str) -> bool:
    """Is what was extracted the same as `truth`, as a formula?"""
    wanted = extract(truth if "$" in truth or "\\boxed" in truth else f"${truth}$")
    return bool(library().verify(wanted, found, timeout_seconds=None))


class MathVerify:
    """1 if math-verify finds the row's answer in the response, else 0. `format` says whether it found any answer."""

    def prepare(self, **options: object) -> None:
        """Import the library, and let it compile its expressions, before a deadline counts."""
        verifies("$1$", "1")

    def __call__(self, prompt: Prompt, rollout: Rollout, *, answer_key: str = "answer") -> Reward:
        truths = true_answers(prompt, answer_key)
        found = extract(rollout.text)
        correct = any(agree(found, truth) for truth in truths)
        return Reward(value=float(correct), parts={"accuracy": float(correct), "format": float(bool(found))})


math_verify = MathVerify()
