"""Which answers an expert iteration keeps, and how they are cut into updates."""

import math

import pytest

from megatron_rl.config.expert import ExpertConfig, Keep
from megatron_rl.data.sources import permutation
from megatron_rl.trainers.selection import Kept, cut, kept_answers, selection_metrics
from megatron_rl.types import Prompt, Reward, Rollout, RolloutGroup

Answer = tuple[str, float]  # one letter a token, and the reward; "..." at the end: cut off at the limit


def group(index: int, *answers: Answer, part: bool = False) -> RolloutGroup:
    """With `part` the reward is the part "accuracy" of a whole that is worth nothing."""
    rollouts, rewards = [], []
    for place, (text, reward) in enumerate(answers):
        ids = tuple(ord(letter) for letter in text.removesuffix("..."))
        rollouts.append(
            Rollout(
                prompt_index=index,
                sample_index=place,
                token_ids=ids,
                text=text,
                log_probs=(-1.0,) * len(ids),
                log_kept_mass=(0.0,) * len(ids),
                finish_reason="length" if text.endswith("...") else "stop",
                policy_version=0,
            )
        )
        reason = "timeout" if math.isnan(reward) else None
        parts = {"accuracy": reward} if part else {}
        rewards.append(Reward(value=0.5 if part else reward, parts=parts, reason=reason))
    prompt = Prompt(index=index, text="", token_ids=(1,))
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts), rewards=tuple(rewards))


GROUPS = [
    group(0, ("right.", 1), ("wrong.", 0), ("right.", 1), ("right too.", 1)),
    group(1, ("wrong.", 0), ("wrong.", 0), ("worse.", 0), ("never...", 0)),
    group(2, ("ok.", 1), ("right...", 1), ("right.", math.nan), ("right.", 1)),
    group(0, ("right.", 1), ("new.", 1), ("wrong.", 0), ("wrong.", 0)),
]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # What is short, cut off or not judged is left out; so are copies, in another group of the prompt too.
        (ExpertConfig(), Kept([0, 3, 11, 13], 2)),
        (ExpertConfig(deduplicate=False), Kept([0, 2, 3, 11, 12, 13], 0)),
        (ExpertConfig(min_tokens=1), Kept([0, 3, 8, 11, 13], 2)),
        (ExpertConfig(min_tokens=7), Kept([3], 0)),
        # One of each prompt: copies have gone before, so that the last group still gives one.
        (ExpertConfig(keep=Keep.top, top_k=1), Kept([0, 11, 13], 2)),
        (ExpertConfig(keep=Keep.top, top_k=4), Kept([0, 3, 11, 13], 2)),
    ],
)
def test_right_answers_are_kept_once(options: ExpertConfig, expected: Kept) -> None:
    assert kept_answers(GROUPS, options) == expected


def test_the_best_answers_of_a_group() -> None:
    """By reward, then by order; never a failure or the lowest reward, so that equal wrong answers give nothing."""
    graded = group(0, ("aaaa", 0.25), ("bbbb", 0.5), ("cccc", math.nan), ("dddd", 0.5), ("eeee", 0.75), ("ffff", 0.5))
    for k, expected in ((1, [4]), (2, [1, 4]), (3, [1, 3, 4]), (6, [1, 3, 4, 5])):
        assert kept_answers([graded], ExpertConfig(keep=Keep.top, top_k=k)).places == expected
    equal = group(0, ("aaaa", 0.5), ("bbbb", 0.5))
    assert kept_answers([equal], ExpertConfig(keep=Keep.top, top_k=2)).places == []
    right = group(0, ("aaaa", 1.0), ("bbbb", 1.0))
    assert kept_answers([right], ExpertConfig(keep=Keep.top, top_k=1)).places == [0]
    assert kept_answers([group(0, ("aaaa", math.nan))], ExpertConfig(keep=Keep.top, top_k=1)).places == []


def test_the_part_accuracy_says_what_is_right() -> None:
    assert kept_answers([group(0, ("aaaa", 1), ("bbbb", 0), part=True)], ExpertConfig()).places == [0]


def test_figures() -> None:
    assert selection_metrics(GROUPS, kept_answers(GROUPS, ExpertConfig())) == {
        "expert/kept": 4,
        "expert/kept_fraction": 4 / 16,
        "expert/solved_prompts": 3 / 4,
        "expert/duplicates": 2,
    }
    nothing = selection_metrics(GROUPS[1:2], kept_answers(GROUPS[1:2], ExpertConfig()))
    assert list(nothing.values()) == [0, 0, 0, 0]


def test_cut_into_nearly_equal_parts() -> None:
    for count in range(12):
        for parts in range(1, 6):
            pieces = cut(range(count), parts)
            assert [item for piece in pieces for item in piece] == list(range(count))
            assert len(pieces) == min(parts, count) and all(pieces)
            assert not pieces or max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_the_order_of_an_epoch_is_its_own() -> None:
    orders = [permutation(20, seed, step, epoch) for seed in (1, 2) for step in (1, 2) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert permutation(20, 1, 2, 0) == orders[2]
