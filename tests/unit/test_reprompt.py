"""What the teacher is shown: whose solution, which feedback, in which words, and what happens where it is too long."""

import math
from collections import Counter
from typing import Any

import pytest

from megatron_rl.data.reprompt import (
    Evidence,
    RepromptOptions,
    evidence,
    teacher_context,
    teacher_contexts,
    teacher_prompt,
)
from megatron_rl.types import Prompt, Reward, Rollout, RolloutGroup

ANSWERS = ["<think>a\nb</think>\n one", "wrong", "<think>open two", "<think>x</think><think>y</think> three long"]


def group(
    values: list[float], answers: list[str] = ANSWERS, feedback: list[str | None] | None = None, index: int = 0
) -> RolloutGroup:
    """Scored answers; as many tokens as characters."""
    rollouts = tuple(
        Rollout(
            prompt_index=index,
            sample_index=number,
            token_ids=tuple(range(len(text))),
            text=text,
            log_probs=(0.0,) * len(text),
            log_kept_mass=(0.0,) * len(text),
            finish_reason="stop",
            policy_version=0,
        )
        for number, text in enumerate(answers[: len(values)])
    )
    notes = feedback or [None] * len(values)
    rewards = tuple(Reward(value=value, feedback=note) for value, note in zip(values, notes))
    return RolloutGroup(prompt=Prompt(index=index, text="Q", token_ids=(1,)), rollouts=rollouts, rewards=rewards)


def letters(value: Any) -> tuple[int, ...]:
    """A token for each character, and a generation prompt."""
    text = value if isinstance(value, str) else "".join(f"<{m['role']}>{m['content']}" for m in value)
    return tuple(map(ord, text + "@"))


def read(ids: tuple[int, ...]) -> str:
    return "".join(map(chr, ids))


def test_first_success_of_the_others() -> None:
    found = evidence(group([1, 0, 1, 1]), RepromptOptions())
    assert [item.solution_of for item in found] == [2, 0, 0, 0]
    assert [item.solution for item in found] == ["<think>open two", "one", "one", "one"]
    own = evidence(group([1, 0, 0, 0]), RepromptOptions(exclude_self=False))
    assert [item.solution_of for item in own] == [0, 0, 0, 0]


def test_the_only_success_has_no_solution() -> None:
    found = evidence(group([0, 0, 1, 0]), RepromptOptions())
    assert [bool(item) for item in found] == [True, True, False, True]


def test_thresholds_and_unjudged_answers() -> None:
    values = [0.99, 0.5, math.nan, 1.0]
    assert [i.solution_of for i in evidence(group(values), RepromptOptions())] == [3, 3, 3, None]
    half = evidence(group(values), RepromptOptions(success_threshold=0.5))
    assert [i.solution_of for i in half] == [1, 0, 0, 0]


def test_thinking() -> None:
    kept = evidence(group([0, 0, 0, 1]), RepromptOptions(remove_thinking=False))
    assert kept[0].solution == ANSWERS[3]
    assert evidence(group([0, 0, 0, 1]), RepromptOptions())[0].solution == "three long"


def test_an_answer_of_thoughts_only_is_no_solution() -> None:
    answers = ["<think>all of it</think> ", "so: 4", "?"]
    assert [i.solution_of for i in evidence(group([1, 1, 0], answers), RepromptOptions())] == [1, None, 1]


def test_shortest() -> None:
    found = evidence(group([1, 1, 1, 1]), RepromptOptions(choice="shortest"))
    assert [i.solution_of for i in found] == [1, 2, 1, 1]


def test_random_choice_is_keyed_and_even() -> None:
    options = RepromptOptions(choice="random")
    picks: Counter[int | None] = Counter()
    for step in range(300):
        found = evidence(group([1, 0, 1, 1]), options, seed=3, step=step)
        assert found == evidence(group([1, 0, 1, 1]), options, seed=3, step=step)
        assert found[0].solution_of in (2, 3) and found[2].solution_of in (0, 3)
        picks[found[1].solution_of] += 1
    assert set(picks) == {0, 2, 3} and min(picks.values()) > 70

    def drawn(seed: int, index: int) -> list[int | None]:
        item = group([1, 0, 1, 1], index=index)
        return [evidence(item, options, seed=seed, step=s)[1].solution_of for s in range(20)]

    assert len({tuple(drawn(*key)) for key in ((0, 0), (1, 0), (0, 1))}) == 3


def test_feedback() -> None:
    notes = ["e0", "e1 {x}", "  ", None]
    shown = {
        mode: [item.feedback for item in evidence(group([1, 0, 0, 0], feedback=notes), RepromptOptions(feedback=mode))]
        for mode in ("never", "without_solution", "always")
    }  # type: ignore[arg-type]
    assert shown["never"] == [None] * 4
    assert shown["without_solution"] == ["e0", None, None, None]
    assert shown["always"] == ["e0", "e1 {x}", None, None]


def test_words_and_newlines() -> None:
    both = Evidence(solution="s {0}", feedback="f {prompt}")
    assert teacher_prompt("Q {solution}", both, RepromptOptions()) == (
        "Q {solution}\nCorrect solution:\n\ns {0}\n\n"
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\nf {prompt}\n\n"
        "\n\nCorrectly solve the original question.\n"
    )
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    options = RepromptOptions(
        reprompt_template="{prompt}|{solution}{feedback}", solution_template="{{}}{successful_previous_attempt}"
    )
    found = teacher_prompt(messages, Evidence(solution="s"), options)
    assert found == [messages[0], {"role": "user", "content": "Q|{}s"}] and messages[1]["content"] == "Q"
    with pytest.raises(ValueError, match="must be the user's, it is the tool's"):
        teacher_prompt([{"role": "tool", "content": "x"}], both, options)


@pytest.mark.parametrize(
    ("field", "template", "message"),
    [
        ("reprompt_template", "{prompt}{solution}", "lacks {feedback}"),
        ("solution_template", "{solution}", "KeyError"),
        ("feedback_template", "{", "double the other braces"),
    ],
)
def test_bad_templates(field: str, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{field}.*{message}"):
        RepromptOptions(**{field: template})  # type: ignore[arg-type]


def test_overlong_contexts_lose_their_middle() -> None:
    """And neither the question, nor the closing words, nor the generation prompt."""
    shown = Evidence(solution="a" * 500 + "MIDDLE" + "z" * 500, feedback="short")
    whole = letters(teacher_prompt("Q?", shown, RepromptOptions()))
    for most in (len(whole) - 1, 400, 200):
        found = teacher_context("Q?", shown, letters, RepromptOptions(max_tokens=most))
        assert found is not None and found.shortened and most - 2 < len(found.token_ids) <= most
        text = read(found.token_ids)
        assert text.startswith("Q?\nCorrect solution:\n\naaa") and text.endswith("original question.\n@")
        assert "a\n[...]\nz" in text and "\n\nshort\n\n" in text
    fits = teacher_context("Q?", shown, letters, RepromptOptions(max_tokens=len(whole)))
    assert fits is not None and not fits.shortened and fits.token_ids == whole


def test_both_texts_are_shortened_alike() -> None:
    shown = Evidence(solution="s" * 300, feedback="f" * 300)
    found = teacher_context("Q?", shown, letters, RepromptOptions(max_tokens=400))
    assert found is not None
    count = Counter(read(found.token_ids))
    assert 50 < count["s"] < 300 and abs(count["s"] - count["f"]) < 10


def test_what_cannot_fit_has_no_context_or_is_refused() -> None:
    shown = Evidence(solution="s" * 300)
    assert teacher_context("Q?", shown, letters, RepromptOptions(max_tokens=60)) is None
    assert teacher_context("Q?", Evidence(), letters, RepromptOptions()) is None
    with pytest.raises(ValueError, match=r"has \d+ tokens, more than max_tokens=60"):
        teacher_context("Q?", shown, letters, RepromptOptions(max_tokens=60, overlong="error"))


def test_counts() -> None:
    groups = [group([1, 0, 0], ["s" * 300, "", ""], ["e", None, "e"]), group([0, 0, 0], index=1)]
    contexts, metrics = teacher_contexts(
        groups, ["A", "B" * 500], letters, RepromptOptions(max_tokens=250), seed=0, step=0
    )
    assert [[c is not None for c in row] for row in contexts] == [[True, True, True], [False, False, False]]
    assert contexts[0][1] is not None and contexts[0][1].evidence.solution_of == 0
    found = {name.removeprefix("self_distillation/"): figure.result() for name, figure in metrics.items()}
    assert found == {
        "success_group_fraction": 0.5,
        "success_sample_fraction": pytest.approx(2 / 6),
        "feedback_available_fraction": pytest.approx(2 / 6),
        "feedback_used_fraction": pytest.approx(1 / 6),
        "reprompt_sample_fraction": 0.5,
        "shortened_contexts": 2,
        "dropped_contexts": 0,
    }
    _, metrics = teacher_contexts(groups[:1], ["B" * 500], letters, RepromptOptions(max_tokens=250), seed=0, step=0)
    assert metrics["self_distillation/dropped_contexts"].result() == 3
