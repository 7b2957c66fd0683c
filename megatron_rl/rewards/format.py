"""Reward for the form of a response, and for the answer found in it."""

import re

from megatron_rl.rewards.exact import expected_answer
from megatron_rl.types import Prompt, Reward, Rollout


class Regex:
    """Does `pattern` occur in the response, and is its group `answer` the row's answer?

    The first match counts, and `.` matches newlines too; anchor the pattern with `^` and `$` to judge all of the text.
    The value is the weighted sum of the parts `format` and `accuracy`; without the group there is only `format`.
    """

    def prepare(self, *, pattern: str, **options: object) -> None:
        """Refuse a broken pattern before any response is judged."""
        try:
            re.compile(pattern, re.DOTALL)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern={pattern!r} is not a regular expression ({error}); correct it") from error

    def __call__(
        self,
        prompt: Prompt,
        rollout: Rollout,
        *,
        pattern: str,
        answer_key: str = "answer",
        format_weight: float = 0.1,
        accuracy_weight: float = 0.9,
    ) -> Reward:
        compiled = re.compile(pattern, re.DOTALL)  # `re` keeps a cache
        match = compiled.search(rollout.text)
        parts = {"format": float(match is not None)}
        if "answer" in compiled.groupindex:
            answer = expected_answer(prompt, answer_key)
            found = match["answer"] if match else None  # None too where an optional group took no part in the match
            parts["accuracy"] = float(found is not None and found.strip() == answer)
        value = format_weight * parts["format"] + accuracy_weight * parts.get("accuracy", 0.0)
        return Reward(value=value, parts=parts)


regex = Regex()
