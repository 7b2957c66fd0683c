"""Tokenizers as they are on disk, chat templates, prompt lengths. The tokenizers are words and spaces, made here."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_rl.data.chat import encode_example, encode_prompt, encode_response, fit_prompt
from megatron_rl.data.tokenizer import load_tokenizer, pad_id, read_generation_eos, stop_ids

VOCAB = ["<unk>", "<s>", "</s>", "<user>", "<bot>", "<pad>", "one", "plus", "two", "is", "three"]
IDS = {word: index for index, word in enumerate(VOCAB)}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<user> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def make_tokenizer(around: str = "<s> $A", **special: Any) -> PreTrainedTokenizerBase:
    core = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(VOCAB[:6])
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


def ids(words: str) -> tuple[int, ...]:
    return tuple(IDS[word] for word in words.split())


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture(scope="module")
def chatty() -> PreTrainedTokenizerBase:
    return make_tokenizer(chat_template=TEMPLATE)


USER = [{"role": "user", "content": "one plus two"}]


def test_load_keeps_the_tokenizer_as_it_is(tmp_path: Path, chatty: PreTrainedTokenizerBase) -> None:
    chatty.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id is None and loaded.eos_token_id == 2
    assert encode_prompt(loaded, USER) == encode_prompt(chatty, USER)


def test_load_refuses_what_cannot_end(tmp_path: Path) -> None:
    make_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'no end-of-sequence token.*"eos_token" in its tokenizer_config'):
        load_tokenizer(tmp_path)


def test_load_refuses_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path)


def test_code_in_a_model_directory_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "custom.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Custom: pass\n")
    config = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path)
    assert not mark.exists()


def test_pad_id(plain: PreTrainedTokenizerBase) -> None:
    assert pad_id(plain) == 2
    assert plain.pad_token_id is None
    assert pad_id(make_tokenizer(pad_token="<pad>")) == 5


def test_stop_ids(plain: PreTrainedTokenizerBase) -> None:
    assert stop_ids(plain, None) == (2,)
    assert stop_ids(plain, 2) == (2,)
    assert stop_ids(plain, [4, 2, 0]) == (0, 2, 4)


@pytest.mark.parametrize(
    ("text", "eos"), [('{"eos_token_id": [4, 2]}', [4, 2]), ('{"eos_token_id": 0}', 0), ("{}", None), (None, None)]
)
def test_read_generation_eos(tmp_path: Path, text: str | None, eos: Any) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert read_generation_eos(tmp_path) == eos


def test_read_generation_eos_names_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        read_generation_eos(tmp_path)


def test_plain_string(plain: PreTrainedTokenizerBase, chatty: PreTrainedTokenizerBase) -> None:
    expected = ("one plus two", ids("<s> one plus two"))
    assert encode_prompt(plain, "one plus two") == expected
    assert encode_prompt(plain, "one plus two", chat="never") == expected
    assert encode_prompt(chatty, "one plus two", chat="never") == expected


def test_chat(chatty: PreTrainedTokenizerBase) -> None:
    # The template wrote every special token, so the tokenizer's own <s> is not added.
    expected = ("<user> one plus two <bot>", ids("<user> one plus two <bot>"))
    assert encode_prompt(chatty, USER) == expected
    assert encode_prompt(chatty, USER, chat="always") == expected
    assert encode_prompt(chatty, "one plus two") == expected
    assert encode_prompt(chatty, "one plus two", chat="always") == expected
    assert list(encode_prompt(chatty, USER)[1]) == chatty.apply_chat_template(
        USER, add_generation_prompt=True, return_dict=False
    )


def test_chat_without_a_template(plain: PreTrainedTokenizerBase) -> None:
    for value, chat in ((USER, "auto"), (USER, "always"), ("one", "always")):
        with pytest.raises(ValueError, match=r"no chat template: put a chat_template\.jinja"):
            encode_prompt(plain, value, chat=chat)


@pytest.mark.parametrize(
    ("value", "chat", "message"),
    [
        (USER, "never", "chat is never: set chat to auto"),
        ([], "auto", "string or a list of messages, not list"),
        (3, "auto", "string or a list of messages, not int: 3"),
        (["one"], "auto", "message 0 must be an object"),
        ([*USER, {"role": "user"}], "auto", 'message 1 needs a text "content", not None'),
        ([{"role": "user", "content": ["one"]}], "auto", 'message 0 needs a text "content"'),
        ([*USER, {"role": "assistant", "content": "three"}], "auto", "last message is the assistant's"),
        ([{"role": "system", "content": "one"}], "auto", "template refuses these messages: no system role"),
    ],
)
def test_bad_messages(chatty: PreTrainedTokenizerBase, value: Any, chat: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_prompt(chatty, value, chat=chat)


def test_a_prompt_must_not_be_empty_or_ended() -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode_prompt(make_tokenizer("$A"), "")
    ends = make_tokenizer("$A </s>")
    with pytest.raises(ValueError, match='set "add_eos_token" to false'):
        encode_prompt(ends, "one")
    # An end that the text itself spells out is the user's own.
    assert encode_prompt(make_tokenizer("$A"), "one </s>")[1] == ids("one </s>")


def test_example(plain: PreTrainedTokenizerBase, chatty: PreTrainedTokenizerBase) -> None:
    assert encode_example(plain, "one plus two", "is three") == (ids("<s> one plus two"), ids("is three </s>"))
    assert encode_example(chatty, USER, "three") == (ids("<user> one plus two <bot>"), ids("three </s>"))
    assert encode_example(chatty, "one", "two", chat="never") == (ids("<s> one"), ids("two </s>"))


def test_response_ends_once(plain: PreTrainedTokenizerBase) -> None:
    assert encode_response(plain, "three </s>") == ids("three </s>")
    assert encode_response(plain, "") == (2,)


def test_fit_prompt() -> None:
    tokens = (1, 2, 3, 4, 5)
    assert fit_prompt(tokens, 5, "error") == tokens
    assert fit_prompt(tokens, 3, "left") == (3, 4, 5)
    assert fit_prompt(tokens, 3, "right") == (1, 2, 3)
    with pytest.raises(ValueError, match=r"5 tokens, more than data.max_prompt_tokens=4: .* data.truncation_side"):
        fit_prompt(tokens, 4, "error")
