"""Answers in a LaTeX box."""

import re

from megatron_rl.rewards.exact import true_answers
from megatron_rl.rewards.expression import are_equal
from megatron_rl.rewards.grader import is_equal
from megatron_rl.types import Prompt, Reward, Rollout

_BRACE = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)


def boxes(text: str) -> list[tuple[int, int]]:
    r"""Where the contents of complete `\boxed{...}` begin and end, in the order of their beginnings.

    Braces are balanced; escaped ones do not count. One pass, however deep the nesting.
    """
    open_braces: list[tuple[int, bool]] = []
    found = []
    for match in _BRACE.finditer(text):
        if match[0] in ("{", "\\boxed{"):
            open_braces.append((match.end(), match[0] != "{"))
        elif match[0] == "}" and open_braces:
            begin, is_box = open_braces.pop()
            if is_box:
                found.append((begin, match.start()))
    return sorted(found)


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{`, the innermost of nested ones; None where it is not closed."""
    opening = text.rfind("\\boxed{")
    spans = boxes(text)
    if not spans or spans[-1][0] != opening + len("\\boxed{"):
        return None
    return text[slice(*spans[-1])]


def unboxed(truth: str) -> str:
    """A right answer without the box that a dataset may have left around it."""
    return (last_box(truth) or truth) if "\\boxed" in truth else truth


class Boxed:
    r"""1 if the last complete `\boxed{...}` of the response holds the row's answer, else 0.

    With `only`, several boxes must agree: different ones are hedging, and not right.
    """

    def prepare(self, **options: object) -> None:
        """Import sympy before a deadline counts."""
        are_equal("x/2+x", "1.5*x")

    def __call__(self, prompt: Prompt, rollout: Rollout, *, answer_key: str = "answer", only: bool = True) -> Reward:
        truths = true_answers(prompt, answer_key)
        spans = boxes(rollout.text)
        if not spans:
            return Reward(value=0.0, parts={"accuracy": 0.0, "format": 0.0})
        answer = rollout.text[slice(*spans[-1])]
        correct = any(is_equal(answer, unboxed(truth)) for truth in truths)
        if correct and only:
            correct = all(is_equal(other, answer) for other in _outermost(rollout.text, spans))
        return Reward(value=float(correct), parts={"accuracy": float(correct), "format": 1.0})


def _outermost(text: str, spans: list[tuple[int, int]]) -> set[str]:
    """The different contents of the boxes that stand in no other box; a box in a box is that one."""
    contents, end = set(), -1
    for begin, stop in spans:
        if begin > end:
            contents.add(unboxed(text[begin:stop]))
            end = stop
    return contents


boxed = Boxed()
