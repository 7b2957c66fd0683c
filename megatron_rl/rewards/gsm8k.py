"""Reward in GSM8K's form: a line `#### 72` ends the response."""

import math
import re

from megatron_rl.rewards.exact import last_number, numbers, true_answers
from megatron_rl.types import Prompt, Reward, Rollout

_FORM = re.compile(r"####([^\n]*)")


def gsm8k(prompt: Prompt, rollout: Rollout, *, answer_key: str = "answer", require_form: bool = False) -> Reward:
    """1 if the number of the response is the row's, else 0.

    Lines of the form `#### 72` come first; their numbers must agree, for several are hedging. Without such a line the
    last number counts, or, with `require_form`, none. Currency, units and thousands separators do not matter. The part
    `format` says whether there was such a line.
    """
    truths = [last_number(truth) for truth in true_answers(prompt, answer_key)]
    if None in truths:
        raise ValueError(
            f"{answer_key}={prompt.row[answer_key]!r} of row {prompt.index} ends in no number; correct the row, or use "
            "the reward 'exact'"
        )
    stated = [number for line in _FORM.findall(rollout.text) for number in numbers(line)]
    if stated:
        number = stated[-1] if len(set(stated)) == 1 else None
    else:
        number = None if require_form else last_number(rollout.text)
    correct = number is not None and math.isfinite(number) and number in truths
    return Reward(value=float(correct), parts={"accuracy": float(correct), "format": float(bool(stated))})
