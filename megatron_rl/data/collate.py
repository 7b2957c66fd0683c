"""Packing samples into the one layout of training: `[1, T]` with `cu_seqlens`, and no padding between sequences.

Only the tokens that bear loss reach the lm-head, so every per-token tensor of the loss is `[N]`, N the number of
such tokens, in the order of samples and then positions. The hidden state at position p predicts token p + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rl.data.samples import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward pass reads. Segments beyond `num_sequences` (at most one) only fill up T."""

    tokens: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T], from 0 in every segment
    cu_seqlens: Tensor  # int32 [segments + 1]
    max_seqlen: int
    loss_positions: Tensor  # int64 [N], where in T the hidden state predicts a token that bears loss
    labels: Tensor  # int64 [N], those tokens
    sequence_ids: Tensor  # int64 [N], the sample's place in this micro-batch
    num_sequences: int
    sample_ids: tuple[int, ...]
    fields: dict[str, Tensor]  # [N] each

    def to(self, device: torch.device | str) -> "MicroBatch":
        return replace(
            self,
            tokens=self.tokens.to(device),
            position_ids=self.position_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            loss_positions=self.loss_positions.to(device),
            labels=self.labels.to(device),
            sequence_ids=self.sequence_ids.to(device),
            fields={name: values.to(device) for name, values in self.fields.items()},
        )


def collate(
    samples: Sequence[Sample], *, field_names: Sequence[str], pad_multiple: int = 1, min_tokens: int = 1
) -> MicroBatch:
    """Pack samples; no samples make a filler, which bears no loss but has every field.

    T is at least `min_tokens` and a multiple of `pad_multiple` (the tensor-parallel size under sequence parallelism);
    what is missing is a last segment of its own, made of token 0, which no sequence attends to.
    """
    assert pad_multiple >= 1 and min_tokens >= 1, (pad_multiple, min_tokens)
    for sample in samples:
        assert set(sample.fields) >= set(field_names), (sample.id, sorted(sample.fields), sorted(field_names))
    num_tokens = sum(len(sample) for sample in samples)
    padding = -(-max(num_tokens, min_tokens) // pad_multiple) * pad_multiple - num_tokens
    segments = [len(sample) for sample in samples] + [padding] * (padding > 0)
    cu_seqlens = torch.tensor([0, *segments]).cumsum(0)
    starts = cu_seqlens.tolist()

    tokens = torch.cat([*(sample.token_ids for sample in samples), torch.zeros(padding, dtype=torch.int64)])
    label_positions = _cat(
        [start + s.prompt_length + s.loss_mask.nonzero().flatten() for start, s in zip(starts, samples)], torch.int64
    )
    counts = torch.tensor([int(sample.loss_mask.sum()) for sample in samples], dtype=torch.int64)
    return MicroBatch(
        tokens=tokens[None],
        position_ids=torch.cat([torch.arange(length) for length in segments])[None],
        cu_seqlens=cu_seqlens.to(torch.int32),
        max_seqlen=max(segments),
        loss_positions=label_positions - 1,
        labels=tokens[label_positions],
        sequence_ids=torch.arange(len(samples)).repeat_interleave(counts),
        num_sequences=len(samples),
        sample_ids=tuple(sample.id for sample in samples),
        fields={name: _cat([s.fields[name][s.loss_mask] for s in samples], torch.float32) for name in field_names},
    )


def scatter_back(values: Tensor, micro_batch: MicroBatch) -> dict[int, Tensor]:
    """Split `[N, ...]` values by sample: sample id -> the values at its tokens that bear loss."""
    assert values.shape[:1] == micro_batch.labels.shape, (values.shape, micro_batch.labels.shape)
    counts = torch.bincount(micro_batch.sequence_ids, minlength=micro_batch.num_sequences)
    return dict(zip(micro_batch.sample_ids, values.split(counts.tolist())))


def _cat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """`torch.cat`, also of nothing."""
    return torch.cat([torch.empty(0, dtype=dtype), *parts])
