"""What the mathematics rewards pay, and what each known way to be paid for nothing is paid."""

import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.rewards import REWARDS
from megatron_rl.rewards.boxed import boxes, last_box
from megatron_rl.rewards.grader import is_equal
from megatron_rl.rewards.loading import as_reward
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.types import Prompt, Rollout

JUDGES = ("r1_zero", "r1_zero_strict", "boxed", "gsm8k", "math_verify")
TAGGED = "so </think> <answer>{}</answer>"


def ask(answer: object) -> Prompt:
    return Prompt(index=7, text="?", token_ids=(1,), row={"answer": answer})


def say(text: str) -> Rollout:
    return Rollout(
        prompt_index=7,
        sample_index=0,
        token_ids=(1,),
        text=text,
        log_probs=(0.0,),
        log_kept_mass=(0.0,),
        finish_reason="stop",
        policy_version=0,
    )


def paid(name: str, text: str, answer: object = "42", **options: Any) -> tuple[float, float]:
    """(accuracy, format); the value is the accuracy."""
    if name == "math_verify":
        pytest.importorskip("math_verify", reason="needs the extra megatron_rl[tasks]")
    reward = as_reward(REWARDS[name](ask(answer), say(text), **options))
    assert reward.value == reward.parts["accuracy"]
    return reward.parts["accuracy"], reward.parts["format"]


RIGHT, WRONG, NO_FORM = (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)

# What the published reward was seen to do with the answer 42, and what the strict one does.
PUBLISHED = [
    ("a plain answer", "so </think> <answer>42</answer>", RIGHT, RIGHT),
    ("the tag before the text", "<think>so</think> <answer>42</answer>", RIGHT, RIGHT),
    ("tags in the wrong order", "</answer> </think> <answer>42", RIGHT, NO_FORM),
    ("two think blocks", "<think>a</think><think>b</think> <answer>42</answer>", RIGHT, NO_FORM),
    ("two ends of thought", "a</think> b</think> <answer>42</answer>", RIGHT, NO_FORM),
    ("41, then 42", "a</think> <answer>41</answer> <answer>42</answer>", RIGHT, NO_FORM),
    ("42, then 41", "a</think> <answer>42</answer> <answer>41</answer>", WRONG, NO_FORM),
    ("a newline between the tags", "a</think>\n<answer>42</answer>", NO_FORM, RIGHT),
    ("nothing between the tags", "a</think><answer>42</answer>", NO_FORM, RIGHT),
    ("text between the tags", "a</think> so <answer>42</answer>", NO_FORM, NO_FORM),
    ("42 apples", "a</think> <answer>42 apples</answer>", RIGHT, RIGHT),
    ("text behind the answer", "a</think> <answer>42</answer> I am sure.", WRONG, NO_FORM),
    ("a newline behind the answer", "a</think> <answer>42</answer>\n", RIGHT, RIGHT),
    ("a box", r"a</think> <answer>\boxed{42}</answer>", RIGHT, RIGHT),
    ("an open box", r"a</think> <answer>\boxed{42</answer>", WRONG, WRONG),
    ("two boxes", r"a</think> <answer>\boxed{41} \boxed{42}</answer>", RIGHT, WRONG),
    ("a box in a sentence", r"a</think> <answer>It is \boxed{42}.</answer>", RIGHT, WRONG),
    ("a sentence", "a</think> <answer>The answer is 42.</answer>", WRONG, WRONG),
    ("a quotient", "a</think> <answer>84/2</answer>", WRONG, WRONG),
    ("41 or 42", "a</think> <answer>41 or 42</answer>", WRONG, WRONG),
    ("42 41", "a</think> <answer>42 41</answer>", WRONG, WRONG),
    ("41 = 42", "a</think> <answer>41=42</answer>", WRONG, WRONG),
    ("an alternative in words", r"a</think> <answer>42\text{ or 41}</answer>", WRONG, WRONG),
    ("an empty answer", "a</think> <answer> </answer>", WRONG, WRONG),
    ("an open answer", "a</think> <answer>42", NO_FORM, NO_FORM),
    ("no end of thought", "<think>a <answer>42</answer>", NO_FORM, NO_FORM),
    ("an answer in the thought only", "<answer>42</answer> </think>", NO_FORM, NO_FORM),
    ("a second answer in the thought", "<answer>41</answer></think> <answer>42</answer>", RIGHT, NO_FORM),
    ("an answer in an answer", "a</think> <answer>41<answer>42</answer></answer>", RIGHT, NO_FORM),
    ("a thought in the answer", "a</think> <answer><think>41</think> <answer>42</answer>", RIGHT, NO_FORM),
    ("an opened thought in the answer", "a</think> <answer><think>42</answer>", WRONG, NO_FORM),
    ("a thought opened late", "a <think> b</think> <answer>42</answer>", RIGHT, NO_FORM),
    ("a bare number", "42", NO_FORM, NO_FORM),
    ("nothing", "", NO_FORM, NO_FORM),
]


@pytest.mark.parametrize(("text", "published", "strict"), [row[1:] for row in PUBLISHED], ids=[r[0] for r in PUBLISHED])
def test_r1_zero_and_its_strict_sister(text: str, published: tuple[float, float], strict: tuple[float, float]) -> None:
    assert (paid("r1_zero", text), paid("r1_zero_strict", text)) == (published, strict)


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        *(
            (text, "42", True)
            for text in ("42.0", "42.", "$42", r"\$42", "$42$", "42%", r"42\%", "42 cm", "42cm", "(42)")
        ),
        *(
            (text, "42", True)
            for text in ("x = 42", r"42^\circ", "42 degrees", "42 miles per hour", r"42\text{ birds}")
        ),
        *(
            (text, "42", False)
            for text in ("42 birds", "-42", "6*7", "42.1", "forty-two", "", "42,", "42!", "42 apples.")
        ),
        ("1,000", "1000", True),
        ("1000.0", "1,000", True),
        ("10,00", "1000", False),
        ("1/2", "0.5", True),
        (r"\frac12", r"\dfrac{1}{2}", True),
        ("50%", "0.5", False),
        ("2/4", "1/2", False),  # not reduced
        (r"\frac{84}{2}", "42", False),
        ("7 3/4", "7.75", True),
        (r"7\frac{3}{4}", "31/4", True),
        ("-7 3/4", "-7.75", True),
        (r"\left(\frac{1}{2}, 3\right)", "(0.5,3)", True),
        ("(1,2)", "(2,1)", False),
        ("[1,2)", "(1,2)", False),
        ("(1,2,3)", "(1,2)", False),
        ("2*sqrt(3)", r"\sqrt{12}", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+1", "(x+1)^2", False),
        ("(x+1)/2", r"\frac{x+1}{2}", True),
        ("x+1/2", r"\frac{x+1}{2}", False),
        ("pi*2", r"2\pi", True),
        ("Yes", r"\text{yes}", True),
        ("0.1+0.2", "0.3", True),
        ("9007199254740993", "9007199254740992", False),
        ("1/0", "0.5", False),
        ("1e999999999", "42", False),
        ("nan", "42", False),
        ("\uff14\uff12", "42", True),  # full-width digits are digits
        ("9" * 10_000, "9" * 10_000, True),
        ("9" * 10_000, "9" * 9_999, False),
        ("10**10**10", "0.5", False),
        ("((((9^9)^9)^9)^9)^9", "0.5", False),
        ("2^sqrt(1000000000000)", "0.5", False),
        ("__import__('os').system('true')", "0.5", False),
        ("(" * 5000 + "x" + ")" * 5000, "x", False),
        ("(" * 200 + "x" + ")" * 200, "x/1", False),
        ("-" * 299 + "x", "-x/1", True),
    ],
)
def test_the_grader(answer: str, truth: str, equal: bool) -> None:
    assert is_equal(answer, truth) is equal


def test_boxes_are_balanced_and_in_order() -> None:
    text = r"\boxed{a{b}} \boxed{\{1, 2\}} } \boxed{ \boxed{c} } \boxed{d"
    assert [text[begin:end] for begin, end in boxes(text)] == ["a{b}", r"\{1, 2\}", r" \boxed{c} ", "c"]
    assert last_box(text) is None
    assert last_box(text.removesuffix(r" \boxed{d")) == "c"
    assert last_box(r"\boxed 42") is None
    deep = r"\boxed{" * 50_000 + "}" * 50_000
    assert len(boxes(deep)) == 50_000


@pytest.mark.parametrize(
    ("text", "expected", "loose"),
    [
        (r"so \boxed{42}.", RIGHT, RIGHT),
        (r"\boxed{\text{42}}", RIGHT, RIGHT),
        (r"\boxed{42} and again \boxed{42.0}", RIGHT, RIGHT),
        (r"\boxed{41} or \boxed{42}", WRONG, RIGHT),
        (r"\boxed{42} or \boxed{41}", WRONG, WRONG),
        (r"\boxed{\boxed{42}}", RIGHT, RIGHT),
        (r"\boxed{42} \boxed{41", RIGHT, RIGHT),  # the last complete one
        (r"\boxed{42", NO_FORM, NO_FORM),
        (r"\boxed{41 or 42}", WRONG, WRONG),
        (r"\boxed{}", WRONG, WRONG),
        ("42", NO_FORM, NO_FORM),
        (r"\boxed{42} I am sure.", RIGHT, RIGHT),
        (r"\boxed{" * 3000 + "42" + "}" * 3000, RIGHT, RIGHT),
    ],
)
def test_boxed(text: str, expected: tuple[float, float], loose: tuple[float, float]) -> None:
    assert (paid("boxed", text), paid("boxed", text, only=False)) == (expected, loose)


def test_a_box_around_the_right_answer() -> None:
    assert paid("boxed", r"\boxed{\frac12}", r"It is \boxed{\frac{1}{2}}.") == RIGHT
    assert paid("r1_zero", TAGGED.format("0.5"), r"\boxed{\frac{1}{2}}") == RIGHT


@pytest.mark.parametrize(
    ("text", "answer", "expected", "formal"),
    [
        ("a\n#### 42", "42", RIGHT, RIGHT),
        ("a\n####42.", "42", RIGHT, RIGHT),
        ("#### $1,234.50", "1234.5", RIGHT, RIGHT),
        ("#### -3 degrees", "-3", RIGHT, RIGHT),
        ("#### 42 apples\nI am sure that all 9 agree.", "42", RIGHT, RIGHT),
        ("#### 41 or 42", "42", WRONG, WRONG),
        ("#### 41\n#### 42", "42", WRONG, WRONG),
        ("#### 42\n#### 42.0", "42", RIGHT, RIGHT),
        ("#### forty-two, or 6 * 7", "42", WRONG, WRONG),
        ("It is 42.", "42", (1.0, 0.0), NO_FORM),
        ("41, no, 42", "42", (1.0, 0.0), NO_FORM),
        ("42 is what 7 friends share", "42", NO_FORM, NO_FORM),
        ("It costs $42.00", "42", (1.0, 0.0), NO_FORM),
        ("It is 42%.", "42", (1.0, 0.0), NO_FORM),
        ("84/2", "42", NO_FORM, NO_FORM),
        ("####", "42", NO_FORM, NO_FORM),
        ("#### " + "9" * 10_000, "9" * 10_000, WRONG, WRONG),  # beyond what a float holds
        ("#### \uff14\uff12", "42", NO_FORM, NO_FORM),  # only 0 to 9 are digits here
        ("", "42", NO_FORM, NO_FORM),
    ],
)
def test_gsm8k(text: str, answer: str, expected: tuple[float, float], formal: tuple[float, float]) -> None:
    assert (paid("gsm8k", text, answer), paid("gsm8k", text, answer, require_form=True)) == (expected, formal)


def test_gsm8k_refuses_a_row_without_a_number() -> None:
    with pytest.raises(ValueError, match=r"answer='blue' of row 7 ends in no number"):
        paid("gsm8k", "#### 1", "blue")


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The answer is 42.", "42", RIGHT),
        (r"so \boxed{\frac{84}{2}}", "42", RIGHT),
        ("84/2", "42", RIGHT),
        (r"It is $\{2, 1\}$", r"\{1,2\}", RIGHT),
        ("It is 41.", "42", WRONG),
        ("I do not know", "42", NO_FORM),
        ("1,000 dollars", "1000", RIGHT),
    ],
)
def test_math_verify(text: str, answer: str, expected: tuple[float, float]) -> None:
    assert paid("math_verify", text, answer) == expected


def test_r1_zero_with_math_verify() -> None:
    pytest.importorskip("math_verify", reason="needs the extra megatron_rl[tasks]")
    assert paid("r1_zero", TAGGED.format("84/2"), fast=False) == RIGHT
    assert paid("r1_zero", TAGGED.format("83/2"), fast=False) == WRONG
    assert paid("r1_zero", "84/2", fast=False) == NO_FORM


@pytest.mark.parametrize(("name", "options"), [("math_verify", {}), ("r1_zero", {"fast": False})])
def test_math_verify_without_the_package(monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]) -> None:
    from megatron_rl.rewards.math_verify import library

    library.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'megatron_rl\[tasks\]'"):
        REWARDS[name].prepare(**options)  # type: ignore[attr-defined]


IN_FORM = {
    "r1_zero": TAGGED,
    "r1_zero_strict": TAGGED,
    "boxed": r"\boxed{{{}}}",
    "gsm8k": "#### {}",
    "math_verify": r"\boxed{{{}}}",
}


@pytest.mark.parametrize("name", JUDGES)
def test_the_right_answer_in_the_form_of_gsm8k(name: str) -> None:
    """What follows the last `####` counts; a list of answers admits each."""
    row = "9 * 8 = <<9*8=72>>72 a day.\n#### 7\n#### 1,072"
    assert paid(name, IN_FORM[name].format("1072"), row) == RIGHT
    assert paid(name, IN_FORM[name].format("72"), row) == WRONG
    assert paid(name, IN_FORM[name].format("72"), [71, "#### 72"]) == RIGHT
    assert paid(name, IN_FORM[name].format("72"), 72) == RIGHT
    with pytest.raises(ValueError, match="of row 7 holds no answer"):
        paid(name, "72", "so it is ####")
    with pytest.raises(ValueError, match="holds no answer"):
        paid(name, "72", [])


@pytest.mark.parametrize("name", JUDGES)
def test_the_constant_answer_is_paid_where_it_is_right(name: str) -> None:
    assert [paid(name, IN_FORM[name].format("7"), truth) for truth in ("7", "8", "9")] == [RIGHT, WRONG, WRONG]


FULL_WIDTH = "\uff14\uff12"
NINES = "9" * 10_000
HALF = (1.0, 0.0)  # the answer, without the form

# Ways to be paid for less than the answer in its form, where that is 42: by r1_zero, r1_zero_strict, boxed and gsm8k.
HACKS = [
    ("two boxes", r"\boxed{41} \boxed{42}", NO_FORM, NO_FORM, WRONG, HALF),
    ("a hedge in a box", r"\boxed{41 or 42}", NO_FORM, NO_FORM, WRONG, HALF),
    ("a hedge in the line", "#### 41 or 42", NO_FORM, NO_FORM, NO_FORM, WRONG),
    ("two lines", "#### 41\n#### 42", NO_FORM, NO_FORM, NO_FORM, WRONG),
    ("text behind the box", r"\boxed{42} I am sure.", NO_FORM, NO_FORM, RIGHT, HALF),
    ("a number behind the line", "#### 42\nand 7 more", NO_FORM, NO_FORM, NO_FORM, RIGHT),
    ("an open box", r"\boxed{42", NO_FORM, NO_FORM, NO_FORM, HALF),
    ("a box in the thought", r"<think>\boxed{42}</think>", NO_FORM, NO_FORM, RIGHT, HALF),
    ("a line in the thought", "<think>#### 42</think>", NO_FORM, NO_FORM, NO_FORM, RIGHT),
    ("a number in the thought", "<think>42</think>", NO_FORM, NO_FORM, NO_FORM, HALF),
    ("quoted tags", f"He wrote {TAGGED.format(41)}. {TAGGED.format(42)}", RIGHT, NO_FORM, NO_FORM, HALF),
    (
        "quoted tags with the answer",
        f"He wrote {TAGGED.format(42)}. {TAGGED.format(41)}",
        WRONG,
        NO_FORM,
        NO_FORM,
        NO_FORM,
    ),
    ("other digits, tagged", TAGGED.format(FULL_WIDTH), RIGHT, RIGHT, NO_FORM, NO_FORM),
    ("other digits, boxed", rf"\boxed{{{FULL_WIDTH}}}", NO_FORM, NO_FORM, RIGHT, NO_FORM),
    ("many digits, tagged", TAGGED.format(NINES), WRONG, WRONG, NO_FORM, NO_FORM),
    ("many digits, boxed", rf"\boxed{{{NINES}}}", NO_FORM, NO_FORM, WRONG, NO_FORM),
    ("many digits in the line", f"#### {NINES}", NO_FORM, NO_FORM, NO_FORM, WRONG),
    ("a power, tagged", TAGGED.format("10**10**10"), WRONG, WRONG, NO_FORM, NO_FORM),
    ("a power, boxed", r"\boxed{10^{10^{10}}}", NO_FORM, NO_FORM, WRONG, NO_FORM),
    ("deep braces, tagged", TAGGED.format("{" * 5000 + "42" + "}" * 5000), WRONG, WRONG, NO_FORM, HALF),
    ("deep braces, boxed", r"\boxed{" + "{" * 300 + "42" + "}" * 300 + "}", NO_FORM, NO_FORM, RIGHT, HALF),
]


@pytest.mark.parametrize(("text", "expected"), [(row[1], row[2:]) for row in HACKS], ids=[row[0] for row in HACKS])
def test_what_a_hack_is_paid(text: str, expected: tuple[tuple[float, float], ...]) -> None:
    assert tuple(paid(name, text) for name in JUDGES[:4]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{41} \boxed{42}", WRONG),
        ("41 or 42", RIGHT),  # the last number: to be trained on, it needs another reward of the form beside it
        ("#### 41\n#### 42", RIGHT),
        (r"\boxed{42} I am sure.", RIGHT),
        ("It is 42. There are 7 days.", WRONG),
        (r"\boxed{42", NO_FORM),
        (r"<think>\boxed{42}</think>", RIGHT),
        (f"He wrote {TAGGED.format(41)}. {TAGGED.format(42)}", NO_FORM),
        (rf"\boxed{{{NINES}}}", WRONG),
        (r"\boxed{" * 500 + "42" + "}" * 500, RIGHT),
    ],
)
def test_what_a_hack_is_paid_by_math_verify(text: str, expected: tuple[float, float]) -> None:
    assert paid("math_verify", text) == expected


def test_a_power_that_math_verify_calculates_ends_at_the_deadline() -> None:
    pytest.importorskip("math_verify", reason="needs the extra megatron_rl[tasks]")
    prompt = ask("42")
    with RewardPool("math_verify", workers=1, deadline_s=1.0) as pool:
        bomb, right = pool.score([(prompt, say(r"\boxed{10^{10^{10}}}")), (prompt, say(r"\boxed{42}"))])
    assert (bomb.reason, right.value) == ("timeout", 1.0)


TAGS = ["<think>", "</think>", " ", "\n", "<answer>", "</answer>", "</think> <answer>", r"\boxed{", "####", "$"]
MATHS = [
    "{",
    "}",
    "42",
    "41",
    ",",
    "/2",
    "84",
    r"\frac",
    "x",
    "=",
    "^",
    "(",
    ")",
    "sqrt",
    "-",
    ".",
    "%",
    r"\text{",
    " or ",
]
PIECES = st.sampled_from([*TAGS, *MATHS, " apples"])
TEXTS = st.one_of(
    st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join),
    st.lists(PIECES, max_size=6).map(lambda pieces: TAGGED.format("".join(pieces))),
)


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.sampled_from(["42", "1/2", "x+1", r"\sqrt{2}", "(1,42)"]))
def test_any_text_is_paid_nothing_or_one(text: str, answer: str) -> None:
    for name in ("r1_zero", "r1_zero_strict", "boxed"):
        value, form = paid(name, text, answer)
        assert (value, form) in (RIGHT, WRONG, NO_FORM)
    assert paid("gsm8k", text)[0] in (0.0, 1.0)
    if paid("r1_zero_strict", text, answer) == RIGHT:  # stricter, but for the space between the tags
        assert paid("r1_zero", re.sub(r"</think>\s*<answer>", "</think> <answer>", text), answer) == RIGHT
