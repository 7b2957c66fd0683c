"""What supervised fine-tuning learns of rows: responses, and every answer of a conversation in a chat template."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_rl.data.chat import encode_conversation, encode_prompt
from megatron_rl.data.demonstrations import DemonstrationEncoder, DemonstrationSource, may_be_conversations
from megatron_rl.data.samples import from_demonstration
from megatron_rl.data.sources import PromptEncoder, load_rows
from megatron_rl.types import Demonstration

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# With a system message of its own where there is none, as several families have it.
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning is shown in the last answer only.
FORGETS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}",
)
OPENS = CHATML + "{% if add_generation_prompt %}<think>{% endif %}"
ENDLESS = CHATML.replace("}}<|im_end|>", "}}{{ '' if m.role == 'assistant' else '<|im_end|>' }}")


def tokenizer(template: str = CHATML) -> PreTrainedTokenizerBase:
    """Characters, and two line breaks in a row: where a text is cut before it is tokenised matters."""
    characters = ["\n", "\n\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*SPECIAL, *characters])}, unk_token=" "))
    core.add_special_tokens(SPECIAL)
    core.pre_tokenizer = pre_tokenizers.Split(Regex("\n\n|\n|."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", chat_template=template, clean_up_tokenization_spaces=False
    )


def talk(*contents: str, system: str = "") -> list[dict[str, str]]:
    """A conversation, the user first."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


STOP = (2,)
TWO = talk("1+1?", "It is 2.", "And 2+2?\n", "4")


def answers(ids: tuple[int, ...], learned: tuple[bool, ...], tok: PreTrainedTokenizerBase) -> list[str]:
    """Runs of learned tokens as text."""
    found, run = [], []
    for token, is_learned in [*zip(ids, learned, strict=True), (0, False)]:
        if is_learned:
            run.append(token)
        elif run:
            found.append(tok.decode(run))
            run = []
    return found


@pytest.mark.parametrize("system", ["", "Add."])
def test_every_answer_follows_the_prompt_it_would_be_sampled_after(system: str) -> None:
    """The whole is the template's own text but for what comes after the last end; each part is tokenised by itself."""
    tok, messages = tokenizer(), talk(*(m["content"] for m in TWO), system=system)
    text, before, ids, learned = encode_conversation(tok, messages, stop=STOP)
    assert (text, before) == encode_prompt(tok, messages[: len(messages) - 3])
    assert answers(ids, learned, tok) == ["It is 2.<|im_end|>", "4<|im_end|>"]
    assert tok.decode([*before, *ids]) + "\n" == tok.apply_chat_template(messages, tokenize=False)
    second = max(place for place in range(len(ids)) if not learned[place]) + 1
    assert (*before, *ids[:second]) == encode_prompt(tok, messages[:-1])[1]
    assert ids[-1] == STOP[0] and learned[-1]


def test_an_answer_is_tokenised_apart_from_its_prompt() -> None:
    """The prompt ends with a line break and the answer begins with one; together they would be another token."""
    tok = tokenizer()
    _, before, ids, learned = encode_conversation(tok, talk("Hi", "\nHo"), stop=STOP)
    single, double = (tok.convert_tokens_to_ids(text) for text in ("\n", "\n\n"))
    assert before[-1] == ids[0] == single and double not in (*before, *ids) and all(learned)


def test_one_answer_is_what_a_prompt_and_its_response_are() -> None:
    row = {"messages": talk("1+1?", "2"), "prompt": "1+1?", "response": "2"}
    pair, conversation = (
        DemonstrationEncoder(
            prompt=PromptEncoder(tokenizer=tokenizer(), max_prompt_tokens=90, prompt_key=key),
            response_key=response,
            stop=STOP,
            conversations=response is None,
        )(0, row)
        for key, response in (("prompt", "response"), ("messages", None))
    )
    assert pair == conversation and all(pair.learned)


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (
            FORGETS,
            talk("a", "<think>b</think>c", "d", "e"),
            "writes what is before message 3 otherwise once more follows",
        ),
        (OPENS, talk("a", "b"), "writes message 1 otherwise than it prompts for it, .* make it the response"),
        (ENDLESS, talk("a", "b"), r"ends message 1, 'b\\n', with no token that ends a response \('<\|im_end\|>'\)"),
        (CHATML, talk("a", "b", "", "c")[:2] + talk("x", "c")[1:], "join the assistant's messages into one"),
        (CHATML, talk("a", "b")[1:], "an answer needs a message of another role before it"),
        (CHATML, [*talk("a", "b"), {"role": "user"}, *talk("c", "d")[1:]], 'message 2 needs a text "content"'),
    ],
)
def test_what_has_no_sequence_of_its_own_is_refused(template: str, messages: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encode_conversation(tokenizer(template), messages, stop=STOP)


def test_reasoning_that_is_forgotten_later_can_be_learned_as_the_last_answer() -> None:
    tok = tokenizer(FORGETS)
    _, _, ids, learned = encode_conversation(tok, talk("a", "<think>b</think>c"), stop=STOP)
    assert answers(ids, learned, tok) == ["<think>b</think>c<|im_end|>"]


def source(path: Path, rows: list[dict], response_key: str | None = "response", **prompt: Any) -> DemonstrationSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_rows(path)
    encoder = DemonstrationEncoder(
        prompt=PromptEncoder(**{"tokenizer": tokenizer(), "max_prompt_tokens": 90} | prompt),
        response_key=response_key,
        stop=STOP,
        conversations=may_be_conversations(loaded, "prompt", response_key),
    )
    return DemonstrationSource(loaded, encoder, seed=1)


def test_rows_of_both_kinds(tmp_path: Path) -> None:
    """A response, where there is one, follows the messages before it; otherwise their last is the answer."""
    rows = [{"prompt": TWO}, {"prompt": TWO[:3], "response": "5"}, {"prompt": "1+1?", "response": "2"}]
    both = source(tmp_path / "both.jsonl", rows).all()
    tok = tokenizer()
    expected = [["It is 2.<|im_end|>", "4<|im_end|>"], ["5<|im_end|>"], ["2<|im_end|>"]]
    assert [answers(shown.token_ids, shown.learned, tok) for shown in both] == expected
    assert both[1].prompt.token_ids == encode_prompt(tok, TWO[:3])[1]
    (only,) = source(tmp_path / "one.jsonl", [{"prompt": TWO, "response": "ignored"}], None).all()
    assert only.token_ids == both[0].token_ids
    sample = from_demonstration(7, both[0])
    assert sample.loss_mask.tolist() == list(both[0].learned) and sample.prompt_length == len(both[0].prompt.token_ids)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"prompt": "a", "response": "b"}, {"prompt": "a"}], {}, "line 2 has no 'response'; its fields are"),
        ([{"prompt": "a", "response": 4}], {}, "line 1: 'response' must be text, not 4"),
        ([{"prompt": TWO}, {"prompt": "a"}], {}, "line 2: it has no response .'response'., and 'prompt' holds no conv"),
        ([{"prompt": TWO[:3]}], {"response_key": None}, r"line 1: it has no response \(None\)"),
        ([{"prompt": TWO}], {"chat": "never"}, "it is a conversation and data.chat is never"),
        ([{"prompt": TWO}], {"template": "Q: {question}"}, "data.template takes a question that is text"),
        ([{"prompt": TWO}], {"max_prompt_tokens": 9}, "line 1: the prompt has 42 tokens, more than data.max_prompt"),
        ([{"prompt": TWO, "image": "a.png"}], {}, "'image' is not empty"),
    ],
)
def test_rows_that_teach_nothing_are_named(tmp_path: Path, rows: list[dict], options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        source(tmp_path / "bad.jsonl", rows, **options).all()


def test_a_long_prompt_is_cut_before_the_first_answer_only(tmp_path: Path) -> None:
    cut, whole = (
        source(tmp_path / f"{most}.jsonl", [{"prompt": TWO}], max_prompt_tokens=most, truncation_side="left").all()[0]
        for most in (9, 90)
    )
    assert isinstance(cut, Demonstration) and cut.prompt.token_ids == whole.prompt.token_ids[-9:]
    assert (cut.token_ids, cut.learned) == (whole.token_ids, whole.learned)
