"""Which answers of a rollout batch are worth learning."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from megatron_rl.config.expert import ExpertConfig, Keep
from megatron_rl.trainers.evaluate import is_correct
from megatron_rl.types import RolloutGroup

T = TypeVar("T")


class Kept(NamedTuple):
    """Places in the rollout batch, groups one after the other, in order; and how many copies were left out."""

    places: list[int]
    duplicates: int


def kept_answers(groups: Sequence[RolloutGroup], options: ExpertConfig) -> Kept:
    """Judged, finished answers of at least `min_tokens`, the same one to a prompt once, and of these

        correct   all that are
        top       of each group the `top_k` with the largest rewards, the earlier one where two are equal; none with
                  the lowest reward of its group, unless it is correct

    So a group whose answers are all wrong, and none better than another, gives nothing under either.
    """
    places: list[int] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    start = duplicates = 0
    for group in groups:
        candidates = []
        for number in _worth_learning(group, options):
            key = group.prompt.index, group.rollouts[number].token_ids
            if options.deduplicate and key in seen:
                duplicates += 1
            else:
                seen.add(key)
                candidates.append(number)
        if options.keep is Keep.top:
            best = sorted(candidates, key=lambda number: (-group.rewards[number].value, number))
            candidates = sorted(best[: options.top_k])
        places += [start + number for number in candidates]
        start += len(group.rollouts)
    return Kept(places, duplicates)


def _worth_learning(group: RolloutGroup, options: ExpertConfig) -> list[int]:
    """The answers of one group that may be kept, copies among them."""
    lowest = min((reward.value for reward in group.rewards if reward.reason is None), default=0.0)
    found = []
    for number, (rollout, reward) in enumerate(zip(group.rollouts, group.rewards, strict=True)):
        better = options.keep is Keep.top and reward.reason is None and reward.value > lowest
        finished = rollout.finish_reason != "length" and len(rollout.token_ids) >= options.min_tokens
        if finished and (better or is_correct(reward)):
            found.append(number)
    return found


def selection_metrics(groups: Sequence[RolloutGroup], kept: Kept) -> dict[str, float]:
    """`expert/*`."""
    group_of = [place for place, group in enumerate(groups) for _ in group.rollouts]
    return {
        "expert/kept": float(len(kept.places)),
        "expert/kept_fraction": len(kept.places) / len(group_of),
        "expert/solved_prompts": len({group_of[place] for place in kept.places}) / len(groups),
        "expert/duplicates": float(kept.duplicates),
    }


def cut(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """At most `parts` consecutive pieces, none of them empty, whose sizes differ by one at most."""
    count = min(parts, len(items))
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]
