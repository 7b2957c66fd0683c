"""What supervised fine-tuning learns of a row: the response to its prompt, or the answers of its conversation."""

from dataclasses import dataclass

from megatron_rl.data.chat import encode_conversation, encode_response, ends_with_answer, fit_prompt
from megatron_rl.data.media import refuse_media
from megatron_rl.data.sources import ExampleEncoder, PromptEncoder, Row, Rows, Source
from megatron_rl.data.templates import fill_template
from megatron_rl.types import Demonstration, Prompt


@dataclass(frozen=True, kw_only=True)
class DemonstrationEncoder:
    """Row -> Demonstration. A row without a response is a conversation that ends with the assistant's message.

    Of that each answer is learned, up to the token of `stop` that ends it; `data.max_prompt_tokens` bounds what comes
    before the first. With `conversations` rows may lack a response.
    """

    prompt: PromptEncoder
    response_key: str | None
    stop: tuple[int, ...]
    conversations: bool

    @property
    def keys(self) -> tuple[str, ...]:
        required = () if self.conversations or self.response_key is None else (self.response_key,)
        return (*self.prompt.keys, *required)

    def __call__(self, index: int, row: Row) -> Demonstration:
        if self.response_key is not None and row.get(self.response_key) is not None:
            prompt, response = ExampleEncoder(prompt=self.prompt, response_key=self.response_key)(index, row)
            ids = encode_response(self.prompt.tokenizer, response)
            return Demonstration(prompt=prompt, token_ids=ids, learned=(True,) * len(ids))
        return self._conversation(index, row)

    def _conversation(self, index: int, row: Row) -> Demonstration:
        encoder, messages = self.prompt, row[self.prompt.prompt_key]
        refuse_media(row)
        if not ends_with_answer(messages):
            raise ValueError(
                f"it has no response ({self.response_key!r}), and {encoder.prompt_key!r} holds no conversation that "
                "ends with the assistant's message: add one or the other, or set data.response_key to its name"
            )
        if encoder.chat == "never":
            raise ValueError("it is a conversation and data.chat is never: set data.chat to auto")
        if encoder.template is not None:
            fill_template(encoder.template, messages)  # which refuses what is not one text
        text, before, ids, learned = encode_conversation(encoder.tokenizer, messages, stop=self.stop)
        before = fit_prompt(before, encoder.max_prompt_tokens, encoder.truncation_side)
        prompt = Prompt(index=index, text=text, token_ids=before, row=row)
        return Demonstration(prompt=prompt, token_ids=ids, learned=learned)


DemonstrationSource = Source[Demonstration]


def may_be_conversations(rows: Rows, prompt_key: str, response_key: str | None) -> bool:
    """Whether there is a row without a response, and the first such row is a conversation."""
    first = 0 if response_key is None else rows.first_without(response_key)
    return first is not None and len(rows) > 0 and ends_with_answer(rows[first].get(prompt_key))
