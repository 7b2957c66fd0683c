"""Reward of a reasoning-gym task: the task's own verifier judges the answer."""

from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from megatron_rl.types import Prompt, Reward, Rollout

# In reasoning-gym 0.1.25 the verifiers of these call eval() or sympy's parse_expr() on the answer or on the row.
EVALUATING_TASKS = frozenset(
    (
        "binary_matrix",
        "bitwise_arithmetic",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "number_sorting",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    )
)


class Reasoning:
    """Score the answer with the verifier of the task that made the row.

    Such a row has the task's name in `dataset` and the task's whole record in `entry`.
    The answer is the text of the last `<tag>...</tag>`; with `tag=None` it is the whole response. `evaluate=True`
    admits the verifiers that run answers and rows as Python.
    """

    def prepare(self, **options: object) -> None:
        """Import reasoning-gym (about a second) before the deadline of a call counts."""
        _gym()

    def __call__(
        self, prompt: Prompt, rollout: Rollout, *, tag: str | None = "answer", evaluate: bool = False
    ) -> Reward:
        task, entry = prompt.row.get("dataset"), prompt.row.get("entry")
        if task is None or not isinstance(entry, Mapping):
            raise ValueError(
                f"row {prompt.index} has dataset={task!r} and entry={entry!r}; the reward needs the rows of "
                "a source 'reasoning-gym:<task>', with the task's name in `dataset` and its record in `entry`"
            )
        check_task(task, evaluate=evaluate)
        score = _scorer(task)
        answer = rollout.text.strip() if tag is None else _gym().utils.extract_answer(rollout.text, tag)
        if answer is None:
            return Reward(value=0.0, parts={"accuracy": 0.0, "format": 0.0})
        accuracy = float(score(answer, dict(entry)))
        return Reward(value=accuracy, parts={"accuracy": accuracy, "format": 1.0})


def check_task(task: object, *, evaluate: bool) -> None:
    """Refuses a task whose verifier runs text, unless that was asked for."""
    if task in EVALUATING_TASKS and not evaluate:
        raise ValueError(
            f"the verifier of {task!r} evaluates answers and rows as Python code, with the rights of this process: "
            "choose another task, or set reward.options.evaluate=true where model and data are trusted or confined"
        )


def _gym() -> ModuleType:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"the reward 'reasoning' needs the package reasoning-gym ({error}): pip install megatron_rl[tasks]"
        ) from error
    return reasoning_gym


@cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    return _gym().get_score_answer_fn(task)


reasoning = Reasoning()
