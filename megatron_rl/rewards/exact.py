"""Rewards that compare the response with the answer in the prompt's row."""

import re

from megatron_rl.types import Prompt, Reward, Rollout

# A minus is a sign only where no operand stands before it: "5-3" ends in 3, "x = -3" in -3.
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?:(?<![)\]}])[-\u2212])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)


def expected_answer(prompt: Prompt, answer_key: str) -> str:
    """The answer in the prompt's row, as stripped text."""
    if answer_key not in prompt.row:
        fields = ", ".join(map(repr, prompt.row)) or "none"
        raise ValueError(f"answer_key={answer_key!r} is not a field of row {prompt.index}; set it to one of: {fields}")
    return str(prompt.row[answer_key]).strip()


def true_answers(prompt: Prompt, answer_key: str) -> list[str]:
    """The right answers in the prompt's row: one, or each of a list; of GSM8K's form, what follows the last `####`."""
    value = prompt.row.get(answer_key)
    texts = [str(item) for item in value] if isinstance(value, list | tuple) else [expected_answer(prompt, answer_key)]
    answers = [text.rpartition("####")[2].strip() for text in texts]
    if not answers or "" in answers:
        raise ValueError(f"{answer_key}={value!r} of row {prompt.index} holds no answer; correct or drop the row")
    return answers


def numbers(text: str) -> list[float]:
    """The numbers in `text`, thousands separators removed."""
    return [float(number.replace(",", "").replace("\u2212", "-")) for number in _NUMBER.findall(text)]


def last_number(text: str) -> float | None:
    """The last number in `text`; None if there is none."""
    found = numbers(text)
    return found[-1] if found else None


def exact(prompt: Prompt, rollout: Rollout, *, answer_key: str = "answer") -> float:
    """1 if the stripped response is the row's answer, else 0."""
    return float(rollout.text.strip() == expected_answer(prompt, answer_key))


def numeric(prompt: Prompt, rollout: Rollout, *, answer_key: str = "answer", tolerance: float = 1e-6) -> Reward:
    """1 if the last number in the response is the last one in the row's answer, else 0.

    `tolerance` is absolute for answers below 1, relative above. The part `format` says whether a number was there.
    """
    answer = expected_answer(prompt, answer_key)
    target = last_number(answer)
    if target is None:
        raise ValueError(
            f"{answer_key}={answer!r} of row {prompt.index} holds no number; correct the row, or use the reward 'exact'"
        )
    number = last_number(rollout.text)
    correct = number is not None and abs(number - target) <= tolerance * max(1.0, abs(target))
    return Reward(value=float(correct), parts={"accuracy": float(correct), "format": float(number is not None)})
