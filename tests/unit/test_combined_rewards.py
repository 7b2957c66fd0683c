"""Rewards for the shape of a response, and sums of rewards."""

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rewards.combined import combined
from megatron_rl.rewards.loading import load_reward
from megatron_rl.rewards.pool import RewardPool, count_failures
from megatron_rl.rewards.shaping import length, repetition
from megatron_rl.types import Prompt, Reward, Rollout

PROMPT = Prompt(index=7, text="?", token_ids=(1,), row={"answer": "42"})


def say(text: str = "", ids: tuple[int, ...] = (1,)) -> Rollout:
    return Rollout(
        prompt_index=7,
        sample_index=0,
        token_ids=ids,
        text=text,
        log_probs=(0.0,) * len(ids),
        log_kept_mass=(0.0,) * len(ids),
        finish_reason="stop",
        policy_version=0,
    )


def test_length_falls_from_free_to_limit() -> None:
    values = [length(PROMPT, say(ids=(5,) * tokens), free=4, limit=8) for tokens in (0, 4, 5, 6, 8, 100)]
    assert [reward.value for reward in values] == [0, 0, -0.25, -0.5, -1, -1]
    assert values[2].parts == {"length": -0.25}


def test_repetition_is_the_share_of_repeated_runs() -> None:
    cases = [(), (1, 2, 3), (1, 2, 3, 4), (1,) * 8, (1, 2, 3, 4, 5, 6), (1, 2) * 4]
    values = [repetition(PROMPT, say(ids=ids)) for ids in cases]
    assert [reward.value for reward in values] == pytest.approx([0, 0, 0, -4 / 5, 0, -3 / 5])
    assert values[3].parts == {"repetition": pytest.approx(-0.8)}
    assert repetition(PROMPT, say(ids=(1, 1, 2)), n=1).value == pytest.approx(-1 / 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("length", {"free": 8, "limit": 8}, "free=8, limit=8: .* 0 <= free < limit"),
        ("length", {"free": -1, "limit": 8}, "free=-1"),
        ("length", {"free": 1}, "missing a required argument: 'limit'"),
        ("length", {"free": 1.0, "limit": 8}, "free=1.0 must be a whole number"),
        ("repetition", {"n": 0}, "n=0: .* set it to 1 or more"),
        ("combined", {}, "missing a required argument: 'rewards'"),
        ("combined", {"rewards": []}, r"rewards=\[\] must be a list"),
        ("combined", {"rewards": "gsm8k"}, "rewards='gsm8k' must be a list"),
        ("combined", {"rewards": ["gsm8k"]}, r"rewards\[0\]='gsm8k' must have the form \{name, weight, options\}"),
        ("combined", {"rewards": [{"weight": 1}]}, r"rewards\[0\]: name=None must be the name"),
        ("combined", {"rewards": [{"name": "gsm8k", "wait": 1}]}, r"rewards\[0\] has the unknown field 'wait'"),
        ("combined", {"rewards": [{"name": "gsm9k"}]}, r"rewards\[0\]: .*did you mean 'gsm8k'"),
        ("combined", {"rewards": [{"name": "exact", "weight": "1"}]}, r"weight='1' must be a finite number"),
        ("combined", {"rewards": [{"name": "exact", "weight": True}]}, r"weight=True must be a finite number"),
        ("combined", {"rewards": [{"name": "exact", "weight": math.nan}]}, r"weight=nan must be a finite number"),
        ("combined", {"rewards": [{"name": "exact", "options": 3}]}, r"options=3 must be a table"),
        ("combined", {"rewards": [{"name": "exact"}, {"name": "exact", "options": {"x": 3}}]}, r"rewards\[1\]: .*'x'"),
        ("combined", {"rewards": [{"name": "length", "options": {"free": 2, "limit": 1}}]}, r"rewards\[0\]: free=2"),
        ("combined", {"rewards": [{"name": "combined", "options": {"rewards": [{"name": "?"}]}}]}, r"'\?' is unknown"),
    ],
)
def test_options_are_checked_before_any_response(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(name, options)


def test_the_sum_and_its_parts() -> None:
    rewards = [
        {"name": "r1_zero_strict"},
        {"name": "gsm8k", "weight": 0.5},
        {"name": "length", "weight": 2, "options": {"free": 0, "limit": 10}},
        {"name": "regex", "weight": 0.25, "options": {"pattern": "so", "format_weight": 1.0}},
        {"name": "regex", "weight": -1, "options": {"pattern": "Wait", "format_weight": 1.0}},
    ]
    reward = combined(PROMPT, say("so </think> <answer>42</answer>", ids=(1, 2)), rewards=rewards)
    assert reward.value == pytest.approx(1.0 + 0.5 - 2 * 0.2 + 0.25)
    assert reward.parts == {
        "r1_zero_strict": 1.0,
        "gsm8k": 1.0,
        "length": pytest.approx(-0.2),
        "regex": 1.0,
        "regex_2": 0.0,
        "accuracy": 1.0,  # of the first that has it
        "format": 1.0,
        "gsm8k/accuracy": 1.0,
        "gsm8k/format": 0.0,
        "regex/format": 1.0,
        "regex_2/format": 0.0,
    }


def test_a_sum_in_a_sum() -> None:
    inner = {"name": "combined", "weight": 0.5, "options": {"rewards": [{"name": "exact", "weight": 3}]}}
    reward = combined(PROMPT, say("42"), rewards=[{"name": "exact"}, inner])
    assert reward.value == 2.5
    assert reward.parts == {"exact": 1.0, "combined": 3.0, "combined/exact": 1.0}


USERS = """
from megatron_rl.types import Reward

def silent(prompt, rollout):
    return Reward(value=float("nan"), reason="no tests: empty", feedback="hm")

def broken(prompt, rollout):
    return {}["key"]

def text(prompt, rollout):
    return "1"

def kind(prompt, rollout, *, word):
    return Reward(value=True, feedback=word, parts={"gsm8k": 3, "length": 4})
"""


@pytest.fixture
def users(tmp_path: Path) -> str:
    (tmp_path / "users.py").write_text(USERS)
    return f"{tmp_path}/users.py"


def test_feedback_is_joined_and_names_do_not_clash(users: str) -> None:
    said = [{"name": f"{users}:kind", "options": {"word": word}} for word in ("one", "two")]
    reward = load_reward("combined", {"rewards": [*said, {"name": "gsm8k"}]})(PROMPT, say("42"))
    assert isinstance(reward, Reward)
    assert (reward.value, reward.feedback) == (3.0, "one\n\ntwo")
    assert (reward.parts["kind"], reward.parts["gsm8k"], reward.parts["kind/gsm8k"]) == (1.0, 1.0, 3.0)
    assert (reward.parts["length"], reward.parts["kind_2/length"]) == (4.0, 4.0)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("silent", "error: reward 'silent': no tests: empty"),
        ("broken", "error: ValueError: reward 'broken': KeyError: 'key'"),
        ("text", "error: reward 'text': wrong type: str"),
    ],
)
def test_one_failure_fails_the_sum_and_is_named(users: str, function: str, reason: str) -> None:
    options = {"rewards": [{"name": "exact"}, {"name": f"{users}:{function}"}]}
    with RewardPool("combined", options, workers=1, deadline_s=5.0) as pool:
        (reward,) = pool.score([(PROMPT, say("42"))])
    assert (reward.reason, reward.parts) == (reason, {})
    assert count_failures([reward]) == {"error": 1}
