"""What SDPO's teacher is shown: the question again, with a solution of a sibling and what the environment said.

The contexts are those of SDPO (Hübotter et al., arXiv 2601.20802). A sample has two sources: the answers to the same
prompt that succeeded, its own left out, and the feedback that its reward came with. A sample that has neither has no
teacher, and no loss. The response itself is not part of a context: the teacher reads its tokens as they were drawn.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_rl.metrics.types import Mean, Metrics, Sum
from megatron_rl.types import RolloutGroup

Choice = Literal["first", "random", "shortest"]
Feedback = Literal["never", "without_solution", "always"]
Overlong = Literal["shrink", "error"]
TokenIds = tuple[int, ...]

_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_CUT = "\n[...]\n"
_PLACEHOLDERS = {
    "reprompt_template": ("prompt", "solution", "feedback"),
    "solution_template": ("successful_previous_attempt",),
    "feedback_template": ("feedback_raw",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RepromptOptions:
    """How contexts are made.

    An answer is a success from `success_threshold` on. Of several, `choice` takes the first in the group, one at
    random, or the one of the fewest tokens. `exclude_self` keeps a sample from being shown its own answer.
    `remove_thinking` deletes <think>...</think> from solutions; one that is not closed stays. The environment's
    feedback is shown never, where there is no solution, or always.

    Newlines of the templates count. A prompt of more than `max_tokens` has its solution and feedback shortened in their
    middle (`shrink`), or is refused (`error`); what else it holds is never cut.
    """

    success_threshold: float = 1.0
    choice: Choice = "first"
    exclude_self: bool = True
    remove_thinking: bool = True
    feedback: Feedback = "without_solution"
    reprompt_template: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    solution_template: str = "\nCorrect solution:\n\n{successful_previous_attempt}\n\n"
    feedback_template: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}\n\n"
    max_tokens: int = 10240
    overlong: Overlong = "shrink"

    def __post_init__(self) -> None:
        for name, placeholders in _PLACEHOLDERS.items():
            template = getattr(self, name)
            try:
                found = template.format(**{placeholder: f"<{placeholder}>" for placeholder in placeholders})
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(f"{name} is no template, {error!r}: {template!r}; double the other braces") from error
            missing = [f"{{{placeholder}}}" for placeholder in placeholders if f"<{placeholder}>" not in found]
            if missing:
                raise ValueError(f"{name} lacks {', '.join(missing)}: {template!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the teacher of one sample is shown beside the question."""

    solution: str | None = None
    solution_of: int | None = None  # whose answer it is: a place in the group
    feedback: str | None = None
    has_feedback: bool = False  # also where it is not shown

    def __bool__(self) -> bool:
        return self.solution is not None or self.feedback is not None


def succeeds(group: RolloutGroup, options: RepromptOptions) -> list[bool]:
    """Of each answer of a scored group; one that could not be judged has no success."""
    return [reward.value >= options.success_threshold for reward in group.rewards]


def evidence(group: RolloutGroup, options: RepromptOptions, *, seed: int = 0, step: int = 0) -> list[Evidence]:
    """For each answer of a scored group. A random choice is keyed by (seed, step, prompt, sample) alone."""
    texts = [solution_text(rollout.text, options) for rollout in group.rollouts]
    usable = [place for place, success in enumerate(succeeds(group, options)) if success and texts[place].strip()]
    found = []
    for place, (rollout, reward) in enumerate(zip(group.rollouts, group.rewards, strict=True)):
        candidates = [other for other in usable if other != place or not options.exclude_self]
        chosen = None
        if candidates and options.choice == "random":
            generator = np.random.default_rng([seed, step, rollout.prompt_index, rollout.sample_index])
            chosen = candidates[generator.integers(len(candidates))]
        elif candidates and options.choice == "shortest":
            chosen = min(candidates, key=lambda other: len(group.rollouts[other].token_ids))
        elif candidates:
            chosen = candidates[0]
        feedback = reward.feedback if options.feedback != "never" and (reward.feedback or "").strip() else None
        shown = feedback if options.feedback == "always" or chosen is None else None
        solution = None if chosen is None else texts[chosen]
        found.append(Evidence(solution=solution, solution_of=chosen, feedback=shown, has_feedback=feedback is not None))
    return found


def solution_text(text: str, options: RepromptOptions) -> str:
    return _THINKING.sub("", text) if options.remove_thinking else text


def teacher_prompt(value: Any, shown: Evidence, options: RepromptOptions, most: int | None = None) -> Any:
    """The prompt, a string or a list of messages, with the evidence in its last turn.

    `most` is how many characters of the solution, and of the feedback, are kept; None for all. Values may hold braces.
    """
    assert shown, "a sample without evidence has no teacher"
    solution = feedback = ""
    if shown.solution is not None:
        text = _shortened(shown.solution, most)
        solution = options.solution_template.format(successful_previous_attempt=text)
    if shown.feedback is not None:
        feedback = options.feedback_template.format(feedback_raw=_shortened(shown.feedback, most))
    if isinstance(value, str):
        return options.reprompt_template.format(prompt=value, solution=solution, feedback=feedback)
    last: Mapping[str, Any] = value[-1]
    if last["role"] != "user":
        raise ValueError(
            f"the last message of a prompt must be the user's, it is the {last['role']}'s: SDPO adds to it"
        )
    content = options.reprompt_template.format(prompt=last["content"], solution=solution, feedback=feedback)
    return [*value[:-1], {**last, "content": content}]


def _shortened(text: str, most: int | None) -> str:
    """The head and the tail of a text that has more than `most` characters."""
    if most is None or len(text) <= most:
        return text
    return text[: most - most // 2] + _CUT + text[len(text) - most // 2 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherContext:
    """The token ids of a teacher's prompt, ready for the response."""

    token_ids: TokenIds
    evidence: Evidence
    shortened: bool


def teacher_context(
    value: Any, shown: Evidence, encode: Callable[[Any], TokenIds], options: RepromptOptions
) -> TeacherContext | None:
    """The context of one sample; None if it has no evidence, or fits with none of the evidence's text.

    `encode` makes token ids of a prompt, chat template and generation prompt included. As many characters of solution
    and feedback are kept as fit, the same number of both.
    """
    if not shown:
        return None
    ids = encode(teacher_prompt(value, shown, options))
    if len(ids) <= options.max_tokens:
        return TeacherContext(token_ids=ids, evidence=shown, shortened=False)
    if options.overlong == "error":
        raise ValueError(
            f"a teacher's prompt has {len(ids)} tokens, more than max_tokens={options.max_tokens}: raise max_tokens, "
            "or set overlong to shrink, which shortens the solution and the feedback"
        )
    best: TokenIds | None = None
    low, high = 1, max(len(shown.solution or ""), len(shown.feedback or "")) - 1
    while low <= high:
        most = (low + high) // 2
        ids = encode(teacher_prompt(value, shown, options, most))
        if len(ids) <= options.max_tokens:
            best, low = ids, most + 1
        else:
            high = most - 1
    return None if best is None else TeacherContext(token_ids=best, evidence=shown, shortened=True)


def teacher_contexts(
    groups: Sequence[RolloutGroup],
    values: Sequence[Any],
    encode: Callable[[Any], TokenIds],
    options: RepromptOptions,
    *,
    seed: int,
    step: int,
) -> tuple[list[list[TeacherContext | None]], Metrics]:
    """The context of every answer of scored groups, and what was chosen. `values` are the groups' prompts."""
    shown = [evidence(group, options, seed=seed, step=step) for group in groups]
    contexts = [
        [teacher_context(value, item, encode, options) for item in items] for value, items in zip(values, shown)
    ]
    return contexts, context_metrics(groups, shown, contexts, options)


def context_metrics(
    groups: Sequence[RolloutGroup],
    shown: Sequence[Sequence[Evidence]],
    contexts: Sequence[Sequence[TeacherContext | None]],
    options: RepromptOptions,
) -> Metrics:
    """Counts and fractions of what the teacher is shown, before any loss mask."""
    items = [item for group in shown for item in group]
    made = [context for group in contexts for context in group]
    groups_with_success = sum(any(succeeds(group, options)) for group in groups)

    def fraction(flags: list[bool]) -> Mean:
        return Mean(float(sum(flags)), len(items))

    prefix = "self_distillation"
    return {
        f"{prefix}/success_group_fraction": Mean(float(groups_with_success), len(groups)),
        f"{prefix}/success_sample_fraction": fraction([item.solution is not None for item in items]),
        f"{prefix}/feedback_available_fraction": fraction([item.has_feedback for item in items]),
        f"{prefix}/feedback_used_fraction": fraction([item.feedback is not None for item in items]),
        f"{prefix}/reprompt_sample_fraction": fraction([context is not None for context in made]),
        f"{prefix}/shortened_contexts": Sum(float(sum(context is not None and context.shortened for context in made))),
        f"{prefix}/dropped_contexts": Sum(float(sum(bool(i) and c is None for i, c in zip(items, made)))),
    }
