"""From texts to padded rows of tokens, their labels, and the mask of the outputs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_rl.data.chat import TokenIds, encode_prompt
from megatron_rl.data.tokenizer import pad_id


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """`input_ids` and `labels` [B, L - 1] int64, and `response_mask` [B, L - 1] bool: where the label is of the output.

    Prompt and output are tokenised apart and joined; rows are padded on the right to the longest, L. Then `input_ids`
    are the rows without their last column and `labels` those without their first. So a row that is shorter than the
    longest keeps its last output token in `input_ids`; its label there is padding, which the mask leaves out. An empty
    output has a row of the mask without a True.

    A tokenizer that begins texts with a token of its own does so with the prompt; nothing is put between prompt and
    output, or behind it: to teach where to stop, end the outputs with `tokenizer.eos_token`. Without a padding token
    the end-of-sequence token pads.

    The trainers pack sequences without padding, cut prompts that are too long, and end the responses they teach with
    the end-of-sequence token.
    """
    if len(prompt_strs) != len(output_strs):
        raise ValueError(f"there are {len(prompt_strs)} prompt_strs and {len(output_strs)} output_strs: give pairs")
    if not prompt_strs:
        raise ValueError("prompt_strs is empty: give at least one pair of prompt and output")
    filler: int | None = pad_id(tokenizer)
    if filler is None:
        raise ValueError("the tokenizer has neither a pad_token nor an eos_token to pad with: set tokenizer.pad_token")
    prompts = [_prompt_ids(tokenizer, row, text) for row, text in enumerate(prompt_strs)]
    outputs = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in output_strs]
    length = max(len(prompt) + len(output) for prompt, output in zip(prompts, outputs))
    ids = torch.full((len(prompts), length), filler, dtype=torch.int64)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, output) in enumerate(zip(prompts, outputs)):
        end = len(prompt) + len(output)
        ids[row, :end] = torch.tensor(prompt + output)
        mask[row, len(prompt) : end] = True
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, row: int, text: str) -> TokenIds:
    """As the trainers read it. It must not be empty: an output token with nothing before it has no prediction."""
    try:
        return encode_prompt(tokenizer, text, chat="never")[1]
    except ValueError as error:
        raise ValueError(f"prompt_strs[{row}]: {error}") from error
