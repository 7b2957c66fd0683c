"""Policy-gradient losses, one per token [B, T]; nothing is masked or averaged yet."""

from typing import Literal, get_args

from torch import Tensor

from megatron_rl.algorithms.policy_loss import ppo_clip

LossType = Literal["no_baseline", "reinforce_with_baseline", "grpo_clip"]


def compute_naive_policy_gradient_loss(raw_rewards_or_advantages: Tensor, policy_log_probs: Tensor) -> Tensor:
    """-A log p [B, T], with one A per response [B, 1] or per token [B, T].

    The same as the trainers' `reinforce`.
    """
    _check_shape("raw_rewards_or_advantages", raw_rewards_or_advantages, policy_log_probs)
    return -raw_rewards_or_advantages * policy_log_probs


def compute_grpo_clip_loss(
    advantages: Tensor, policy_log_probs: Tensor, old_log_probs: Tensor, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(r A, clip(r, 1 - cliprange, 1 + cliprange) A) [B, T], with r = exp(policy_log_probs - old_log_probs).

    `advantages` are [B, 1] or [B, T]. The figures are `clipped` [B, T] bool: where the clipped branch is the smaller
    one, so that the token has no gradient.

    It is the trainers' `ppo_clip` without two bounds. They clamp the log-ratio to -20..20, for its exponential
    overflows near 89 and would leave NaN in the gradient; and their dual clip keeps the loss of a bad response from
    growing with r.
    """
    _check_shape("advantages", advantages, policy_log_probs)
    _check_shape("old_log_probs", old_log_probs, policy_log_probs, per_token=True)
    if cliprange < 0:
        raise ValueError(f"cliprange is {cliprange}; ratios are clipped to 1 - cliprange .. 1 + cliprange: give >= 0")
    # Old log-probabilities are constants: had they the new ones' graph, nothing would be learned.
    old_log_probs = old_log_probs.detach()
    ratio = (policy_log_probs - old_log_probs).exp()
    terms = ppo_clip(
        policy_log_probs,
        old_log_probs,
        advantages,
        clip_low=cliprange,
        clip_high=cliprange,
        dual_clip=None,
        ratio=ratio,
    )
    return terms.loss, {"clipped": terms.clipped}


def compute_policy_gradient_loss(
    policy_log_probs: Tensor,
    loss_type: LossType,
    raw_rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    cliprange: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [B, T] called `loss_type`, and its figures; each takes what it needs, and leaves the rest alone.

    `no_baseline` is -r log p of the raw rewards, `reinforce_with_baseline` -A log p of the advantages, and `grpo_clip`
    is `compute_grpo_clip_loss` of the advantages, the old log-probabilities and the clip range.
    """
    if loss_type not in get_args(LossType):
        raise ValueError(f"loss_type is {loss_type!r}; choose one of {', '.join(get_args(LossType))}")
    if loss_type == "no_baseline":
        if raw_rewards is None:
            raise _missing(loss_type, "raw_rewards")
        return compute_naive_policy_gradient_loss(raw_rewards, policy_log_probs), {}
    if advantages is None:
        raise _missing(loss_type, "advantages")
    if loss_type == "reinforce_with_baseline":
        return compute_naive_policy_gradient_loss(advantages, policy_log_probs), {}
    if old_log_probs is None:
        raise _missing(loss_type, "old_log_probs")
    if cliprange is None:
        raise _missing(loss_type, "cliprange")
    return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)


def _missing(loss_type: str, name: str) -> ValueError:
    return ValueError(f"loss_type {loss_type} needs {name}, which is None")


def _check_shape(name: str, given: Tensor, log_probs: Tensor, *, per_token: bool = False) -> None:
    """One number per response must be a column: [B] would be taken for one per token where B = T."""
    column = (*log_probs.shape[:-1], 1)
    if given.shape == log_probs.shape or (given.shape == column and not per_token):
        return
    shapes = f"{list(log_probs.shape)}" if per_token else f"{list(column)} or {list(log_probs.shape)}"
    hint = f"; {name}[:, None] is a column" if given.dim() == 1 and not per_token else ""
    raise ValueError(f"{name} has shape {list(given.shape)}, where {shapes} goes with policy_log_probs{hint}")
