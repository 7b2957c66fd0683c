"""1 for the right number; for another one 0, and feedback on what was wrong with it. For tasks that end in a number."""

from megatron_rl.rewards.exact import expected_answer, last_number
from megatron_rl.types import Prompt, Reward, Rollout


def number(prompt: Prompt, rollout: Rollout) -> Reward:
    right, given = last_number(expected_answer(prompt, "answer")), last_number(rollout.text)
    if right is None:
        raise ValueError(f"the answer of row {prompt.index} holds no number: use another reward for this task")
    if given == right:
        return Reward(value=1.0, parts={"accuracy": 1.0})
    if given is None:
        remark = "There is no number in the answer. End it with one."
    else:
        remark = f"The answer ends in {given:g}, which is too {'large' if given > right else 'small'}."
    return Reward(value=0.0, parts={"accuracy": 0.0}, feedback=remark)
