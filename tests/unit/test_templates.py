"""Prompt templates: ours by name, the user's by file, and what a row's question becomes in them."""

from pathlib import Path
from typing import Any

import pytest

from megatron_rl.data.sources import PromptEncoder
from megatron_rl.data.templates import TEMPLATES, fill_template, load_template
from tests.models import ascii_tokenizer


def test_ours_hold_the_question_and_end_as_they_should() -> None:
    opened = fill_template(load_template("r1_zero"), "What is 1+1?")
    assert opened.endswith("User: What is 1+1?\nAssistant: <think>")
    assert "<think> reasoning </think> <answer> final answer </answer>" in opened
    boxed = fill_template(load_template("question_only"), "What is 1+1?")
    assert boxed.startswith("What is 1+1?\n") and "\\boxed{}" in boxed
    assert all(template.count("{question}") == 1 for template in TEMPLATES.values())


def test_a_file_is_taken_to_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"{a}\r\nQ: {question} {question} {}\n")
    assert fill_template(load_template(str(path)), "{question}{b}") == "{a}\r\nQ: {question}{b} {question}{b} {}\n"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.template='r1_zer' is no template \(did you mean 'r1_zero'\?\)"):
        load_template("r1_zer")
    with pytest.raises(ValueError, match=r"mine.txt' is no template and no file .* r1_zero, question_only, or name"):
        load_template(str(tmp_path / "mine.txt"))
    (tmp_path / "mine.txt").write_text("Q: {Question}")
    with pytest.raises(ValueError, match=r"mine.txt' lacks \{question\}"):
        load_template(str(tmp_path / "mine.txt"))
    (tmp_path / "mine.txt").write_bytes(b"\xff{question}")
    with pytest.raises(ValueError, match=r"mine.txt' is not UTF-8 text"):
        load_template(str(tmp_path / "mine.txt"))
    with pytest.raises(ValueError, match=r"this prompt is \[\{'content': 'q', .*set data.template=null"):
        fill_template("{question}", [{"role": "user", "content": "q"}])


def test_the_chat_template_comes_after(tmp_path: Path) -> None:
    from megatron_rl.data.tokenizer import load_tokenizer

    ascii_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)

    def text(**options: Any) -> str:
        encode = PromptEncoder(tokenizer=tokenizer, max_prompt_tokens=99, **options)
        return encode(0, {"prompt": "1+1?"}).text

    assert text(template="Q: {question}") == "user: Q: 1+1?\nassistant: "
    assert text(template="Q: {question}\nA:", chat="never") == "Q: 1+1?\nA:"
