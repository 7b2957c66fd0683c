"""The pieces of a training loop as functions of plain tensors [B, T], for teaching and for loops of one's own.

Names, argument order and values are those that courses on the subject use. They need no config, no mesh and no
Megatron-Core: any model that maps `input_ids` to `.logits` will do, on one device. Where a trainer of this package
does the same otherwise, the docstring says how and why. docs/building_blocks.md has an example of each, and two whole
loops.
"""

from megatron_rl.building_blocks.advantages import RewardFunction, compute_group_normalized_rewards
from megatron_rl.building_blocks.log_probs import compute_entropy, get_response_log_probs
from megatron_rl.building_blocks.losses import (
    LossType,
    compute_grpo_clip_loss,
    compute_naive_policy_gradient_loss,
    compute_policy_gradient_loss,
)
from megatron_rl.building_blocks.masked import masked_mean, masked_normalize
from megatron_rl.building_blocks.steps import grpo_microbatch_train_step, sft_microbatch_train_step
from megatron_rl.building_blocks.tokens import tokenize_prompt_and_output

__all__ = [
    "LossType",
    "RewardFunction",
    "compute_entropy",
    "compute_group_normalized_rewards",
    "compute_grpo_clip_loss",
    "compute_naive_policy_gradient_loss",
    "compute_policy_gradient_loss",
    "get_response_log_probs",
    "grpo_microbatch_train_step",
    "masked_mean",
    "masked_normalize",
    "sft_microbatch_train_step",
    "tokenize_prompt_and_output",
]
