"""One training sequence, before packing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rl.algorithms.reduction import token_weights
from megatron_rl.types import Demonstration


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt, its response, and one value per response token for each field.

    `id` is unique in the mini-batch. `loss_mask` says which response tokens bear loss. `fields` are what the loss
    reads beside the labels: "weights", "advantages", "old_log_probs", ...
    """

    id: int
    token_ids: Tensor  # int64 [n], prompt then response
    prompt_length: int
    loss_mask: Tensor  # bool [n - prompt_length]
    fields: Mapping[str, Tensor]  # float32 [n - prompt_length]

    def __post_init__(self) -> None:
        assert self.token_ids.dtype == torch.int64 and self.token_ids.ndim == 1, (self.id, self.token_ids)
        # The first response token is predicted from the last prompt token, so there must be one.
        assert 1 <= self.prompt_length <= len(self), (self.id, self.prompt_length, len(self))
        assert self.loss_mask.dtype == torch.bool, (self.id, self.loss_mask.dtype)
        assert self.loss_mask.shape == (self.response_length,), (self.id, self.loss_mask.shape, self.response_length)
        for name, values in self.fields.items():
            assert values.dtype == torch.float32, (self.id, name, values.dtype)
            assert values.shape == (self.response_length,), (self.id, name, values.shape, self.response_length)

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    @property
    def response_length(self) -> int:
        return len(self) - self.prompt_length

    def with_field(self, name: str, values: Tensor) -> "Sample":
        """A copy with one more field."""
        return replace(self, fields={**self.fields, name: values.float()})

    def with_constant(self, name: str, value: float) -> "Sample":
        """A copy with one more field, the same at every response token."""
        return self.with_field(name, torch.full((self.response_length,), value))

    def with_loss_field(self, name: str, values: Tensor) -> "Sample":
        """A copy with one more field, known only at the tokens that bear loss; it is zero at the others."""
        full = torch.zeros(self.response_length)
        full[self.loss_mask] = values.float()
        return self.with_field(name, full)

    def without_loss(self) -> "Sample":
        """A copy none of whose tokens bears loss."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))


def from_example(sample_id: int, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Sample:
    """A prompt and a response, demonstrated or drawn: every response token bears loss."""
    return Sample(
        id=sample_id,
        token_ids=torch.tensor([*prompt_ids, *response_ids], dtype=torch.int64),
        prompt_length=len(prompt_ids),
        loss_mask=torch.ones(len(response_ids), dtype=torch.bool),
        fields={},
    )


def from_demonstration(sample_id: int, demonstration: Demonstration) -> Sample:
    """Its learned tokens bear loss."""
    sample = from_example(sample_id, demonstration.prompt.token_ids, demonstration.token_ids)
    return replace(sample, loss_mask=torch.tensor(demonstration.learned, dtype=torch.bool))


def weighed(samples: Sequence[Sample], mode: str, *, horizon: float | None = None) -> list[Sample]:
    """The samples of one mini-batch with their tokens' weights. Masks are final from here on."""
    weights = token_weights([sample.loss_mask for sample in samples], mode, horizon=horizon)
    return [sample.with_field("weights", weight) for sample, weight in zip(samples, weights)]


def weighed_targets(
    samples: Sequence[Sample], factors: Sequence[float | None], mode: str, *, horizon: int | None = None
) -> list[Sample]:
    """The samples of one mini-batch with the field `distill_weights`.

    Those are the weights of the tokens that have a target, times the response's factor; where the factor is None, the
    response has no target, and its tokens weigh 0.
    """
    masks = [sample.loss_mask & (factor is not None) for sample, factor in zip(samples, factors, strict=True)]
    weights = token_weights(masks, mode, horizon=horizon)
    return [
        sample.with_field("distill_weights", weight * (factor or 0.0))
        for sample, weight, factor in zip(samples, weights, factors)
    ]
