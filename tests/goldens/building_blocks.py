"""Numeric cases of a course's helper functions, mapped onto `megatron_rl.building_blocks`; the adapter has them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from megatron_rl import building_blocks

Arrays = dict[str, np.ndarray]
Params = dict[str, Any]
Result = dict[str, Any]


def _tensors(inputs: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}


def tokenize_prompt_and_output(inputs: Arrays, params: Params) -> Result:
    """Only where the case's tokenizer is on this machine."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(params["tokenizer"], local_files_only=True)
    except (OSError, ValueError) as error:
        raise NotImplementedError(f"the tokenizer {params['tokenizer']} is not here") from error
    texts = params["prompt_strs"], params["output_strs"]
    result = building_blocks.tokenize_prompt_and_output(*texts, tokenizer)
    return {f"out.{name}": tensor.numpy() for name, tensor in result.items()}


def compute_entropy(inputs: Arrays, params: Params) -> Result:
    return {"out.array": building_blocks.compute_entropy(**_tensors(inputs)).numpy()}


def masked_mean(inputs: Arrays, params: Params) -> Result:
    return {"out.array": building_blocks.masked_mean(**_tensors(inputs), **params).numpy()}


def masked_normalize(inputs: Arrays, params: Params) -> Result:
    return {"out.array": building_blocks.masked_normalize(**_tensors(inputs), **params).numpy()}


def compute_group_normalized_rewards(inputs: Arrays, params: Params) -> Result:
    rewards = {str(row): float(reward) for row, reward in enumerate(inputs["raw_rewards_in"])}
    advantages, raw_rewards, _ = building_blocks.compute_group_normalized_rewards(
        lambda response, truth: {"reward": rewards[response]}, list(rewards), [""] * len(rewards), **params
    )
    return {"out.normalized_rewards": advantages.numpy(), "out.raw_rewards": raw_rewards.numpy()}


def compute_naive_policy_gradient_loss(inputs: Arrays, params: Params) -> Result:
    return {"out.array": building_blocks.compute_naive_policy_gradient_loss(**_tensors(inputs)).numpy()}


def compute_grpo_clip_loss(inputs: Arrays, params: Params) -> Result:
    return {"out.array": building_blocks.compute_grpo_clip_loss(**_tensors(inputs), **params)[0].numpy()}


def sft_microbatch_train_step(inputs: Arrays, params: Params) -> Result:
    tensors = _tensors(inputs)
    tensors["policy_log_probs"].requires_grad_()
    return _step(building_blocks.sft_microbatch_train_step(**tensors, **params)[0], tensors)


def grpo_microbatch_train_step(inputs: Arrays, params: Params) -> Result:
    tensors = _tensors(inputs)
    tensors["policy_log_probs"].requires_grad_()
    return _step(building_blocks.grpo_microbatch_train_step(**tensors, **params)[0], tensors)


def _step(loss: Tensor, tensors: dict[str, Tensor]) -> Result:
    gradient = tensors["policy_log_probs"].grad
    assert gradient is not None
    return {"out.loss": loss.numpy(), "grad.loss.policy_log_probs": gradient.numpy()}


OPS = {
    "cs336_compute_entropy": compute_entropy,
    "cs336_compute_grpo_clip_loss": compute_grpo_clip_loss,
    "cs336_compute_naive_policy_gradient_loss": compute_naive_policy_gradient_loss,
    "cs336_grpo_microbatch_train_step": grpo_microbatch_train_step,
    "cs336_masked_mean": masked_mean,
    "cs336_masked_normalize": masked_normalize,
    "cs336_sft_microbatch_train_step": sft_microbatch_train_step,
    "cs336_tokenize_prompt_and_output": tokenize_prompt_and_output,
}
