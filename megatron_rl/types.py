"""The records that pass from room to room: plain data, no torch.

A `Prompt` is asked, a `Rollout` is one sampled answer to it, a `Reward` says what that answer is worth, and a
`RolloutGroup` keeps all answers to one prompt together, because advantages are relative to the group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


class RunError(RuntimeError):
    """A run that was sound cannot go on. The message says why in one line, the same on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question.

    `index` is the row's place in its source; it never changes, and keys the random numbers of sampling.
    `row` holds the source's fields (the expected answer among them), for the reward to read.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A prompt and what follows it. `learned[t]` says whether token t is to be learned; a user's words are not."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    learned: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response.

    `token_ids` are what the engine drew, the end-of-sequence token included if it was drawn; they are never
    re-tokenised. `log_probs[t]` is the natural log-probability of token t under the distribution it was drawn from
    (after temperature, top-k and top-p). `log_kept_mass[t]` is the log of the probability that top-k/top-p kept, so
    that `log_probs[t] + log_kept_mass[t]` is the log-probability under the whole softmax; it is 0 without truncation.
    `policy_version` counts the weight updates the engine had received. Where weights came while it was drawn,
    `later_versions` has (first token, version) of each that followed.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    text: str
    log_probs: tuple[float, ...]
    log_kept_mass: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    later_versions: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What a response is worth.

    `value` is finite, or NaN when the response could not be judged: then `reason` names why ("timeout", "error", ...)
    and the sample is left out of the group's statistics. `parts` are named components for the logs. `feedback` is
    optional text from the environment.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    feedback: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All responses to one prompt, and (once scored) a reward for each."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: tuple[Reward, ...] = ()
