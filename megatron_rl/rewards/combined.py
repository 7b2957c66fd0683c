"""A weighted sum of rewards."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_rl.types import Prompt, Reward, Rollout


class Entry(NamedTuple):
    """One reward of the sum; `label` is its key among the parts."""

    label: str
    weight: float
    judge: Callable[..., object]


class Combined:
    """The sum of `weight * value` over `rewards`, a list of `{name, weight, options}`; the weight is 1 if left out.

    Parts: the value of each reward under its label, which is its name (of the user's own, the function's), the second
    time `name_2`; and each reward's parts under their names, where a name is taken as `label/part`. Feedback is
    joined. If one reward fails, so does the sum.
    """

    def __init__(self) -> None:
        self._ready: dict[str, list[Entry]] = {}

    def prepare(self, *, rewards: Sequence[Mapping[str, Any]]) -> None:
        """Resolve and prepare each reward; refuse what is unknown."""
        self._entries(rewards)

    def __call__(self, prompt: Prompt, rollout: Rollout, *, rewards: Sequence[Mapping[str, Any]]) -> Reward:
        entries = self._entries(rewards)
        judged: list[Reward] = []
        for entry in entries:
            reward = _judge(entry, prompt, rollout)
            if reward.reason is not None:
                return Reward(value=math.nan, reason=f"error: reward {entry.label!r}: {reward.reason}")
            judged.append(reward)
        feedback = [reward.feedback for reward in judged if reward.feedback]
        return Reward(
            value=sum(entry.weight * reward.value for entry, reward in zip(entries, judged, strict=True)),
            parts=_merge(entries, judged),
            feedback="\n\n".join(feedback) or None,
        )

    def _entries(self, rewards: Sequence[Mapping[str, Any]]) -> list[Entry]:
        key = repr(rewards)
        if key not in self._ready:
            self._ready[key] = _load(rewards)
        return self._ready[key]


def _load(rewards: Sequence[Mapping[str, Any]]) -> list[Entry]:
    from megatron_rl.rewards.loading import load_reward  # late: it looks names up in the table that this is listed in

    if not isinstance(rewards, list | tuple) or not rewards:
        raise ValueError(f"rewards={rewards!r} must be a list of {{name, weight, options}}, with one at least")
    entries: list[Entry] = []
    labels: list[str] = []
    for place, item in enumerate(rewards):
        name, weight, options = _checked(place, item)
        base = name.rpartition(":")[2]
        labels.append(base)
        count = labels.count(base)
        label = base if count == 1 else f"{base}_{count}"
        try:
            entries.append(Entry(label, weight, load_reward(name, options)))
        except ValueError as error:
            raise ValueError(f"rewards[{place}]: {error}") from error
    return entries


def _checked(place: int, item: object) -> tuple[str, float, dict[str, Any]]:
    where = f"rewards[{place}]"
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}={item!r} must have the form {{name, weight, options}}")
    if unknown := [key for key in item if key not in ("name", "weight", "options")]:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; it takes name, weight and options")
    name, weight, options = item.get("name"), item.get("weight", 1.0), item.get("options") or {}
    if not isinstance(name, str):
        raise ValueError(f"{where}: name={name!r} must be the name of a reward")
    if type(weight) not in (int, float) or not math.isfinite(weight):
        raise ValueError(f"{where}: weight={weight!r} must be a finite number; correct it")
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"{where}: options={options!r} must be a table of the reward's options")
    return name, float(weight), dict(options)


def _judge(entry: Entry, prompt: Prompt, rollout: Rollout) -> Reward:
    from megatron_rl.rewards.loading import as_reward  # late, as above

    try:
        return as_reward(entry.judge(prompt, rollout))
    except Exception as error:
        raise ValueError(f"reward {entry.label!r}: {type(error).__name__}: {error}") from error


def _merge(entries: list[Entry], judged: list[Reward]) -> dict[str, float]:
    parts = {entry.label: reward.value for entry, reward in zip(entries, judged, strict=True)}
    for entry, reward in zip(entries, judged, strict=True):
        for name, value in reward.parts.items():
            if name != entry.label:  # a shaping reward's only part is its value
                parts[f"{entry.label}/{name}" if name in parts else name] = value
    return parts


combined = Combined()
