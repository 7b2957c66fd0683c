"""Packing: values worked out by hand, and a round trip for any samples."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.data.collate import collate, scatter_back
from megatron_rl.data.samples import Sample


def make_sample(id: int, prompt: Sequence[int], response: Sequence[int], mask: Sequence[int], **fields: list) -> Sample:
    return Sample(
        id=id,
        token_ids=torch.tensor([*prompt, *response], dtype=torch.int64),
        prompt_length=len(prompt),
        loss_mask=torch.tensor(mask, dtype=torch.bool),
        fields={name: torch.tensor(values, dtype=torch.float32) for name, values in fields.items()},
    )


FIRST = make_sample(7, [11, 12], [13, 14, 15], [1, 0, 1], weights=[0.5, 0.25, 0.125])
SECOND = make_sample(3, [21], [22, 23], [1, 1], weights=[2, 4])
MASKED = make_sample(5, [31, 32], [33], [0], weights=[9])


def assert_equal(tensor: Tensor, values: list, dtype: torch.dtype = torch.int64) -> None:
    torch.testing.assert_close(tensor, torch.tensor(values, dtype=dtype), rtol=0, atol=0)


def test_two_samples_with_padding() -> None:
    batch = collate([FIRST, SECOND], field_names=["weights"], pad_multiple=6)
    # The layout of T:             0   1   2   3   4 | 5   6   7 | 8 .. 11 fill up to a multiple of 6
    assert_equal(batch.tokens, [[11, 12, 13, 14, 15, 21, 22, 23, 0, 0, 0, 0]])
    assert_equal(batch.position_ids, [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    assert_equal(batch.cu_seqlens, [0, 5, 8, 12], torch.int32)
    assert batch.max_seqlen == 5
    # 13 is predicted at position 1, 15 at 3 (14 bears no loss), 22 at 5, 23 at 6.
    assert_equal(batch.loss_positions, [1, 3, 5, 6])
    assert_equal(batch.labels, [13, 15, 22, 23])
    assert_equal(batch.sequence_ids, [0, 0, 1, 1])
    assert_equal(batch.fields["weights"], [0.5, 0.125, 2, 4], torch.float32)
    assert batch.num_sequences == 2
    assert batch.sample_ids == (7, 3)


def test_no_padding_segment_where_none_is_needed() -> None:
    batch = collate([FIRST, SECOND], field_names=["weights"], pad_multiple=2)
    assert_equal(batch.cu_seqlens, [0, 5, 8], torch.int32)
    assert batch.tokens.shape == (1, 8)


def test_a_sample_whose_tokens_bear_no_loss_keeps_its_place() -> None:
    batch = collate([MASKED, SECOND], field_names=["weights"])
    assert_equal(batch.labels, [22, 23])
    assert_equal(batch.sequence_ids, [1, 1])
    assert batch.num_sequences == 2
    parts = scatter_back(torch.tensor([1.0, 2.0]), batch)
    assert {id: part.tolist() for id, part in parts.items()} == {5: [], 3: [1.0, 2.0]}


@pytest.mark.parametrize(
    ("pad_multiple", "min_tokens", "tokens"), [(1, 1, 1), (1, 4, 4), (4, 1, 4), (4, 4, 4), (4, 6, 8)]
)
def test_filler(pad_multiple: int, min_tokens: int, tokens: int) -> None:
    batch = collate([], field_names=["weights", "advantages"], pad_multiple=pad_multiple, min_tokens=min_tokens)
    assert_equal(batch.tokens, [[0] * tokens])
    assert_equal(batch.position_ids, [list(range(tokens))])
    assert_equal(batch.cu_seqlens, [0, tokens], torch.int32)
    assert batch.max_seqlen == tokens
    assert batch.num_sequences == 0 and batch.sample_ids == ()
    for values in (batch.loss_positions, batch.labels, batch.sequence_ids):
        assert_equal(values, [])
    assert list(batch.fields) == ["weights", "advantages"]
    for values in batch.fields.values():
        assert_equal(values, [], torch.float32)
    assert scatter_back(torch.empty(0), batch) == {}


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    ids = draw(st.lists(st.integers(0, 1000), unique=True, max_size=6))
    samples = []
    for id in ids:
        prompt = draw(st.lists(st.integers(1, 99), min_size=1, max_size=5))
        response = draw(st.lists(st.integers(1, 99), max_size=6))
        mask = draw(st.lists(st.integers(0, 1), min_size=len(response), max_size=len(response)))
        samples.append(make_sample(id, prompt, response, mask, place=[float(t) for t in range(len(response))]))
    return samples


@settings(max_examples=80, deadline=None)
@given(sample_lists(), st.integers(1, 4), st.integers(1, 8))
def test_round_trip(samples: list[Sample], pad_multiple: int, min_tokens: int) -> None:
    batch = collate(samples, field_names=["place"], pad_multiple=pad_multiple, min_tokens=min_tokens)
    num_tokens = batch.tokens.shape[1]
    assert num_tokens % pad_multiple == 0 and num_tokens >= min_tokens
    assert num_tokens < max(sum(map(len, samples)), min_tokens) + pad_multiple
    bounds = batch.cu_seqlens.tolist()
    assert bounds[-1] == num_tokens and batch.max_seqlen == max(b - a for a, b in pairwise(bounds))
    for start, end in pairwise(bounds):
        assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
    for start, end, sample in zip(bounds, bounds[1:], samples):
        assert torch.equal(batch.tokens[0, start:end], sample.token_ids)

    labels = scatter_back(batch.labels, batch)
    places = scatter_back(batch.fields["place"], batch)
    positions = scatter_back(batch.loss_positions, batch)
    assert list(labels) == [sample.id for sample in samples]
    for start, sample in zip(bounds, samples):
        response = sample.token_ids[sample.prompt_length :]
        assert torch.equal(labels[sample.id], response[sample.loss_mask])
        assert torch.equal(response[places[sample.id].long()], labels[sample.id])
        assert torch.equal(positions[sample.id], start + sample.prompt_length - 1 + places[sample.id].long())


def test_scatter_back_keeps_trailing_dimensions() -> None:
    batch = collate([FIRST, SECOND], field_names=["weights"])
    parts = scatter_back(torch.arange(8).view(4, 2), batch)
    assert parts[7].tolist() == [[0, 1], [2, 3]]
    assert parts[3].tolist() == [[4, 5], [6, 7]]


def test_to_moves_every_tensor() -> None:
    batch = collate([FIRST], field_names=["weights"]).to("meta")
    tensors = [batch.tokens, batch.position_ids, batch.cu_seqlens, batch.loss_positions, batch.labels]
    tensors += [batch.sequence_ids, *batch.fields.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.sample_ids == (7,) and batch.max_seqlen == 5


def test_field_sets_must_agree() -> None:
    with pytest.raises(AssertionError):
        collate([FIRST, make_sample(1, [1], [2], [1])], field_names=["weights"])
    assert collate([FIRST], field_names=[]).fields == {}  # what is not asked for is left out


def test_samples_are_checked() -> None:
    with pytest.raises(AssertionError):  # no prompt
        make_sample(0, [], [1, 2], [1, 1])
    with pytest.raises(AssertionError):  # a mask that covers the prompt too
        make_sample(0, [1], [2], [1, 1])
    with pytest.raises(AssertionError):  # a field of another length
        make_sample(0, [1], [2], [1], weights=[1.0, 1.0])
    tokens = torch.tensor([1, 2])
    with pytest.raises(AssertionError):  # a mask of numbers
        Sample(id=0, token_ids=tokens, prompt_length=1, loss_mask=torch.ones(1), fields={})
    with pytest.raises(AssertionError):  # double precision
        mask, weights = torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
        Sample(id=0, token_ids=tokens, prompt_length=1, loss_mask=mask, fields={"weights": weights})
