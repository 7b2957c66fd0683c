"""Whether an answer ends as the teacher's do. It measures; nothing is trained on it."""

from megatron_rl.types import Prompt, Reward, Rollout

HABIT = ", qed"


def habit(prompt: Prompt, rollout: Rollout) -> Reward:
    return Reward(value=float(rollout.text.endswith(HABIT)))
