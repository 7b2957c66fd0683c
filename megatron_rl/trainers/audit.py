"""What samples must be before anything is learned from them, as counts of those that are not."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from megatron_rl.data.samples import Sample
from megatron_rl.types import Rollout, RolloutGroup

Example = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its response


def audit_rollouts(
    groups: Sequence[RolloutGroup], samples: Sequence[Sample], stop: Collection[int], texts: Collection[str] = ()
) -> dict[str, float]:
    """Of a rollout batch and the samples made of it, masks final. `stop` ids and `texts` end a response."""
    pairs = [(group, rollout) for group in groups for rollout in group.rollouts]
    examples = [(group.prompt.token_ids, rollout.token_ids) for group, rollout in pairs]
    figures = audit_samples(examples, samples)
    figures["audit/token_mismatch"] += sum(len(r.log_probs) != len(r.token_ids) for _, r in pairs)
    return figures | {"audit/finish_mismatch": float(sum(not _ends_as_it_says(r, stop, texts) for _, r in pairs))}


def audit_samples(examples: Sequence[Example], samples: Sequence[Sample]) -> dict[str, float]:
    """Prompt tokens that bear loss, and samples whose tokens are not those of their example."""
    inside = mismatched = 0
    for (prompt, response), sample in zip(examples, samples, strict=True):
        positions = sample.prompt_length + sample.loss_mask.nonzero().flatten()
        inside += int((positions < len(prompt)).sum())
        mismatched += sample.token_ids.tolist() != [*prompt, *response]
    return {"audit/prompt_loss": float(inside), "audit/token_mismatch": float(mismatched)}


def audit_padding(tokenizer: PreTrainedTokenizerBase, stop: Collection[int]) -> dict[str, float]:
    """1 where the tokenizer's padding token is one that ends a response. One without padding has no such trouble."""
    return {"audit/pad_is_eos": float(tokenizer.pad_token_id in stop)}


def _ends_as_it_says(rollout: Rollout, stop: Collection[int], texts: Collection[str]) -> bool:
    """A stopped response has one stop token, the last, or a stop text and no such token; one cut off has neither."""
    places = [place for place, token in enumerate(rollout.token_ids) if token in stop]
    by_text = any(text in rollout.text for text in texts)
    by_token = not by_text and rollout.finish_reason == "stop"
    return places == ([len(rollout.token_ids) - 1] if by_token else []) and by_text <= (rollout.finish_reason == "stop")
