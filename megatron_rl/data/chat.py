"""From what a row holds to token ids: chat templates, prompt lengths, and the response of an SFT example."""

from collections.abc import Collection, Mapping, Sequence
from reprlib import repr as short
from typing import Any, Literal, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

ChatMode = Literal["auto", "always", "never"]
TruncationSide = Literal["left", "right", "error"]
TokenIds = tuple[int, ...]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, value: Any, *, chat: ChatMode = "auto") -> tuple[str, TokenIds]:
    """The text and token ids of a prompt that is a string or a list of {"role", "content"} messages.

    Messages go through the tokenizer's chat template, ready for the assistant's turn. `chat` says what happens to a
    string: `always` makes it one user message, `never` takes it as it is, `auto` is `always` where the tokenizer has
    a template.
    """
    assert chat in get_args(ChatMode), chat
    if is_plain(tokenizer, value, chat):
        text, ids = value, _encode_plain(tokenizer, value)
    elif chat == "never":
        raise ValueError("the prompt is a list of messages and chat is never: set chat to auto, or make it a string")
    else:
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        _check_messages(messages)
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message is the assistant's: remove it, the response follows the prompt")
        text = _apply_template(tokenizer, messages)
        # The template has written the special tokens already.
        ids = _encode_bare(tokenizer, text)
    if not ids:
        raise ValueError("the prompt is empty: a response needs at least one token to follow")
    return text, ids


def is_plain(tokenizer: PreTrainedTokenizerBase, value: Any, chat: ChatMode) -> bool:
    """Whether a prompt is taken as it is, without the chat template."""
    return isinstance(value, str) and (chat == "never" or (chat == "auto" and not tokenizer.chat_template))


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> TokenIds:
    """The tokens of a response that is to be learned, with the end-of-sequence token last."""
    ids = _encode_bare(tokenizer, response)
    return ids if ids[-1:] == (tokenizer.eos_token_id,) else (*ids, tokenizer.eos_token_id)


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, response: str, *, chat: ChatMode = "auto"
) -> tuple[TokenIds, TokenIds]:
    """Prompt and response ids. They are tokenised apart, so the prompt reads as it will when responses are sampled."""
    return encode_prompt(tokenizer, prompt, chat=chat)[1], encode_response(tokenizer, response)


def ends_with_answer(value: Any) -> bool:
    """Whether it is a list of messages, the last of which is the assistant's."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return is_list and isinstance(value[-1], Mapping) and value[-1].get("role") == "assistant"


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, stop: Collection[int]
) -> tuple[str, TokenIds, TokenIds, tuple[bool, ...]]:
    """The text and ids before the assistant's first answer, the ids from there on, and which of these are answers.

    An answer is its content as the template writes it, and the token of `stop` that ends it. The conversation is
    tokenised piece by piece, an answer apart from what comes before it, so that each follows the tokens that it would
    be sampled after. That needs a template that writes a turn the same way whatever follows; others are refused.
    """
    _check_messages(messages)
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if any(place == 0 or place - 1 in places for place in places):
        raise ValueError("an answer needs a message of another role before it: join the assistant's messages into one")
    written, first = "", ""
    pieces: list[tuple[TokenIds, bool]] = []
    for place in places:
        before = _apply_template(tokenizer, messages[:place])
        after = _apply_template(tokenizer, messages[: place + 1], prompts=False)
        if not before.startswith(written) or not after.startswith(before):
            changed = f"it writes message {place} otherwise than it prompts for it"
            if not before.startswith(written):
                changed = f"it writes what is before message {place} otherwise once more follows"
            raise ValueError(
                f"the tokenizer's chat template does not fit a conversation of several turns: {changed}, so that no "
                "one sequence has each answer after what it would be sampled after. Learn the last answer only: leave "
                "it out of the messages, and make it the response (data.response_key)"
            )
        answer = _ended(tokenizer, after[len(before) :], stop, place)
        pieces += [(_encode_bare(tokenizer, before[len(written) :]), False), (_encode_bare(tokenizer, answer), True)]
        written, first = before + answer, first or before
    learned = tuple(is_answer for ids, is_answer in pieces[1:] for _ in ids)
    return first, pieces[0][0], tuple(token for ids, _ in pieces[1:] for token in ids), learned


def _ended(tokenizer: PreTrainedTokenizerBase, answer: str, stop: Collection[int], place: int) -> str:
    """The answer up to its end token; what a template writes beyond belongs to the next prompt."""
    ends = [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stop)]
    cut = max((answer.rfind(end) + len(end) for end in ends if end in answer), default=0)
    if not cut or _encode_bare(tokenizer, answer[:cut])[-1] not in stop:
        raise ValueError(
            f"the tokenizer's chat template ends message {place}, {short(answer)}, with no token that ends a response "
            f"({', '.join(map(repr, ends))}), so the model would not learn to stop: name its end token as eos_token_id "
            "in generation_config.json, or use another template"
        )
    return answer[:cut]


def fit_prompt(token_ids: TokenIds, max_prompt_tokens: int, truncation_side: TruncationSide) -> TokenIds:
    """Cut a prompt that is too long. `truncation_side` is the side that loses tokens; `error` refuses to cut."""
    assert truncation_side in get_args(TruncationSide), truncation_side
    assert max_prompt_tokens >= 1, max_prompt_tokens
    if len(token_ids) <= max_prompt_tokens:
        return token_ids
    if truncation_side == "left":
        return token_ids[-max_prompt_tokens:]
    if truncation_side == "right":
        return token_ids[:max_prompt_tokens]
    raise ValueError(
        f"the prompt has {len(token_ids)} tokens, more than data.max_prompt_tokens={max_prompt_tokens}: raise "
        "data.max_prompt_tokens, shorten the prompt, or set data.truncation_side to left or right"
    )


def _encode_bare(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    _check_text(text)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_text(text: str) -> None:
    """JSON can spell half a character, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{short(text)} is not Unicode text ({error.reason}): correct the character") from error


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    """Tokens with the special ones the tokenizer adds in front, which must not include an end."""
    _check_text(text)
    ids = tuple(tokenizer(text)["input_ids"])
    if ids[-1:] == (tokenizer.eos_token_id,) and _encode_bare(tokenizer, text)[-1:] != ids[-1:]:
        raise ValueError(
            f"the tokenizer ends every text with {tokenizer.eos_token!r}, so nothing could follow the prompt: "
            'set "add_eos_token" to false in its tokenizer_config.json'
        )
    return ids


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: Any, *, prompts: bool = True) -> str:
    """The messages as text; with `prompts` up to where the assistant begins to write."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the prompt is a chat and the tokenizer has no chat template: put a chat_template.jinja next to "
            "tokenizer_config.json, or use string prompts with chat set to auto or never"
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompts, tokenize=False)
    except Exception as error:  # a template is a program, and fails like one
        reason = error if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"the tokenizer's chat template refuses these messages: {reason}") from error


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            f"the prompt must be a string or a list of messages, not {type(messages).__name__}: {short(messages)}"
        )
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f'message {position} must be an object with "role" and "content", not {short(message)}')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f'message {position} needs a text "{key}", not {short(message.get(key))}')
