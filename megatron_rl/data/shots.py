"""Few-shot prompts: solved examples before the question."""

from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from megatron_rl.data.chat import encode_prompt, is_plain
from megatron_rl.data.sources import PromptEncoder, load_rows


@dataclass(frozen=True, kw_only=True)
class FewShotEncoder(PromptEncoder):
    """Row -> Prompt, with (question, response) pairs before the question of the row.

    As plain text each example is the template with its question and then its response, and blank lines stand between
    them; in a chat they are turns of the user and the assistant.
    """

    shots: tuple[tuple[str, str], ...]

    def encode(self, value: Any) -> tuple[str, tuple[int, ...]]:
        if not isinstance(value, str):
            raise ValueError(f"eval.shots stand before a question that is text, and this prompt is {short(value)}")
        examples = [(self.filled(question), response) for question, response in self.shots]
        if is_plain(self.tokenizer, value, self.chat):
            texts = [question + response for question, response in examples]
            return encode_prompt(self.tokenizer, "\n\n".join([*texts, self.filled(value)]), chat="never")
        turns = [
            {"role": role, "content": content}
            for example in examples
            for role, content in zip(("user", "assistant"), example)
        ]
        return encode_prompt(self.tokenizer, [*turns, {"role": "user", "content": self.filled(value)}], chat=self.chat)


def read_shots(source: str, count: int, *, prompt_key: str, response_key: str) -> tuple[tuple[str, str], ...]:
    """Question and response of the first `count` rows of a file."""
    rows = load_rows(source)
    if len(rows) < count:
        raise ValueError(f"eval.shots={count} asks for more examples than eval.shots_from={source!r} has: {len(rows)}")
    pairs = []
    for index in range(count):
        pair = tuple(rows[index].get(key) for key in (prompt_key, response_key))
        for key, text in zip((prompt_key, response_key), pair):
            if not isinstance(text, str):
                raise ValueError(
                    f"eval.shots_from: {rows.where(index)} has no text {key!r} but {short(text)}; its fields are "
                    f"{sorted(rows[index])}. Set data.prompt_key or eval.shots_response_key"
                )
        pairs.append(pair)
    return tuple((str(question), str(response)) for question, response in pairs)
