"""Rewards for the shape of a response, from 0 down to -1, to be combined with one for its content."""

from megatron_rl.types import Prompt, Reward, Rollout


class Length:
    """0 for up to `free` tokens, then falling in a straight line to -1 at `limit` tokens and beyond."""

    def prepare(self, *, free: int, limit: int) -> None:
        """Refuse a slope that falls nowhere."""
        if not 0 <= free < limit:
            raise ValueError(f"free={free}, limit={limit}: the reward 'length' needs 0 <= free < limit; correct them")

    def __call__(self, prompt: Prompt, rollout: Rollout, *, free: int, limit: int) -> Reward:
        value = -min(1.0, max(0.0, (len(rollout.token_ids) - free) / (limit - free)))
        return Reward(value=value, parts={"length": value})


class Repetition:
    """Minus the share of the n-grams of token ids that occurred before: `distinct / total - 1`, 0 for a short text."""

    def prepare(self, *, n: int = 4) -> None:
        """Refuse a length that no n-gram has."""
        if n < 1:
            raise ValueError(f"n={n}: the reward 'repetition' counts runs of n tokens; set it to 1 or more")

    def __call__(self, prompt: Prompt, rollout: Rollout, *, n: int = 4) -> Reward:
        ids = rollout.token_ids
        total = len(ids) - n + 1
        value = len({ids[start : start + n] for start in range(total)}) / total - 1.0 if total > 0 else 0.0
        return Reward(value=value, parts={"repetition": value})


length = Length()
repetition = Repetition()
