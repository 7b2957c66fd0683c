"""Log-probabilities of labels, and entropies, from logits."""

import torch
from torch import Tensor, nn


def compute_entropy(logits: Tensor) -> Tensor:
    """-sum_v p_v log p_v with p = softmax(logits) over the last dimension: [..., V] to [...].

    At least float32. A logit of minus infinity is a token that cannot come, and adds 0. The trainers read entropies off
    hidden states, a piece of the vocabulary at a time (ops/linear_stats.py), so that they never hold logits [B, T, V].
    """
    logp = _float32(logits).log_softmax(-1)
    # p log p is 0 at p = 0, where log p is -inf.
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


def get_response_log_probs(
    model: nn.Module, input_ids: Tensor, labels: Tensor, return_token_entropy: bool = False
) -> dict[str, Tensor]:
    """`log_probs` [B, T] of the labels under the model, and on demand `token_entropy` [B, T]; at least float32.

    All positions have their value, those of the prompt and of the padding too: a response mask comes later. Right
    padding needs no attention mask, for a causal model does not look ahead. Both have gradients, so call it under
    `torch.no_grad()` where they are not wanted, as for old log-probabilities.

    The model is in whatever mode it is: dropout, if it has any, must be off for log-probabilities of the policy that
    sampled. The logits are taken as they are, at temperature 1; the trainers divide by `rollout.temperature`, so that
    the probabilities are those the tokens were drawn with.
    """
    if input_ids.shape != labels.shape:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)} and labels {list(labels.shape)}: give the label of each input"
        )
    logits = _float32(model(input_ids).logits)
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    result = {"log_probs": chosen - logits.logsumexp(-1)}
    if return_token_entropy:
        result["token_entropy"] = compute_entropy(logits)
    return result


def _float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
