"""The loss of one micro-batch and its backward pass, for gradients that are accumulated over several."""

from torch import Tensor

from megatron_rl.building_blocks.losses import LossType, compute_policy_gradient_loss
from megatron_rl.building_blocks.masked import masked_mean, masked_normalize


def sft_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean_i(sum_t -log p_it m_it / normalize_constant) / gradient_accumulation_steps, after its backward pass.

    `policy_log_probs` and `response_mask` are [B, T]; a token of the mask gets the gradient -1 / (B normalize_constant
    gradient_accumulation_steps). The loss comes back as it was differentiated, scaled down; `nll`, among the figures,
    is the mean over the tokens of the mask, which is comparable between batches, and `response_tokens` their number.

    Rows without a token count in B. With a constant of 1 a long response weighs more than a short one. The trainers'
    mode seq-mean-token-sum-norm is the same for a mini-batch without such rows; their `token-mean` divides by the
    tokens of the whole mini-batch, however it is cut into micro-batches.
    """
    _check_steps(gradient_accumulation_steps)
    negative = -policy_log_probs
    sums = masked_normalize(negative, response_mask, dim=-1, normalize_constant=normalize_constant)
    loss = sums.mean() / gradient_accumulation_steps
    loss.backward()
    figures = {"nll": masked_mean(negative.detach(), response_mask), "response_tokens": response_mask.sum()}
    return loss.detach(), figures


def grpo_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    loss_type: LossType,
    raw_rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    cliprange: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean_i(mean_t of the loss over the tokens of the mask) / gradient_accumulation_steps, after its backward pass.

    The loss per token is that of `compute_policy_gradient_loss`, and what lies outside of the mask does not matter. The
    figures are those of the loss; for `grpo_clip` also `clip_fraction`, the mean of `clipped` over the mask.

    Micro-batches of one size add up to the mean of the whole batch. It is the trainers' seq-mean-token-mean, whose
    weights are of the global mini-batch and do not need equal sizes. A row without a token has no mean and is refused,
    before its NaN reaches the model; the trainers leave such a row out.
    """
    _check_steps(gradient_accumulation_steps)
    # A ratio that overflows in the padding would reach the gradient as 0 times infinity.
    log_probs = _inside("policy_log_probs", policy_log_probs, response_mask)
    old = None if old_log_probs is None else _inside("old_log_probs", old_log_probs, response_mask)
    empty = (response_mask != 0).sum(-1) == 0
    if bool(empty.any()):
        raise ValueError(
            f"response_mask has no token in rows {empty.nonzero().flatten().tolist()}, and the mean over none is "
            "0 / 0: leave these responses out"
        )
    per_token, figures = compute_policy_gradient_loss(log_probs, loss_type, raw_rewards, advantages, old, cliprange)
    loss = masked_mean(per_token, response_mask, dim=-1).mean() / gradient_accumulation_steps
    loss.backward()
    if "clipped" in figures:
        figures["clip_fraction"] = masked_mean(figures["clipped"].to(per_token.dtype), response_mask)
    return loss.detach(), figures


def _check_steps(gradient_accumulation_steps: int) -> None:
    if gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps is {gradient_accumulation_steps}, and the loss is divided by it: give the "
            "number of micro-batches between two steps of the optimizer, at least 1"
        )


def _inside(name: str, log_probs: Tensor, mask: Tensor) -> Tensor:
    """The log-probabilities where the mask is, 0 elsewhere."""
    if log_probs.shape != mask.shape:
        raise ValueError(
            f"{name} has shape {list(log_probs.shape)} and response_mask {list(mask.shape)}: give one number per token"
        )
    return log_probs.where(mask != 0, 0)
