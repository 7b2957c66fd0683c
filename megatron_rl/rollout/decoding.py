"""Decoding with a model of `transformers`: a prompt is read once, and an answer that has ended costs no more work."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from megatron_rl.metrics.progress import tick
from megatron_rl.rollout.sampling import draw, sampling_log_probs

ROOM = 64  # tokens that a cache grows by
ATTENTION = "megatron_rl_decoding"


class Drawn(NamedTuple):
    """Tokens [N, n] int64 of N answers, and per token the log-probability and the log of the mass truncation kept.

    What stands behind the end of an answer means nothing.
    """

    tokens: Tensor
    log_probs: Tensor
    log_kept: Tensor


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    places: Sequence[int],
    uniform: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    pad: int,
    ended: Callable[[list[int], Tensor], Tensor],
) -> Drawn:
    """Answers to `prompts[place]` for each of `places`, as long as `uniform` [N, longest] is wide at most.

    `ended(rows, tokens)` says which of the answers `rows` are over with these tokens [len(rows)], their next. Rows that
    have ended leave the batch once they are an eighth of it. Prompts are padded on the left and masked.
    """
    longest, device = uniform.shape[1], uniform.device
    tokens, positions, mask = _pad_left(prompts, pad, longest, device)
    width = tokens.shape[1]
    cache = Cache(layers=[RoomyLayer() for _ in range(model.config.num_hidden_layers)])
    read = mask[:, None, None, :width] & torch.ones(width, width, dtype=torch.bool, device=device).tril()
    # What stands before a prompt sees itself: a softmax over nothing is nan.
    read |= torch.eye(width, dtype=torch.bool, device=device)
    logits = _logits(model, tokens, positions, read, cache)
    of_prompt = torch.tensor(places, device=device)
    cache.batch_select_indices(of_prompt)
    logits, positions = logits[of_prompt], positions[of_prompt, -1:]
    allowed = torch.zeros(mask.shape, dtype=logits.dtype, device=device).masked_fill_(~mask, -torch.inf)
    allowed = allowed[of_prompt][:, None, None]

    drawn = Drawn(
        torch.full(uniform.shape, pad, device=device),
        *(torch.zeros(uniform.shape, device=device) for _ in range(2)),
    )
    rows = torch.arange(len(places), device=device)
    over = torch.zeros(len(places), dtype=torch.bool, device=device)
    for step in range(longest):
        tick()
        log_probs, log_kept = sampling_log_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        token = draw(log_probs, uniform[rows, step])
        drawn.tokens[rows, step] = token
        drawn.log_probs[rows, step] = log_probs.gather(1, token[:, None])[:, 0]
        drawn.log_kept[rows, step] = log_kept
        over |= ended(rows.tolist(), token)
        count = int(over.sum())
        if count == len(rows) or step + 1 == longest:
            return Drawn(*(values[:, : step + 1] for values in drawn))
        if 8 * count >= len(rows):
            open_rows = (~over).nonzero()[:, 0]
            cache.batch_select_indices(open_rows)
            rows, token, positions, allowed = (x[open_rows] for x in (rows, token, positions, allowed))
            over = over[open_rows]
        positions = positions + 1
        logits = _logits(model, token[:, None], positions, allowed[..., : width + step + 1], cache)
    raise AssertionError("an answer has at least one token")


def _pad_left(
    prompts: Sequence[Sequence[int]], pad: int, longest: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [P, width], their positions from 0, which places [P, width + longest] are not padding)."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad)
    mask = torch.ones(len(prompts), width + longest, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, : width - len(ids)] = False
    positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    return tokens.to(device), positions.to(device), mask.to(device)


def _logits(model: PreTrainedModel, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """[rows, V] of the last token."""
    output: Any = model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room for more tokens. transformers' own layer copies them for each."""

    length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin, self.length = self.length, self.length + key_states.shape[-2]
        if begin == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (_with_room(x, self.length) for x in (key_states, value_states))
        elif self.length > self.keys.shape[-2]:
            self.keys, self.values = (_with_room(x, self.length) for x in (self.keys, self.values))
        self.keys[:, :, begin : self.length] = key_states
        self.values[:, :, begin : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = (
            _with_room(x[:, :, : self.length].index_select(0, indices), self.length) for x in (self.keys, self.values)
        )


def _with_room(states: Tensor, length: int) -> Tensor:
    """A copy of states [rows, heads, tokens, d] in a buffer for ROOM tokens more than `length`."""
    rows, heads, tokens, dim = states.shape
    buffer = states.new_empty(rows, heads, length + ROOM, dim)
    buffer[:, :, :tokens] = states
    return buffer


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one token to those before. Query heads that share keys are rows of one query: no key is repeated."""
    batch, heads, length, dim = query.shape
    if length > 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.view(batch, key.shape[1], -1, dim)
    output = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=options.get("scaling"))
    return output.reshape(batch, 1, heads, dim), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
