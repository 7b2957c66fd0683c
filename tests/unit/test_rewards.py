"""What the reward functions return, how they are found by name, and what stops a pool from starting."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rewards import REWARDS, resolve
from megatron_rl.rewards.exact import exact, last_number, numeric
from megatron_rl.rewards.format import regex
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.types import Prompt, Rollout


def ask(**row: Any) -> Prompt:
    return Prompt(index=7, text="?", token_ids=(1,), row=row)


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


@pytest.mark.parametrize(("text", "value"), [(" 42\n", 1.0), ("42.", 0.0), ("", 0.0)])
def test_exact_compares_stripped_text(text: str, value: float) -> None:
    assert exact(ask(answer="42 "), say(text)) == value


def test_exact_reads_an_answer_that_is_not_text() -> None:
    assert exact(ask(solution=42), say("42"), answer_key="solution") == 1.0


def test_a_missing_answer_names_the_fields_there_are() -> None:
    with pytest.raises(ValueError, match=r"answer_key='answer' is not a field of row 7.*'question', 'solution'"):
        exact(ask(question="?", solution="1"), say("1"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and then 72.", 72.0),
        ("\\boxed{1,234,567.5}", 1234567.5),
        ("$12,000", 12000.0),
        ("x = -3", -3.0),
        ("x = \u22123", -3.0),
        ("5-3", 3.0),
        ("(5)-3", 3.0),
        ("1,2", 2.0),
        ("1,2345", 2345.0),
        (".5", 0.5),
        ("2.5e-3", 0.0025),
        ("H2O", None),
        ("3km", 3.0),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numeric_has_parts_and_a_tolerance() -> None:
    prompt = ask(answer="some steps #### 1,000")
    right = numeric(prompt, say("It is 1000.0"))
    assert (right.value, dict(right.parts)) == (1.0, {"accuracy": 1.0, "format": 1.0})
    wrong = numeric(prompt, say("It is 1001"))
    assert (wrong.value, dict(wrong.parts)) == (0.0, {"accuracy": 0.0, "format": 1.0})
    silent = numeric(prompt, say("I do not know"))
    assert (silent.value, dict(silent.parts)) == (0.0, {"accuracy": 0.0, "format": 0.0})
    assert numeric(prompt, say("1001"), tolerance=1e-3).value == 1.0
    assert numeric(prompt, say("1002"), tolerance=1e-3).value == 0.0
    assert numeric(ask(answer="0"), say("0.0000001")).value == 1.0
    assert numeric(prompt, say("9" * 400)).value == 0.0


def test_numeric_refuses_an_answer_without_a_number() -> None:
    with pytest.raises(ValueError, match=r"answer='blue' of row 7 holds no number"):
        numeric(ask(answer="blue"), say("1"))


@pytest.mark.parametrize(
    ("text", "value", "accuracy", "form"),
    [
        ("<think>\n..</think><answer> 4 </answer>", 1.0, 1.0, 1.0),
        ("<think>..</think><answer>5</answer>", 0.1, 0.0, 1.0),
        ("4", 0.0, 0.0, 0.0),
    ],
)
def test_regex_weighs_format_and_accuracy(text: str, value: float, accuracy: float, form: float) -> None:
    pattern = r"^<think>.*</think>\s*<answer>(?P<answer>.*?)</answer>$"
    reward = regex(ask(answer="4"), say(text), pattern=pattern)
    assert reward.value == pytest.approx(value)
    assert dict(reward.parts) == {"accuracy": accuracy, "format": form}


def test_regex_without_an_answer_group_judges_the_form_alone() -> None:
    reward = regex(ask(), say("Yes."), pattern=r"^(Yes|No)\.$", format_weight=0.5)
    assert (reward.value, dict(reward.parts)) == (0.5, {"format": 1.0})


def test_regex_with_an_answer_group_that_took_no_part() -> None:
    assert regex(ask(answer="None"), say("done"), pattern="done(?P<answer>!)?").parts["accuracy"] == 0.0


def test_regex_refuses_a_broken_pattern_beforehand() -> None:
    with pytest.raises(ValueError, match=r"pattern='\(' is not a regular expression"):
        regex.prepare(pattern="(", format_weight=1.0)


def test_reasoning_scores_with_the_task_that_made_the_row() -> None:
    gym = pytest.importorskip("reasoning_gym", reason="needs the extra megatron_rl[tasks]")
    entry = gym.create_dataset("chain_sum", seed=3, size=1)[0]
    prompt, reasoning = ask(dataset="chain_sum", entry=entry), REWARDS["reasoning"]
    right = reasoning(prompt, say(f"thus <answer>{entry['answer']}</answer>"))
    assert (right.value, dict(right.parts)) == (1.0, {"accuracy": 1.0, "format": 1.0})  # type: ignore[union-attr]
    wrong = reasoning(prompt, say("thus <answer>nothing</answer>"))
    assert (wrong.value < 0.5, wrong.parts["format"]) == (True, 1.0)  # type: ignore[union-attr]
    untagged = reasoning(prompt, say(entry["answer"]))
    assert (untagged.value, untagged.parts["format"]) == (0.0, 0.0)  # type: ignore[union-attr]
    assert reasoning(prompt, say(entry["answer"]), tag=None).value == 1.0  # type: ignore[union-attr]


def test_reasoning_uses_the_verifier_and_not_the_text_of_the_answer() -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra megatron_rl[tasks]")
    entry = {"question": "?", "answer": "94*4 - 61 - 6", "metadata": {"numbers": [6, 61, 94, 4], "target": 309}}
    prompt = ask(dataset="countdown", entry=entry)
    other_way = REWARDS["reasoning"](prompt, say("<answer>4*94 - (61 + 6)</answer>"), evaluate=True)
    assert other_way.value == 1.0  # type: ignore[union-attr]


def test_reasoning_refuses_a_row_without_a_task() -> None:
    with pytest.raises(ValueError, match=r"row 7 has dataset=None and entry=None; .*reasoning-gym:<task>"):
        REWARDS["reasoning"](ask(answer="1"), say("1"))


def test_reasoning_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install megatron_rl\[tasks\]"):
        REWARDS["reasoning"].prepare()  # type: ignore[attr-defined]


def test_resolve_by_name_module_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lengths.py").write_text("def brevity(prompt, rollout):\n    return -len(rollout.text)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("exact") is exact
    assert resolve("lengths:brevity")(ask(), say("abc")) == -3
    assert resolve(f"{tmp_path}/lengths.py:brevity")(ask(), say("abcd")) == -4


def test_resolve_errors_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"reward='numerik' is unknown \(did you mean 'numeric'\?\); use one of exact"):
        resolve("numerik")
    with pytest.raises(ValueError, match=r"importing 'no_such_module' failed with ModuleNotFoundError"):
        resolve("no_such_module:f")
    with pytest.raises(ValueError, match=r"broken.py' failed with ZeroDivisionError: division by zero"):
        resolve(f"{tmp_path}/broken.py:f")
    with pytest.raises(ValueError, match=r"failed with FileNotFoundError"):
        resolve(f"{tmp_path}/absent.py:f")
    with pytest.raises(ValueError, match=r"'math' has no function 'sqr'; did you mean 'sqrt'\?"):
        resolve("math:sqr")


def test_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'reasoning_gym'}"
    code = f"import sys, megatron_rl.rewards, megatron_rl.rewards.pool; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exakt", {}, r"did you mean 'exact'\?"),
        ("no_such_module:f", {}, r"importing 'no_such_module' failed with ModuleNotFoundError"),
        ("{path}:f", {}, r"failed with RuntimeError: not today"),
        ("exact", {"answer_kee": "x"}, r"reward='exact' takes .*answer_key.*unexpected keyword argument 'answer_kee'"),
        ("regex", {"pattern": "("}, r"pattern='\(' is not a regular expression"),
        ("regex", {}, r"missing a required (keyword-only )?argument: 'pattern'"),
    ],
)
def test_a_reward_that_cannot_start_is_an_error_at_once(
    tmp_path: Path, name: str, options: dict[str, str], message: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('not today')\n")
    with pytest.raises(ValueError, match=message) as caught:
        RewardPool(name.format(path=path), options, workers=1, deadline_s=1.0)
    assert "Traceback" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("body", "seconds", "message"),
    [
        ("import time; time.sleep(60)", 0.5, "not ready within start_deadline_s=0.5"),
        ("import os; os._exit(4)", 30.0, "exit code 4"),
    ],
)
def test_a_module_that_hangs_or_exits_at_import(tmp_path: Path, body: str, seconds: float, message: str) -> None:
    (tmp_path / "slow.py").write_text(body)
    with pytest.raises(ValueError, match=message):
        RewardPool(f"{tmp_path}/slow.py:f", workers=1, deadline_s=1.0, start_deadline_s=seconds)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="workers=0"):
        RewardPool("exact", workers=0, deadline_s=1.0)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="deadline_s="):
            RewardPool("exact", workers=1, deadline_s=seconds)
