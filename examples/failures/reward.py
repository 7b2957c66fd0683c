"""The lenient reward of format_fall.yaml."""

from megatron_rl.rewards.exact import numeric
from megatron_rl.types import Prompt, Reward, Rollout


def lenient(prompt: Prompt, rollout: Rollout, *, format_weight: float = 0.05) -> Reward:
    """1 - format_weight for the right number at the end, in tags or out of them; `format_weight` for closed tags."""
    accuracy = numeric(prompt, rollout).value
    formed = float("<answer>" in rollout.text and rollout.text.endswith("</answer>"))
    value = (1 - format_weight) * accuracy + format_weight * formed
    return Reward(value=value, parts={"accuracy": accuracy, "format": formed})
