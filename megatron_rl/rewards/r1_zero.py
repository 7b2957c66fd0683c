"""Rewards for a response `... </think> <answer>...</answer>`: as published, and without its loopholes."""

import re

from megatron_rl.rewards.boxed import last_box, unboxed
from megatron_rl.rewards.exact import true_answers
from megatron_rl.rewards.expression import are_equal
from megatron_rl.rewards.grader import is_equal
from megatron_rl.rewards.math_verify import library, verifies
from megatron_rl.types import Prompt, Reward, Rollout

_TAG = re.compile(r"</?(?:think|answer)>")
_STRICT = re.compile(
    r"(?:\s*<think>)?(?P<thought>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*",
    re.DOTALL,
)
_BOX_ALONE = re.compile(r"\s*\$?\s*(?P<box>\\boxed\{.*\})\s*\$?\.?\s*", re.DOTALL)


class R1Zero:
    """The published reward with its flaws, to reproduce numbers: 1 if the answer is right and the form was found.

    The form is the texts `</think> <answer>` and `</answer>`, anywhere. The answer is what follows the last
    `<answer>`, every `</answer>` taken out. With `fast=False` an answer that math-verify finds equal is right, too.
    """

    def prepare(self, *, fast: bool = True, **options: object) -> None:
        """Import what is needed before a deadline counts."""
        are_equal("x/2+x", "1.5*x")
        if not fast:
            library()

    def __call__(self, prompt: Prompt, rollout: Rollout, *, answer_key: str = "answer", fast: bool = True) -> Reward:
        truths = true_answers(prompt, answer_key)
        block = self._answer_block(rollout.text)
        answer = None if block is None else self._answer(block)
        correct = answer is not None and any(_is_right(answer, unboxed(truth), fast) for truth in truths)
        return Reward(value=float(correct), parts={"accuracy": float(correct), "format": float(block is not None)})

    def _answer_block(self, text: str) -> str | None:
        """What stands in the answer block; None where the form is not kept."""
        if "</think> <answer>" not in text or "</answer>" not in text:
            return None
        return text.rpartition("<answer>")[2].replace("</answer>", "")

    def _answer(self, block: str) -> str | None:
        """The answer in the block; None for a box that is not closed."""
        return last_box(block) if "\\boxed" in block else block


class R1ZeroStrict(R1Zero):
    """1 if the response is one think block and one answer block, in order, and the answer is right.

    The `<think>` may be left to the prompt. Around the answer block only whitespace is allowed, and in the blocks no
    other tag of the four. A box in the answer must be all of it.
    """

    def _answer_block(self, text: str) -> str | None:
        tags = [tag for tag in _TAG.findall(text) if tag != "<think>"]
        match = _STRICT.fullmatch(text)
        if tags != ["</think>", "<answer>", "</answer>"] or match is None:
            return None
        if "<think>" in match["thought"] or "<think>" in match["answer"]:
            return None
        return match["answer"]

    def _answer(self, block: str) -> str | None:
        if "\\boxed" not in block:
            return block
        box, alone = last_box(block), _BOX_ALONE.fullmatch(block)
        return box if alone and box is not None and alone["box"] == f"\\boxed{{{box}}}" else None


def _is_right(answer: str, truth: str, fast: bool) -> bool:
    return is_equal(answer, truth) or (not fast and verifies(f"${answer}$" if "$" not in answer else answer, truth))


r1_zero = R1Zero()
r1_zero_strict = R1ZeroStrict()
