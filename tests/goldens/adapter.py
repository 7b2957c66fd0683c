"""Numeric cases of other RL libraries, mapped onto the functions of this one.

`OPS[operation](inputs, params)` takes and returns NumPy arrays; the keys of the result are `out.<name>`,
`grad.<output>.<input>` and `metric.<name>`. Nothing is computed here: arrays [B, T] become flat tensors over the tokens
of the mask, the package's functions are called, and gradients are scattered back. A case that asks for something the
package does not have, or does differently by design, raises NotImplementedError; the inputs alone decide.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rl.algorithms import advantages, distill, importance, policy_loss, rollout_correction
from megatron_rl.algorithms.distill import Tail
from megatron_rl.algorithms.ema_weights import StepAverages, with_gradient
from megatron_rl.algorithms.kl import kl
from megatron_rl.algorithms.overlong import overlong_penalty
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.algorithms.reduction import MODES, token_weights
from megatron_rl.data.collate import MicroBatch
from megatron_rl.data.reprompt import (
    Feedback,
    RepromptOptions,
    TeacherContext,
    context_metrics,
    evidence,
    teacher_prompt,
)
from megatron_rl.ops import ema
from megatron_rl.ops.divergence import Head, Pair, Support, full_divergence, mixed_head, paired_stats
from megatron_rl.ops.linear_stats import LinearStats, linear_stats
from megatron_rl.ops.scan import exponential_average
from megatron_rl.ops.vocab_shard import VocabShard
from megatron_rl.types import Prompt, Reward, Rollout, RolloutGroup
from tests.goldens import building_blocks, critic

Arrays = dict[str, np.ndarray]
Params = dict[str, Any]
Result = dict[str, Any]  # arrays and numbers
Loss = Callable[..., PolicyLoss]

# Denominators of verl and NeMo are count + 1e-8, ours are the counts.
_EPSILON = 1e-8
# Within these bounds on |logp - old_logp| no ratio is clamped, neither per token nor per sequence.
_MAX_LOG_RATIO, _MAX_SEQUENCE_LOG_RATIO = 20.0, 10.0
# Within these bounds on ref_logp - logp the estimate k3 is below 10, where it is bounded.
_MIN_K3_LOG_RATIO, _MAX_K3_LOG_RATIO = -10.9, 2.6
_MAX_KL = 10.0


def _unsupported(condition: bool, reason: str) -> None:
    if condition:
        raise NotImplementedError(reason)


def _only_neutral(params: Params, **neutral: Any) -> None:
    """Options the package does not have may only be absent, None, or the value that switches them off."""
    for name, value in neutral.items():
        _unsupported(params.get(name) not in (None, value), f"no option like {name} = {params.get(name)}")


# Advantages


def _refuse_raw_singletons(scores: np.ndarray, groups: np.ndarray) -> None:
    """For references where the baseline of a group of one is 0."""
    _, ids, counts = np.unique(groups, return_inverse=True, return_counts=True)
    raw = bool((scores[counts[ids.reshape(-1)] == 1] != 0).any())
    _unsupported(raw, "a group of one has advantage 0, not its raw score")


def _refuse_leaks(rewards: np.ndarray, groups: np.ndarray) -> None:
    """For references that divide by a standard deviation of equal rewards."""
    for group in np.unique(groups):
        values = rewards[groups == group]
        exact = np.arange(1, len(values) + 1) * np.longdouble(values[0])
        rounded = bool((np.cumsum(values, dtype=values.dtype) != exact).any())
        leaks = rounded and bool((values == values[0]).all())
        _unsupported(leaks, "equal rewards give exactly 0; a mean that is rounded, divided by eps, does not")


def _refuse_equal(values: np.ndarray, scores: np.ndarray) -> None:
    """For references that whiten values which are all equal, or none."""
    equal = len(values) == 0 or bool((values == values[0]).all())
    _unsupported(
        equal and bool(scores.any()), "equal values whiten to exactly 0; what is rounded, divided by eps, does not"
    )


def _group_ids(groups: np.ndarray) -> Tensor:
    return torch.from_numpy(np.unique(groups, return_inverse=True)[1].reshape(-1))


def _grpo(rewards: np.ndarray, groups: np.ndarray, by_std: bool) -> np.ndarray:
    if by_std:
        _refuse_leaks(rewards, groups)
    return advantages.grpo(torch.from_numpy(rewards), _group_ids(groups), normalize_by_std=by_std).numpy()


def _verl_by_group(
    estimate: Callable[..., Tensor], *, scaled: bool = False, zero_singletons: bool = False
) -> Callable[[Arrays, Params], Result]:
    """An estimator with one number per response, which may divide by the standard deviation (`scaled`)."""

    def run(inputs: Arrays, params: Params) -> Result:
        _only_neutral(params, f_norm=1.0)
        scores, groups = inputs["token_level_rewards"].sum(-1), inputs["index"]
        if not zero_singletons:
            _refuse_raw_singletons(scores, groups)
        options: Params = {}
        if scaled:
            by_std = params.get("norm_adv_by_std_in_grpo", True)
            options = {"normalize_by_std": by_std, "eps": params.get("epsilon", 1e-6)}
            if by_std:
                _refuse_leaks(scores, groups)
        values = estimate(torch.from_numpy(scores), _group_ids(groups), **options).numpy()
        spread = values[:, None] * inputs["response_mask"]
        return {"out.advantages": spread, "out.returns": spread}

    return run


def _verl_opo(inputs: Arrays, params: Params) -> Result:
    lengths, groups = inputs["response_mask"].sum(-1), inputs["index"]
    idle = any(not lengths[groups == group].any() for group in np.unique(groups))
    _unsupported(idle, "a group without tokens has no baseline, and is not 0 / 0")
    return _verl_by_group(lambda rewards, ids: advantages.opo(rewards, ids, torch.from_numpy(lengths)))(inputs, params)


def _verl_reinforce_plus_plus(inputs: Arrays, params: Params) -> Result:
    mask = inputs["response_mask"] > 0
    rewards, gamma = _flat(inputs["token_level_rewards"], mask), params["gamma"]
    returns = advantages.returns_to_go(rewards, _ids(mask), gamma=gamma)
    _refuse_equal(returns.numpy(), returns.numpy())
    values = advantages.reinforce_plus_plus(rewards, _ids(mask), gamma=gamma)
    return {"out.advantages": _onto(values, mask), "out.returns": _onto(returns, mask)}


def _verl_reinforce_plus_plus_baseline(inputs: Arrays, params: Params) -> Result:
    scores, groups, mask = inputs["token_level_rewards"].sum(-1), inputs["index"], inputs["response_mask"] > 0
    _refuse_raw_singletons(scores, groups)
    _refuse_equal(_grpo(scores, groups, by_std=False)[np.nonzero(mask)[0]], scores)
    values = advantages.reinforce_plus_plus_baseline(torch.from_numpy(scores), _group_ids(groups), _ids(mask))
    return {"out.advantages": _onto(values, mask), "out.returns": _onto(values, mask)}


def _verl_gdpo(inputs: Arrays, params: Params) -> Result:
    """Of one reward: that of GRPO, whitened."""
    scores, groups, mask = inputs["token_level_rewards"].sum(-1), inputs["index"], inputs["response_mask"] > 0
    _refuse_raw_singletons(scores, groups)
    values = torch.from_numpy(_grpo(scores, groups, by_std=True))[_ids(mask)]
    _refuse_equal(values.numpy(), scores)
    whitened = _onto(advantages.whiten(values), mask)
    return {"out.advantages": whitened, "out.returns": whitened}


def _carried(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Where a row has a gap, what verl leaves there: the value of the next token, 0 after the last one."""
    result = np.where(mask, values, 0)
    for t in reversed(range(mask.shape[1] - 1)):
        result[:, t] = np.where(mask[:, t], values[:, t], result[:, t + 1])
    return result


def _verl_remax(inputs: Arrays, params: Params) -> Result:
    mask, baselines = inputs["response_mask"] > 0, torch.from_numpy(inputs["reward_baselines"])
    rewards, ids = _flat(inputs["token_level_rewards"], mask), _ids(mask)
    returns = _carried(_onto(advantages.returns_to_go(rewards, ids), mask), mask)
    values = _onto(advantages.remax_to_go(rewards, ids, baselines), mask)
    return {"out.advantages": np.where(mask, values, returns), "out.returns": returns}


def _gae(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    return advantages.gae(_flat(rewards, mask), _flat(values, mask), _ids(mask), gamma=gamma, lam=lam)


def _verl_gae(inputs: Arrays, params: Params) -> Result:
    mask, values = inputs["response_mask"] > 0, inputs["values"]
    raw, returns = _gae(inputs["token_level_rewards"], values, mask, params["gamma"], params["lam"])
    result = {"out.returns": np.where(mask, _onto(returns, mask), _carried(_onto(raw, mask), mask) + values)}
    # After the last token verl leaves a 0 that it has whitened.
    if mask[:, -1].all():
        _refuse_equal(raw.numpy(), raw.numpy())
        result["out.advantages"] = _carried(_onto(advantages.whiten(raw), mask), mask)
    return result


def _slime_gae(inputs: Arrays, params: Params) -> Result:
    shape = inputs["rewards"].shape
    raw, returns = _gae(inputs["rewards"], inputs["values"], np.ones(shape, bool), params["gamma"], params["lambd"])
    values = raw.numpy().reshape(shape)
    return {
        "out.advantages": values,
        "out.chunked_advantages": values,
        "out.returns": returns.numpy().reshape(shape),
    }


def _masked_whiten(inputs: Arrays, params: Params) -> Result:
    mask, values = inputs["mask"] > 0, inputs["values"]
    _unsupported(not mask.all(), "tokens that bear no loss are not whitened along")
    _refuse_equal(values[mask], values)
    return {"out.shift": _onto(advantages.whiten(_flat(values, mask)), mask)}


def _cs336_group_normalized_rewards(inputs: Arrays, params: Params) -> Result:
    rewards = inputs["raw_rewards_in"]
    _unsupported(params["group_size"] == 1, "the standard deviation of one sample is not defined")
    if params["normalize_by_std"]:
        _refuse_leaks(rewards, np.arange(len(rewards)) // params["group_size"])
    return building_blocks.compute_group_normalized_rewards(inputs, params)


def _nemo_grpo_advantage(inputs: Arrays, params: Params) -> Result:
    rewards, by_std = inputs["rewards"], params["normalize_rewards"]
    groups = np.unique(inputs["prompt_ids"], axis=0, return_inverse=True)[1].reshape(-1)
    if params["use_leave_one_out_baseline"]:
        _unsupported(by_std, "no standard deviation of the others, with use_leave_one_out_baseline")
        return {"out.advantages": advantages.rloo(torch.from_numpy(rewards), _group_ids(groups)).numpy()}
    return {"out.advantages": _grpo(rewards, groups, by_std)}


# Reductions


def _weights(mask: np.ndarray, mode: str, *, horizon: float | None = None, others: list[int] | None = None) -> Tensor:
    """Weights [B, T] of a mini-batch that also has sequences of `others` tokens, which lie elsewhere."""
    _unsupported(mode not in MODES, f"no aggregation {mode}")
    _unsupported(horizon is not None and horizon != int(horizon), "the horizon is a number of tokens")
    masks = [torch.from_numpy(row) for row in mask] + [torch.ones(n, dtype=torch.bool) for n in others or []]
    weights = token_weights(masks, mode, horizon=None if horizon is None else int(horizon))
    return torch.stack(weights[: len(mask)])


def _verl_weights(mask: np.ndarray, params: Params, mode: str) -> Tensor:
    """verl's denominators: those of these rows, or given for a mini-batch of which other ranks have the rest."""
    others: list[int] = []
    tokens, sequences = params.get("batch_num_tokens"), params.get("global_batch_size")
    if mode == "token-mean" and tokens is not None:
        others = [int(tokens) - int(mask.sum())]
        _unsupported(others[0] < 0, "the mini-batch has fewer tokens than its part")
    elif mode != "token-mean" and sequences is not None:
        _unsupported(not mask.any(1).all(), "a sequence without tokens is not counted in the mini-batch")
        others = [1] * (int(sequences) - len(mask))
    else:
        _unsupported(not mask.any(), "nothing to average weighs 0, and is not 0 / 0")
    horizon = params.get("loss_scale_factor") or mask.shape[1]
    weights = _weights(mask, mode, horizon=horizon, others=others) * (params.get("dp_size") or 1)
    return _as_verl(weights, mask) if mode == "seq-mean-token-mean" else weights


def _as_verl(weights: Tensor, mask: np.ndarray) -> Tensor:
    """From means over the tokens of a row to sums divided by their count + 1e-8."""
    counts = torch.from_numpy(mask.sum(1, keepdims=True)).double()
    return weights * counts / (counts + _EPSILON)


def _agg_loss(inputs: Arrays, params: Params) -> Result:
    mask = inputs["loss_mask"] > 0
    return _reduced(inputs["loss_mat"], mask, _verl_weights(mask, params, params["loss_agg_mode"]), "loss_mat")


def _agg_loss_fork(inputs: Arrays, params: Params) -> Result:
    divided = params["loss_agg_mode"] != "seq-mean-token-sum-norm"
    _unsupported(not divided, "seq-mean-token-sum-norm divides by the number of sequences too")
    return _agg_loss(inputs, params)


def _reduced(values: np.ndarray, mask: np.ndarray, weights: Tensor, name: str) -> Result:
    leaf = torch.from_numpy(values[mask]).requires_grad_()
    loss = (weights[torch.from_numpy(mask)] * leaf).sum()
    loss.backward()
    return {"out.loss": loss.item(), f"grad.loss.{name}": _scattered(leaf, mask)}


def _scattered(leaf: Tensor, mask: np.ndarray) -> np.ndarray:
    assert leaf.grad is not None
    result = np.zeros(mask.shape, leaf.grad.numpy().dtype)
    result[mask] = leaf.grad.numpy()
    return result


# Policy losses


def _flat(array: np.ndarray, mask: np.ndarray) -> Tensor:
    return torch.from_numpy(np.broadcast_to(array, mask.shape)[mask])


def _ids(mask: np.ndarray) -> Tensor:
    """To which row each token of the mask belongs."""
    return torch.from_numpy(np.nonzero(mask)[0])


def _policy_case(
    logp: np.ndarray,
    old_logp: np.ndarray,
    advantage: np.ndarray,
    mask: np.ndarray,
    weights: Tensor,
    *,
    loss: Loss = policy_loss.ppo_clip,
    penalty: Callable[[Tensor], Tensor] | None = None,
    name: str = "log_prob",
    **options: Any,
) -> tuple[Result, PolicyLoss]:
    """The loss `sum(weights * terms) + penalty(logp)` and its gradient, and the terms."""
    leaf = _flat(logp, mask).requires_grad_()
    sequences = (_ids(mask), len(mask)) if loss in (policy_loss.gspo, policy_loss.geo_mean) else ()
    terms = loss(leaf, _flat(old_logp, mask), _flat(advantage, mask), *sequences, **options)
    total = (weights[torch.from_numpy(mask)] * terms.loss).sum()
    if penalty is not None:
        total = total + penalty(leaf)
    total.backward()
    return {"out.loss": total.item(), f"grad.loss.{name}": _scattered(leaf, mask)}, terms


def _refuse_clamped(logp: np.ndarray, old_logp: np.ndarray, mask: np.ndarray, by_sequence: bool = False) -> None:
    """For references that let any ratio pass."""
    difference = np.abs(logp - old_logp)[mask]
    bound = _MAX_SEQUENCE_LOG_RATIO if by_sequence else _MAX_LOG_RATIO
    _unsupported(bool((difference > bound).any()), f"log-ratios are bounded at {bound}")


def _verl_policy_loss(loss: Loss, mode: str | None = None, **names: str) -> Callable[[Arrays, Params], Result]:
    """A loss that verl has too; `names` are its names for our options, and some losses have a mode of their own."""

    def run(inputs: Arrays, params: Params) -> Result:
        logp, old_logp, mask = inputs["log_prob"], inputs["old_log_prob"], inputs["response_mask"] > 0
        weights = _verl_weights(mask, params, mode or params["loss_agg_mode"])
        weights = _scaled(weights, inputs.get("rollout_is_weights"))
        options = {ours: params[theirs] for ours, theirs in names.items()}
        result, terms = _policy_case(logp, old_logp, inputs["advantages"], mask, weights, loss=loss, **options)
        if mask.any():
            result["metric.actor/pg_clipfrac"] = terms.clipped.double().mean().item()
            result["metric.actor/pg_clipfrac_lower"] = terms.clipped_low.double().mean().item()
            # Ours is an estimate, and estimates are not clamped; verl's per-token one is.
            if loss is policy_loss.gspo or np.abs(logp - old_logp)[mask].max() <= _MAX_LOG_RATIO:
                result["metric.actor/ppo_kl"] = terms.approx_kl.mean().item()
        return result

    return run


_VERL_BOUNDS = {"clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high"}
_verl_ppo_clip = _verl_policy_loss(policy_loss.ppo_clip, **_VERL_BOUNDS, dual_clip="clip_ratio_c")


def _verl_geo_mean(inputs: Arrays, params: Params) -> Result:
    """verl divides by count + 1e-8 in the exponent, in the advantage and in the gradient."""
    _unsupported("rollout_is_weights" in inputs, "a token's loss has its own weight, not the geometric mean of weights")
    logp, old_logp, mask = inputs["log_prob"], inputs["old_log_prob"], inputs["response_mask"] > 0
    case = logp, old_logp, inputs["advantages"], mask
    options = {"loss": policy_loss.geo_mean, "clip_low": params["clip_ratio_low"]}
    options["clip_high"] = params["clip_ratio_high"]
    # verl's mean counts rows without tokens, for which sequences elsewhere stand in.
    weights = _weights(mask, "seq-mean-token-mean", others=[1] * int((~mask.any(1)).sum()))
    counts = mask.sum(1, keepdims=True)
    shrinkage = counts / (counts + _EPSILON)
    ratio = _onto(_policy_case(*case, weights, **options)[1].ratio, mask)
    far = np.log(ratio[mask]) >= _MAX_SEQUENCE_LOG_RATIO - _EPSILON
    _unsupported(bool(far.any()), f"a sequence's log-ratio is bounded at {_MAX_SEQUENCE_LOG_RATIO}")
    factors = np.where(mask, ratio, 1.0) ** (shrinkage - 1) * shrinkage
    result, terms = _policy_case(*case, _scaled(weights, factors), **options)
    result["grad.loss.log_prob"] *= shrinkage
    # verl's clipped fractions count tokens that a clip of the other side would have met as well.
    return result | {"metric.actor/ppo_kl": terms.approx_kl.mean().item()}


def _depends_on_the_cut(inputs: Arrays, params: Params) -> Result:
    raise NotImplementedError("tokens are chosen by a covariance within the micro-batch, so its cut would matter")


def _slime_policy_loss(inputs: Arrays, params: Params) -> Result:
    """The loss as a function of old_logp - logp."""
    leaf = torch.from_numpy(inputs["ppo_kl"]).requires_grad_()
    _refuse_clamped(inputs["ppo_kl"], np.zeros_like(inputs["ppo_kl"]), np.ones(leaf.shape, bool))
    terms = policy_loss.ppo_clip(
        -leaf,
        torch.zeros_like(leaf),
        torch.from_numpy(inputs["advantages"]),
        clip_low=params["eps_clip"],
        clip_high=params["eps_clip_high"],
        dual_clip=params.get("eps_clip_c"),
    )
    terms.loss.sum().backward()
    assert leaf.grad is not None
    return {
        "out.pg_losses": terms.loss.detach().numpy(),
        "out.clipfrac": terms.clipped.to(leaf.dtype).numpy(),
        "grad.sum.ppo_kl": leaf.grad.numpy(),
    }


def _slime_cispo(inputs: Arrays, params: Params) -> Result:
    logp, old_logp = inputs["log_prob"], inputs["old_log_prob"]
    mask = np.ones(logp.shape, bool)
    _refuse_clamped(logp, old_logp, mask)
    bounds = {"clip_low": params["eps_clip"], "clip_high": params["eps_clip_high"]}
    weights = torch.ones(logp.shape)
    result, terms = _policy_case(logp, old_logp, inputs["advantages"], mask, weights, loss=policy_loss.cispo, **bounds)
    return {
        "out.pg_losses": terms.loss.detach().numpy(),
        "out.clipfrac": terms.clipped.to(terms.loss.dtype).numpy(),
        "grad.sum.log_prob": result["grad.loss.log_prob"],
    }


def _slime_gspo_kl(inputs: Arrays, params: Params) -> Result:
    """Minus the logarithm of the ratio that GSPO takes for every token, of those that bear no loss too."""
    mask, lengths = inputs["loss_mask"] > 0, inputs["lens"]
    ids = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    difference = torch.from_numpy((inputs["old_log_prob"] - inputs["log_prob"])[mask])
    mean = importance.sequence_mean(difference, ids[torch.from_numpy(mask)], len(lengths))
    return {"out.ppo_kl": mean[ids].to(difference.dtype).numpy()}


# Policy losses with an entropy bonus and a distance to a reference


def _objective_case(
    inputs: Arrays, advantage: np.ndarray, mask: np.ndarray, weights: Tensor, *, by_sequence: bool, **options: Any
) -> Result:
    """The loss and its gradient by the objective that models are trained on; `options` are its coefficients."""
    # Megatron is slow to import, and the other cases do without.
    from megatron_rl.workers.objective import PolicyGradient

    clip = {key: options.pop(key) for key in ("clip_low", "clip_high", "dual_clip") if key in options}
    if by_sequence:
        clip.pop("dual_clip", None)
    name = "gspo" if by_sequence else "ppo_clip"
    objective = PolicyGradient(loss=name, options=clip, temperature=1.0, on_policy=False, **options)
    leaf = _flat(inputs["log_prob"], mask).requires_grad_()
    fields = {
        "weights": weights[torch.from_numpy(mask)],
        "advantages": _flat(advantage, mask),
        "old_log_probs": _flat(inputs["old_log_prob"], mask),
    }
    if objective.kl_estimator is not None:
        fields["ref_log_probs"] = _flat(inputs["ref_log_prob"], mask)
    entropy = _flat(inputs["entropies"], mask) if objective.entropy_coeff else torch.zeros_like(leaf)
    loss = objective.of_stats(LinearStats(leaf, entropy), _micro_batch(mask, fields)).loss
    loss.backward()
    return {"out.loss": loss.item(), "grad.loss.log_prob": _scattered(leaf, mask)}


def _micro_batch(mask: np.ndarray, fields: dict[str, Tensor]) -> MicroBatch:
    """The rows of the mask as sequences, of which only what an objective reads is filled in."""
    unread = torch.empty(0, dtype=torch.int64)
    return MicroBatch(
        tokens=unread,
        position_ids=unread,
        cu_seqlens=unread,
        max_seqlen=0,
        loss_positions=unread,
        labels=unread,
        sequence_ids=_ids(mask),
        num_sequences=len(mask),
        sample_ids=(),
        fields=fields,
    )


def _trl_weights(mask: np.ndarray, loss_type: str, horizon: int | None) -> Tensor:
    """The reductions of TRL, which Liger follows; their means over rows count those without tokens too."""
    modes = {
        "grpo": "seq-mean-token-mean",
        "bnpo": "token-mean",
        "dapo": "token-mean",
        "dr_grpo": "seq-mean-token-sum-norm",
        "cispo": "token-mean",
        "sapo": "seq-mean-token-mean",
        "luspo": "seq-mean-token-sum",
    }
    _unsupported(loss_type not in modes, f"no loss like {loss_type}")
    by_row = modes[loss_type] != "token-mean"
    _unsupported(by_row and not mask.any(1).all(), "a sequence without tokens is not counted in the mini-batch")
    return _weights(mask, modes[loss_type], horizon=horizon)


def _trl_grpo_loss(inputs: Arrays, params: Params) -> Result:
    _only_neutral(params, quant=1.0, gas=1)
    weighted = "importance_sampling_ratio" in inputs
    _unsupported(bool(params.get("vllm")) != weighted, "importance ratios are there to be used")
    low, high = params["eps"]
    loss_type, beta, bonus = params["loss_type"], params.get("beta") or 0.0, params.get("entc") or 0.0
    _unsupported(bonus != 0 and "entropies" not in inputs, "no entropies to reward")
    by_token = loss_type in ("bnpo", "dapo")
    _unsupported(bonus != 0 and not by_token, "the entropy is averaged like the loss, not always over tokens")
    options = {"clip_low": low, "clip_high": high, "kl_coeff": beta, "entropy_coeff": bonus}
    options |= {"delta": params.get("delta"), "weighted_kl": bool(params.get("bias"))}
    return _trl_case(inputs, loss_type, inputs["mask"].shape[1], params["level"], options, params.get("opsm"))


def _liger_grpo_loss(inputs: Arrays, params: Params) -> Result:
    horizon, level = params.get("max_completion_length"), params.get("importance_sampling_level", "token")
    low, high = params.get("epsilon_low", 0.2), params.get("epsilon_high", 0.2)
    options = {"clip_low": low, "clip_high": high, "kl_coeff": params.get("beta", 0.04), "entropy_coeff": 0.0}
    options |= {"delta": params.get("delta"), "weighted_kl": False}
    return _trl_case(inputs, params["loss_type"], horizon, level, options)


def _trl_case(
    inputs: Arrays,
    loss_type: str,
    horizon: int | None,
    level: str,
    options: Params,
    opsm: float | None = None,
) -> Result:
    mask, by_sequence = inputs["mask"] > 0, level == "sequence"
    weights = _trl_weights(mask, loss_type, horizon)
    scale = _trl_scale(inputs, mask, opsm)
    alone = by_sequence and scale is None and not options["kl_coeff"]
    _unsupported(loss_type == "luspo" and not alone, "the mean is over rows, not over their tokens")
    if scale is not None:
        _unsupported(options["kl_coeff"] != 0 or options["entropy_coeff"] != 0, "the other terms are not corrected")
        varies = any(len(np.unique(row[kept])) > 1 for row, kept in zip(scale, mask))
        _unsupported(by_sequence and varies, "a token's gradient has its own weight, not the mean over its sequence")
        weights = _scaled(weights, scale)
    _refuse_clamped(inputs["log_prob"], inputs["old_log_prob"], mask, by_sequence)
    estimator = "k3" if options["kl_coeff"] else None
    if estimator:
        _unsupported("ref_log_prob" not in inputs, "no reference")
        _refuse_bounded_k3(inputs["log_prob"], inputs["ref_log_prob"], mask)
    delta, weighted_kl = options.pop("delta"), options.pop("weighted_kl") and estimator is not None
    if loss_type in ("cispo", "sapo") or weighted_kl:
        return _trl_other_case(inputs, loss_type, mask, weights, options, by_sequence, weighted_kl)
    options |= {"kl_estimator": estimator, "dual_clip": _two_sided(delta, options["clip_high"], by_sequence)}
    advantage = inputs["advantages"][:, None]
    return _objective_case(inputs, advantage, mask, weights, by_sequence=by_sequence, **options)


def _trl_other_case(
    inputs: Arrays,
    loss_type: str,
    mask: np.ndarray,
    weights: Tensor,
    options: Params,
    by_sequence: bool,
    weighted_kl: bool,
) -> Result:
    """Losses beside the clipped ones, and a KL weighted by the importance ratio."""
    _unsupported(by_sequence, "no sequence ratios in this loss")
    _unsupported(bool(options["entropy_coeff"]), "no entropy bonus here")
    case = inputs["log_prob"], inputs["old_log_prob"], inputs["advantages"][:, None], mask, weights
    penalty = None
    if options["kl_coeff"]:
        gradient: Params = {"gradient": "is_ratio" if weighted_kl else "naive"}
        gradient["old_logp"] = _flat(inputs["old_log_prob"], mask)
        penalty = _kl_penalty(inputs, mask, weights, options["kl_coeff"], "k3", **gradient)
    if loss_type == "cispo":
        # An upper bound in itself, and no lower one.
        bounds = {"clip_low": 1.0, "clip_high": options["clip_high"] - 1}
        return _policy_case(*case, loss=policy_loss.cispo, penalty=penalty, **bounds)[0]
    if loss_type == "sapo":
        return _policy_case(*case, loss=policy_loss.sapo, penalty=penalty)[0]
    bounds = {"clip_low": options["clip_low"], "clip_high": options["clip_high"]}
    return _policy_case(*case, penalty=penalty, dual_clip=None, **bounds)[0]


def _two_sided(delta: float | None, clip_high: float, by_sequence: bool) -> float | None:
    """TRL bounds the ratio at delta. For A > 0 the clip has acted before, so this is the dual clip."""
    if delta is not None:
        _unsupported(by_sequence, "no second bound on a sequence's ratio")
        _unsupported(delta < 1 + clip_high, "the second bound lies beyond the first")
    return delta


def _kl_penalty(
    inputs: Arrays, mask: np.ndarray, weights: Tensor, coeff: float, estimator: str, **options: Any
) -> Callable[[Tensor], Tensor]:
    ref_logp, kept = _flat(inputs["ref_log_prob"], mask), weights[torch.from_numpy(mask)]
    return lambda logp: coeff * (kept * kl(logp, ref_logp, estimator, **options)).sum()


def _nemo_weights(inputs: Arrays, mask: np.ndarray, by_token: bool) -> Tensor:
    if by_token:
        return _weights(mask, "token-mean")
    idle = bool((inputs["sample_mask"] > mask.any(1)).any())
    _unsupported(idle, "a sequence without tokens is not counted in the mini-batch")
    sequences = mask.any(1).sum()
    return _as_verl(_weights(mask, "seq-mean-token-mean"), mask) * (sequences / (sequences + _EPSILON))


def _nemo_kl(inputs: Arrays, params: Params, mask: np.ndarray, weights: Tensor) -> Callable[[Tensor], Tensor] | None:
    coeff, estimator = params.get("reference_policy_kl_penalty", 0.01), params.get("reference_policy_kl_type", "k3")
    if not coeff:
        return None
    logp, ratio = inputs["log_prob"], np.ones(())
    options: Params = {"gradient": "score_function"}
    if params.get("use_on_policy_kl_approximation"):
        rollout_logp = inputs["rollout_log_prob"]
        _refuse_clamped(logp, rollout_logp, mask)
        options = {"gradient": "is_ratio", "old_logp": _flat(rollout_logp, mask)}
        ratio = np.exp(logp - rollout_logp)
    _refuse_nemo_bounds(logp, inputs["ref_log_prob"], mask, estimator, ratio)
    return _kl_penalty(inputs, mask, weights, coeff, estimator, **options)


def _nemo_loss(params: Params, on_policy: bool) -> tuple[Loss, Params]:
    """Which of our losses NeMo's options make, and that one's options."""
    bounds = {"clip_low": params.get("ratio_clip_min", 0.2), "clip_high": params.get("ratio_clip_max", 0.2)}
    if params.get("disable_ppo_ratio") and not on_policy:
        _only_neutral(params, use_cispo=False, ratio_clip_c=None)
        return policy_loss.reinforce, {}
    if params.get("use_cispo"):
        _only_neutral(params, sequence_level_importance_ratios=False, ratio_clip_c=None)
        return policy_loss.cispo, bounds
    if params.get("sequence_level_importance_ratios") and not on_policy:
        _only_neutral(params, ratio_clip_c=None)
        return policy_loss.gspo, bounds
    return policy_loss.ppo_clip, bounds | {"dual_clip": params.get("ratio_clip_c")}


def _nemo_correction(inputs: Arrays, params: Params, mask: np.ndarray, old_logp: np.ndarray) -> np.ndarray | None:
    """What the policy's loss is multiplied by: weights from the engine to the trainer, 0 for what is left out."""
    if not params.get("use_importance_sampling_correction"):
        return None
    rollout_logp, level = inputs["rollout_log_prob"], "token"
    difference = np.where(mask, old_logp - rollout_logp, 0.0)
    _refuse_clamped(old_logp, rollout_logp, mask)
    if params.get("sequence_level_importance_ratios"):
        level = "sequence"
        _refuse_clamped(difference.sum(1), np.zeros(len(mask)), mask.any(1))
    high, low = params.get("truncated_importance_sampling_ratio"), params.get("truncated_importance_sampling_ratio_min")
    kind, tokens = None if high is None else params["truncated_importance_sampling_type"], _tokens(difference, mask)
    _unsupported(kind == "tis" and bool(low), "truncated weights have no lower bound")
    cut = {"high": np.inf if kind in (None, "seq-mask-tis") else high, "low": low if kind == "icepop" else None}
    weights = _onto(rollout_correction.importance_weights(*tokens, level=level, **cut), mask)
    if kind == "seq-mask-tis":
        # The bounds of k1 are on rollout / old, NeMo's on the inverse.
        criterion = rollout_correction.Criterion("seq_mean", "k1", high=1 / low, low=1 / high)
        weights = weights * _onto(rollout_correction.rejection_mask(*tokens, [criterion]), mask)
    return weights


def _nemo_clipped_pg(inputs: Arrays, params: Params) -> Result:
    mask = (inputs["token_mask"] * inputs["sample_mask"][:, None]) > 0
    on_policy, advantage = bool(params.get("force_on_policy_ratio")), inputs["advantages"]
    logp = inputs["log_prob"]
    old_logp = logp if on_policy else inputs["old_log_prob"]
    loss, options = _nemo_loss(params, on_policy)
    if loss is policy_loss.gspo:
        varies = any(len(np.unique(row[kept])) > 1 for row, kept in zip(advantage, mask))
        _unsupported(varies, "a token's gradient is of its own advantage, not of the mean over its sequence")
    if loss is not policy_loss.reinforce:
        _refuse_clamped(logp, old_logp, mask, by_sequence=loss is policy_loss.gspo)
    weights = _nemo_weights(inputs, mask, params.get("token_level_loss", True))
    penalty = _nemo_kl(inputs, params, mask, weights)
    weights = _scaled(weights, _nemo_correction(inputs, params, mask, old_logp))
    return _policy_case(logp, old_logp, advantage, mask, weights, loss=loss, penalty=penalty, **options)[0]


# Distances to a reference


def _refuse_bounded_k3(logp: np.ndarray, ref_logp: np.ndarray, mask: np.ndarray) -> None:
    """For references that let k3 grow without bound."""
    difference = (ref_logp - logp)[mask]
    bounded = (difference < _MIN_K3_LOG_RATIO) | (difference > _MAX_K3_LOG_RATIO)
    _unsupported(bool(bounded.any()), "k3 is bounded at 10")


def _refuse_nemo_bounds(
    logp: np.ndarray, ref_logp: np.ndarray, mask: np.ndarray, estimator: str, ratio: np.ndarray | None = None
) -> None:
    """NeMo bounds every estimate as verl does k3, after its weight, and drops the score-function term beyond."""
    estimates = kl(_flat(logp, mask), _flat(ref_logp, mask), estimator).numpy()
    factors = np.ones(1) if ratio is None else np.broadcast_to(ratio, mask.shape)[mask]
    bounded = np.abs(ref_logp - logp)[mask] > _MAX_LOG_RATIO
    bounded |= np.abs(estimates) * np.maximum(factors, 1) >= _MAX_KL
    _unsupported(bool(bounded.any()), "only k3 is bounded at 10, without its weight")


def _kl_case(logp: np.ndarray, ref_logp: np.ndarray, estimator: str, **options: Any) -> Result:
    """The estimates, and the gradient of their sum."""
    leaf = torch.from_numpy(logp.reshape(-1)).requires_grad_()
    estimates = kl(leaf, torch.from_numpy(ref_logp.reshape(-1)), estimator, **options)
    estimates.sum().backward()
    gradient = _scattered(leaf, np.ones(logp.shape, bool))
    return {"out.kl": estimates.detach().numpy().reshape(logp.shape), "grad.sum_kl.logprob": gradient}


def _verl_kl_penalty(inputs: Arrays, params: Params) -> Result:
    names = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
    name = params["kl_penalty"]
    gradient = "straight_through_k2" if name.endswith("+") else "naive"
    _unsupported(name.removesuffix("+") not in names, f"no estimator {name}")
    return _kl_case(inputs["logprob"], inputs["ref_logprob"], names[name.removesuffix("+")], gradient=gradient)


def _slime_approx_kl(inputs: Arrays, params: Params) -> Result:
    """slime bounds k3 under the name low_var_kl only; it has no bound on the log-ratio, which does not show."""
    names = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
    name, logp, base = params["kl_loss_type"], inputs["log_probs"], inputs["base"]
    _unsupported(name not in names, f"no estimator {name}")
    mask, ratio, options = np.ones(logp.shape, bool), inputs.get("importance_ratio", np.ones(1)), {}
    if name == "k3":
        _refuse_bounded_k3(logp, base, mask)
    if (ratio != 1).any():
        _unsupported(bool((ratio <= 0).any()), "no ratio of probabilities")
        old_logp = logp - np.log(ratio)
        _refuse_clamped(logp, old_logp, mask)
        if name == "low_var_kl":
            _refuse_nemo_bounds(logp, base, mask, "k3", ratio)
        options = {"gradient": "is_ratio", "old_logp": torch.from_numpy(old_logp.reshape(-1))}
    return {"out.kl": _kl_case(logp, base, names[name], **options)["out.kl"]}


def _nemo_kl_score_function(inputs: Arrays, params: Params) -> Result:
    logp, ref_logp = inputs["logprob"], inputs["ref_logprob"]
    _refuse_nemo_bounds(logp, ref_logp, np.ones(logp.shape, bool), params["kl_type"])
    return _kl_case(logp, ref_logp, params["kl_type"], gradient="score_function")


# Rollout correction

# Figures of verl in which a row without tokens counts; with ours it does not.
_OVER_ROWS = re.compile("rollout_is_seq_|rollout_rs_seq_masked|training_|(rollout_)?(log_)?ppl|chi2_seq")
_OVER_ROWS_BY_SEQUENCE = re.compile("rollout_is_(max|min|ratio)")


def _scaled(weights: Tensor, factors: np.ndarray | None) -> Tensor:
    """Weights of tokens whose losses are multiplied."""
    return weights if factors is None else weights * torch.from_numpy(factors)


def _figures(figures: dict[str, float], mask: np.ndarray, params: Params, prefix: str = "") -> Result:
    by_sequence = params.get("rollout_is") == "sequence"
    result = {}
    for name, value in figures.items():
        name = name.removeprefix("rollout_corr/")
        over_rows = _OVER_ROWS.match(name) or (by_sequence and _OVER_ROWS_BY_SEQUENCE.match(name))
        if not over_rows or mask.any(1).all():
            result[f"metric.{prefix}{name}"] = value
    return result


def _tokens(array: np.ndarray, mask: np.ndarray) -> tuple[Tensor, Tensor, int]:
    return _flat(array, mask), _ids(mask), len(mask)


def _onto(values: Tensor, mask: np.ndarray) -> np.ndarray:
    result = np.zeros(mask.shape, values.numpy().dtype)
    result[mask] = values.numpy()
    return result


def _cut_options(params: Params) -> Params:
    """verl's threshold is an upper bound, or two bounds with a line between them."""
    *low, high = map(float, str(params["rollout_is_threshold"]).split("_"))
    options = {"level": params["rollout_is"], "high": high, "low": low[0] if low else None}
    return options | {"normalize": bool(params.get("rollout_is_batch_normalize"))}


def _criteria(params: Params) -> list[rollout_correction.Criterion]:
    names = [name.strip() for name in params["rollout_rs"].split(",")]
    thresholds = str(params["rollout_rs_threshold"]).split(",")
    criteria = []
    for name, threshold in zip(names, thresholds * (len(names) if len(thresholds) == 1 else 1), strict=True):
        level, _, statistic = name.rpartition("_")
        _unsupported(statistic not in ("k1", "k2", "k3"), f"no statistic {name}")
        *low, high = map(float, threshold.split("_"))
        criteria.append(rollout_correction.Criterion(level, statistic, high, low[0] if low else None))
    return criteria


def _verl_rollout_weights(inputs: Arrays, params: Params) -> Result:
    mask, options = inputs["response_mask"] > 0, _cut_options(params)
    tokens = _tokens(inputs["log_ratio"], mask)
    weights = _onto(rollout_correction.importance_weights(*tokens, **options), mask)
    if options["normalize"] and weights.any():
        weights /= _verl_norm(weights, mask, options["level"])
    metrics = rollout_correction.importance_metrics(*tokens, **options)
    return {"out.weights": weights} | _figures(metrics, mask, params)


def _verl_norm(weights: np.ndarray, mask: np.ndarray, level: str) -> float:
    """verl's mean of weights whose mean is 1: its counts are count + 1e-8."""
    if level == "token":
        return mask.sum() / (mask.sum() + _EPSILON)
    exact, values = _weights(mask, "seq-mean-token-mean"), torch.from_numpy(weights)
    return ((_as_verl(exact, mask) * values).sum() / (exact * values).sum()).item()


def _verl_rejection_mask(inputs: Arrays, params: Params) -> Result:
    mask, criteria = inputs["response_mask"] > 0, _criteria(params)
    tokens = _tokens(inputs["log_ratio"], mask)
    keep = _onto(rollout_correction.rejection_mask(*tokens, criteria), mask)
    metrics = rollout_correction.rejection_metrics(*tokens, criteria)
    return {"out.mask": keep.astype(inputs["response_mask"].dtype)} | _figures(metrics, mask, params)


def _verl_off_policy_metrics(inputs: Arrays, params: Params) -> Result:
    mask = inputs["response_mask"] > 0
    return _off_policy_figures(inputs["old_log_prob"], inputs["rollout_log_prob"], mask, params)


def _off_policy_figures(
    old_logp: np.ndarray, rollout_logp: np.ndarray, mask: np.ndarray, params: Params, prefix: str = ""
) -> Result:
    _unsupported(not mask.any(), "nothing to measure")
    metrics = rollout_correction.off_policy_metrics(_flat(old_logp, mask), *_tokens(rollout_logp, mask))
    difference = old_logp - rollout_logp
    exponents = {"k3_kl": difference, "ppl_ratio": -difference, "training_ppl": -old_logp, "rollout_ppl": -rollout_logp}
    for name, exponent in exponents.items():
        # verl bounds none of these.
        if exponent[mask].max() > _MAX_LOG_RATIO:
            del metrics[f"rollout_corr/{name}"]
    return _figures(metrics, mask, params, prefix)


def _verl_reinforce(inputs: Arrays, params: Params) -> Result:
    logp, rollout_logp, mask = inputs["log_prob"], inputs["rollout_log_prob"], inputs["response_mask"] > 0
    weights = _scaled(_verl_weights(mask, params, params["loss_agg_mode"]), inputs.get("rollout_is_weights"))
    case = logp, rollout_logp, inputs["advantages"], mask, weights
    result, terms = _policy_case(*case, loss=policy_loss.reinforce)
    if mask.any():
        result["metric.actor/ppo_kl"] = terms.approx_kl.mean().item()
    return result


def _verl_bypass(inputs: Arrays, params: Params) -> Result:
    """The policy that drew the rollouts is the one that ratios start from; weights are for REINFORCE only."""
    logp, rollout_logp, mask = inputs["log_prob"], inputs["old_log_prob"], inputs["response_mask"] > 0
    tokens, kept = _tokens(logp - rollout_logp, mask), mask
    metrics: dict[str, float] = {}
    case = dict(inputs, rollout_log_prob=rollout_logp)
    if params.get("rollout_is") is not None:
        options = _cut_options(params)
        metrics |= rollout_correction.importance_metrics(*tokens, **options)
        case["rollout_is_weights"] = _onto(rollout_correction.importance_weights(*tokens, **options), mask)
    if params.get("rollout_rs") is not None:
        criteria = _criteria(params)
        metrics |= rollout_correction.rejection_metrics(*tokens, criteria)
        kept = _onto(rollout_correction.rejection_mask(*tokens, criteria), mask)
    case["response_mask"] = kept
    defaults = {"loss_agg_mode": "token-mean", "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0}
    if params.get("loss_type", "ppo_clip") == "reinforce":
        result = _verl_reinforce(case, defaults | params)
    else:
        case.pop("rollout_is_weights", None)
        result = _verl_ppo_clip(case, defaults | params)
    figures = _figures(metrics, mask, params, "rollout_corr/")
    return result | figures | _off_policy_figures(logp, rollout_logp, mask, params, "rollout_corr/")


def _trl_scale(inputs: Arrays, mask: np.ndarray, delta: float | None) -> np.ndarray | None:
    """What TRL multiplies the policy's loss by, and nothing else: importance ratios [B, T], sequences left out."""
    scale = inputs.get("importance_sampling_ratio")
    if scale is not None:
        scale = np.broadcast_to(scale, mask.shape).copy()
    if delta is None:
        return scale
    logp, old_logp = _flat(inputs["log_prob"], mask), _flat(inputs["old_log_prob"], mask)
    advantage = _flat(inputs["advantages"][:, None], mask)
    options = {"delta": delta}
    keep = rollout_correction.off_policy_sequence_mask(logp, old_logp, advantage, _ids(mask), len(mask), **options)
    kept = _onto(keep, mask)
    return kept.astype(inputs["mask"].dtype) if scale is None else scale * kept


def _slime_opsm(inputs: Arrays, params: Params) -> Result:
    mask, lengths = inputs["loss_mask"] > 0, inputs["lens"]
    ids = np.repeat(np.arange(len(lengths)), lengths)
    logp, old_logp, advantage = (
        torch.from_numpy(inputs[name][mask]) for name in ("log_prob", "old_log_prob", "advantages")
    )
    own = torch.from_numpy(ids[mask])
    options = {"delta": params["opsm_delta"]}
    keep = rollout_correction.off_policy_sequence_mask(logp, old_logp, advantage, own, len(lengths), **options).numpy()
    idle = np.isin(ids[~mask], ids[mask][~keep])
    _unsupported(bool(idle.any()), "a token that bears no loss is in no mask")
    result = np.ones(mask.shape, inputs["loss_mask"].dtype)
    result[mask] = keep
    fraction = (~keep / np.bincount(ids[mask], minlength=len(lengths))[ids[mask]]).sum()
    return {"out.mask": result, "out.clipfrac": fraction.astype(np.float32)}


def _dapo_overlong(inputs: Arrays, params: Params) -> Result:
    length, longest = inputs["length"], params["max_resp_len"]
    _unsupported(bool((length > longest).any()), "no response is longer than allowed")
    _unsupported(not 0 < params["overlong_buffer_len"] <= longest, "the buffer is a part of the length")
    options = {"max_length": longest, "buffer": params["overlong_buffer_len"], "factor": params["penalty_factor"]}
    return {"out.overlong_reward": overlong_penalty(torch.from_numpy(length), **options).numpy()}


# Smoothed importance weights

# The references' figures are left out: they count masked tokens as zeros, or do not, under one and the same name.


def _smoothed_by_token(weights: Tensor, mask: np.ndarray, beta: float) -> Tensor:
    return exponential_average(weights, _ids(mask), beta=beta, init="first")


def _ema_token_axis(inputs: Arrays, params: Params) -> Result:
    raw, mask = inputs["raw"], inputs["response_mask"] > 0
    smoothed = raw.copy()
    smoothed[mask] = _smoothed_by_token(_flat(raw, mask), mask, params["beta"]).numpy()
    return {"out.smoothed": smoothed}


def _ema_step_axis(inputs: Arrays, params: Params) -> Result:
    """Over updates no token depends on another, so that those outside the mask are smoothed like any."""
    averages, result = StepAverages(beta=params["beta"]), {}
    for visit, name in enumerate(("step1", "step2")):
        result[f"out.smoothed_{name}"] = _visited(averages, inputs[f"raw_{name}"], visit)
    return result


def _visited(averages: StepAverages, raw: np.ndarray, visit: int) -> np.ndarray:
    everywhere = np.ones(raw.shape, bool)
    smoothed = averages.update(range(len(raw)), _flat(raw, everywhere), _ids(everywhere), visit=visit)
    return smoothed.numpy().reshape(raw.shape)


def _ema_step_axis_shared_uid(inputs: Arrays, params: Params) -> Result:
    shared = len(np.unique(inputs["uid"])) < len(inputs["uid"])
    _unsupported(shared, "each sample has a state of its own; the answers to one prompt do not share theirs")
    return {"out.smoothed": _visited(StepAverages(beta=params["beta"]), inputs["raw"], 0)}


def _ema_policy_loss(by_token: bool) -> Callable[[Arrays, Params], Result]:
    def smoothed(raw: Tensor, mask: np.ndarray, beta: float) -> Tensor:
        if by_token:
            return with_gradient(raw, _smoothed_by_token(raw, mask, beta), beta=beta, gradient="full")
        first_visit = StepAverages(beta=beta).update(range(len(mask)), raw, _ids(mask), visit=0)
        return with_gradient(raw, first_visit, beta=beta, gradient="current")

    def run(inputs: Arrays, params: Params) -> Result:
        logp, old_logp, mask = inputs["log_prob"], inputs["old_log_prob"], inputs["response_mask"] > 0
        _refuse_clamped(logp, old_logp, mask)
        leaf, old = _flat(logp, mask).requires_grad_(), _flat(old_logp, mask)
        ratio = smoothed(importance.log_ratio(leaf, old).exp(), mask, params["beta"])
        clip = {"clip_low": params["cliprange"], "clip_high": params["cliprange"], "dual_clip": params["clip_ratio_c"]}
        terms = policy_loss.ppo_clip(leaf, old, _flat(inputs["advantages"], mask), ratio=ratio, **clip)
        weights = _weights(mask, "token-mean")[torch.from_numpy(mask)] * (mask.sum() / (mask.sum() + _EPSILON))
        loss = (weights * terms.loss).sum()
        loss.backward()
        return {
            "out.loss": loss.item(),
            "out.clipfrac": (weights * terms.clipped).sum().item(),
            "out.clipfrac_lower": (weights * terms.clipped_low).sum().item(),
            "out.ppo_kl": (weights * terms.approx_kl).sum().item(),
            "grad.loss.log_prob": _scattered(leaf, mask),
        }

    return run


# Statistics of logits


def _logit_stats(logits: np.ndarray, labels: np.ndarray | None) -> tuple[Tensor, LinearStats]:
    """Flat logits [N, V] that take a gradient, and their statistics: the identity is the lm-head."""
    vocab = logits.shape[-1]
    leaf = torch.from_numpy(logits.reshape(-1, vocab)).requires_grad_()
    flat = torch.zeros(len(leaf), dtype=torch.int64) if labels is None else torch.from_numpy(labels.reshape(-1))
    head = torch.eye(vocab, dtype=leaf.dtype)
    # Chunks that do not divide the vocabulary, so that the merge is exercised too.
    return leaf, linear_stats(leaf, head, flat, shard=VocabShard(0, vocab), chunk=5)


def _entropy(stats: LinearStats) -> Tensor:
    assert stats.entropy is not None
    return stats.entropy


def _entropy_from_logits(inputs: Arrays, params: Params) -> Result:
    leaf, stats = _logit_stats(inputs["logits"], None)
    entropy = _entropy(stats)
    entropy.sum().backward()
    assert leaf.grad is not None
    shape = inputs["logits"].shape
    return {
        "out.entropy": entropy.detach().numpy().reshape(shape[:-1]),
        "grad.sum_entropy.logits": leaf.grad.numpy().reshape(shape),
    }


def _logprobs_from_logits(inputs: Arrays, params: Params) -> Result:
    leaf, stats = _logit_stats(inputs["logits"], inputs["labels"])
    stats.logp.sum().backward()
    assert leaf.grad is not None
    return {
        "out.logprobs": stats.logp.detach().numpy().reshape(inputs["labels"].shape),
        "grad.sum_logprobs.logits": leaf.grad.numpy().reshape(inputs["logits"].shape),
    }


def _slime_logprob_entropy(inputs: Arrays, params: Params) -> Result:
    _unsupported("keep_mask" in inputs, "no sampling mask over the vocabulary")
    leaf, stats = _logit_stats(inputs["logits"], inputs["target"])
    entropy = _entropy(stats)
    of_logp, of_entropy = params["weights"]
    (of_logp * stats.logp.sum() + of_entropy * entropy.sum()).backward()
    assert leaf.grad is not None
    return {
        "out.log_prob": stats.logp.detach().numpy()[:, None],
        "out.entropy": entropy.detach().numpy(),
        f"grad.{of_logp}lp+{of_entropy}ent.logits": leaf.grad.numpy(),
    }


# Distillation


def _head(logits: np.ndarray, temperature: float = 1.0) -> Head:
    """Logits [..., V] as a head: the identity is its matrix."""
    vocab = logits.shape[-1]
    leaf = torch.from_numpy(logits.reshape(-1, vocab)).requires_grad_()
    return Head(leaf, torch.eye(vocab, dtype=leaf.dtype), temperature)


def _distilled(
    student: Head,
    teacher: Head,
    labels: np.ndarray,
    *,
    alpha: float,
    k: int | None,
    tail: Tail,
    support: Support = "student",
) -> tuple[Tensor, Pair]:
    """The divergence of each token [N], and the statistics behind it; over the whole vocabulary where k is None."""
    vocab = student.hidden.shape[1]
    flat = torch.from_numpy(labels.reshape(-1)).clamp(0, vocab - 1)
    shard = VocabShard(0, vocab)
    if k is None:
        full = full_divergence(student, teacher, flat, alpha=alpha, shard=shard, chunk=5)
        return full.loss, full.pair
    pair = paired_stats(student, teacher, flat, support=support, k=min(k, vocab), shard=shard, chunk=5)
    buckets = []
    for stats in pair:
        assert stats.topk_logp is not None and stats.tail_logp is not None
        buckets.append(distill.buckets(stats.topk_logp, stats.tail_logp, tail))
    return distill.divergence(buckets[0], buckets[1], alpha), pair


def _tail(params: Params, name: str) -> Tail:
    return "clamped" if params[name] else "none"


def _logit_grad(head: Head, shape: tuple[int, ...]) -> np.ndarray:
    assert head.hidden.grad is not None
    return head.hidden.grad.numpy().reshape(shape)


def _sampled_loss(student: Head, teacher: Head, labels: np.ndarray) -> tuple[Tensor, Pair]:
    flat, shard = torch.from_numpy(labels.reshape(-1)), VocabShard(0, student.hidden.shape[1])

    def stats(head: Head) -> LinearStats:
        return linear_stats(head.hidden, head.weight, flat, shard=shard, temperature=head.temperature, chunk=5)

    pair = Pair(stats(student), stats(teacher))
    return distill.sampled_token(pair.student.logp, pair.teacher.logp.detach()), pair


def _weighted_loss(
    loss: Tensor, student: Head, weights: Tensor, shape: tuple[int, ...], name: str = "grad.loss.student_logits"
) -> Result:
    total = (weights.reshape(-1) * loss).sum()
    total.backward()
    return {"out.loss": total.item(), name: _logit_grad(student, shape)}


def _off_policy(loss: Tensor, pair: Pair, inputs: Arrays, params: Params) -> Tensor:
    if params.get("is_clip") is None and "rollout_is_weights" not in inputs:
        return loss
    logp = pair.student.logp
    old = torch.from_numpy(inputs["old_log_probs"]).reshape(-1) if "old_log_probs" in inputs else logp.detach()
    weights = inputs.get("rollout_is_weights")
    return distill.off_policy(
        loss,
        logp,
        old,
        is_clip=params.get("is_clip"),
        rollout_weights=None if weights is None else torch.from_numpy(weights).reshape(-1),
    ).loss


def _distillation_mask(inputs: Arrays) -> np.ndarray:
    mask = inputs["response_mask"] > 0
    return mask & (inputs["self_distillation_mask"] > 0)[:, None] if "self_distillation_mask" in inputs else mask


def _sdpo_loss(inputs: Arrays, params: Params) -> Result:
    shape, mask, mode = inputs["student_logits"].shape, _distillation_mask(inputs), params["loss_agg_mode"]
    _unsupported(mode == "seq-mean-token-sum-norm", "seq-mean-token-sum-norm divides by the number of sequences too")
    student, teacher = (_head(inputs[name], params["temperature"]) for name in ("student_logits", "teacher_logits"))
    if params["full_logit_distillation"]:
        loss, pair = _distilled(
            student,
            teacher,
            inputs["labels"],
            alpha=params["alpha"],
            k=params["distillation_topk"],
            tail=_tail(params, "distillation_add_tail"),
        )
    else:
        _unsupported(params["alpha"] != 1, "the loss of the drawn tokens is that of the reverse KL, alpha = 1")
        loss, pair = _sampled_loss(student, teacher, inputs["labels"])
    if mode == "token-mean" and not mask.any():
        weights = torch.zeros(mask.shape, dtype=torch.float64)  # the reference's count is at least 1
    else:
        weights = _verl_weights(mask, {}, mode)
    result = _weighted_loss(_off_policy(loss, pair, inputs, params), student, weights, shape)
    if pair.student.topk_ids is not None:
        result["out.student_topk_ids"] = pair.student.topk_ids.numpy().reshape(*shape[:-1], -1)
    return result


def _trl_per_token(inputs: Arrays, params: Params) -> Result:
    shape = inputs["student_logits"].shape
    student, teacher = _head(inputs["student_logits"]), _head(inputs["teacher_logits"])
    if "completion_ids" in inputs:
        loss, _ = _sampled_loss(student, teacher, inputs["completion_ids"])
    else:
        tail = _tail(params, "add_tail") if "topk" in params else "none"
        labels = np.zeros(shape[:-1], np.int64)
        loss, _ = _distilled(student, teacher, labels, alpha=params["alpha"], k=params.get("topk"), tail=tail)
    weights = torch.from_numpy(inputs["weight"])
    result = _weighted_loss(loss, student, weights, shape, "grad.sum_weighted.student_logits")
    del result["out.loss"]
    return result | {"out.per_token": loss.detach().numpy().reshape(shape[:-1])}


def _trl_sdpo_loss(inputs: Arrays, params: Params) -> Result:
    """TRL averages over all sequences, those without a teacher included."""
    shape, mask = inputs["student_logits"].shape, _distillation_mask(inputs)
    student, teacher = _head(inputs["student_logits"]), _head(inputs["teacher_logits"])
    if params["distillation_mode"] == "sampled_token":
        loss, pair = _sampled_loss(student, teacher, inputs["labels"])
    else:
        k = params["distillation_topk"] if params["distillation_mode"] == "topk_logits" else None
        tail = _tail(params, "distillation_add_tail")
        loss, pair = _distilled(student, teacher, inputs["labels"], alpha=params["alpha"], k=k, tail=tail)
    weights = _weights(mask, "seq-mean-token-mean") * (mask.any(1).sum() / len(mask))
    return _weighted_loss(_off_policy(loss, pair, inputs, params), student, weights, shape)


def _gkd_jsd(inputs: Arrays, params: Params) -> Result:
    _unsupported(params["reduction"] != "batchmean", f"no reduction {params['reduction']}")
    shape, mask = inputs["student_logits"].shape, inputs["labels"] != -100
    _unsupported(not mask.any(), "nothing to average weighs 0, and is not 0 / 0")
    student, teacher = (_head(inputs[name], params["temperature"]) for name in ("student_logits", "teacher_logits"))
    loss, _ = _distilled(student, teacher, inputs["labels"], alpha=params["beta"], k=None, tail="none")
    return _weighted_loss(loss, student, _weights(mask, "token-mean"), shape)


def _nemo_distill_topk(inputs: Arrays, params: Params) -> Result:
    """On the teacher's ids; `mixed` is half of each KL, and no Jensen-Shannon divergence."""
    _unsupported(params["zero_outside_topk"], "no student that is 0 outside the teacher's ids")
    shape, k = inputs["student_logits"].shape, params["k"]
    mask = (inputs["token_mask"] > 0) & (inputs["sample_mask"] > 0)[:, None]
    _unsupported(not mask.any(), "nothing to average weighs 0, and is not 0 / 0")
    student, teacher = _head(inputs["student_logits"]), _head(inputs["teacher_logits"])
    labels = np.zeros(shape[:2], np.int64)
    shares = {"forward": {0.0: 1.0}, "reverse": {1.0: 1.0}, "mixed": {0.0: 0.5, 1.0: 0.5}}[params["kl_type"]]
    loss = torch.zeros((), dtype=torch.float64)
    for alpha, share in shares.items():
        part, pair = _distilled(student, teacher, labels, alpha=alpha, k=k, tail="none", support="teacher")
        loss = loss + share * part
    assert pair.teacher.topk_ids is not None
    count = int(mask.sum())
    weights = _weights(mask, "token-mean") * (count / (count + _EPSILON))
    result = _weighted_loss(loss, student, weights, shape)
    return result | {"out.teacher_topk_ids": pair.teacher.topk_ids.numpy().reshape(*shape[:2], k)}


def _add_tail_bucket(inputs: Arrays, params: Params) -> Result:
    logp = inputs["log_probs"]
    flat = torch.from_numpy(logp.reshape(-1, logp.shape[-1]))
    result = distill.buckets(flat, flat[:, 0], "clamped")
    return {"out.out": result.numpy().reshape(*logp.shape[:-1], -1)}


def _trust_region_mix(inputs: Arrays, params: Params) -> Result:
    mixed = mixed_head(_head(inputs["ref_logits"]), _head(inputs["student_logits"]), params["mix_coef"])
    return {"out.logits": (mixed.hidden @ mixed.weight.t()).numpy().reshape(inputs["ref_logits"].shape)}


# Averages of model weights


def _averaged(inputs: Arrays, average: str, weights: str, names: list[str], decay: float) -> dict[str, np.ndarray]:
    averages = [torch.from_numpy(inputs[f"{average}.{name}"]) for name in names]
    ema.ema_update_(averages, [torch.from_numpy(inputs[f"{weights}.{name}"]) for name in names], decay)
    return {name: tensor.numpy() for name, tensor in zip(names, averages)}


def _ema_update(inputs: Arrays, params: Params) -> Result:
    """Of all parameters. Buffers, which SDPO leaves as they were, are copied here, and not answered."""
    names = ["frozen", "a.weight", "a.bias", "bn.weight", "bn.bias"]
    found = _averaged(inputs, "teacher", "student", names, 1 - params["update_rate"])
    return {f"out.teacher_new.{name}": array for name, array in found.items()}


def _ema_weight_step(inputs: Arrays, params: Params) -> Result:
    """Frozen parameters are copied. A batch norm's parameters, which the reference copies too, are not answered."""
    found = _averaged(inputs, "ema", "model", ["lin.weight", "lin.bias"], float(params["decay"]))
    found |= _averaged(inputs, "ema", "model", ["fz.weight", "fz.bias"], 0.0)
    return {f"out.ema_new.{name}": array for name, array in found.items()}


def _ema_decay_schedule(inputs: Arrays, params: Params) -> Result:
    options = {name: params[name] for name in ("inv_gamma", "power", "min_value", "max_value")}
    steps = inputs["optimization_step"].tolist()
    decays = [ema.decay(step, update_after=params["update_after_step"], **options) for step in steps]
    return {"out.decay": np.array(decays)}


# What a teacher is shown


def _sdpo_teacher_context(inputs: dict[str, Any], params: Params) -> Result:
    config, uids = inputs["config"], inputs["uids"]
    notes = inputs["feedback"] or [None] * len(uids)
    mode: Feedback = "without_solution" if config["environment_feedback_only_without_solution"] else "always"
    options = RepromptOptions(
        success_threshold=config["success_reward_threshold"],
        exclude_self=config["dont_reprompt_on_self_success"],
        remove_thinking=config["remove_thinking_from_demonstration"],
        feedback=mode if config["include_environment_feedback"] else "never",
        **{name: config[name] for name in ("reprompt_template", "solution_template", "feedback_template")},
    )
    groups, shown = [], []
    messages, mask = list(inputs["prompts"]), [0.0] * len(uids)
    for uid in dict.fromkeys(uids):
        places = [place for place, other in enumerate(uids) if other == uid]
        groups.append(_scored_group([(inputs["responses"][p], inputs["rewards"][p], notes[p]) for p in places]))
        shown.append(evidence(groups[-1], options))
        for place, item in zip(places, shown[-1]):
            if item:
                messages[place], mask[place] = teacher_prompt(messages[place], item, options), 1.0
    contexts = [
        [TeacherContext(token_ids=(), evidence=item, shortened=False) if item else None for item in items]
        for items in shown
    ]
    metrics = {name: figure.result() for name, figure in context_metrics(groups, shown, contexts, options).items()}
    # Not of the reference.
    del metrics["self_distillation/shortened_contexts"], metrics["self_distillation/dropped_contexts"]
    # The reference's mean of the mask is in float32.
    share = "self_distillation/reprompt_sample_fraction"
    metrics[share] = float(np.float32(metrics[share]))
    return {"teacher_messages": messages, "self_distillation_mask": mask, "metrics": metrics}


def _scored_group(answers: list[tuple[str, float, str | None]]) -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            prompt_index=0,
            sample_index=number,
            token_ids=(0,),
            text=text,
            log_probs=(0.0,),
            log_kept_mass=(0.0,),
            finish_reason="stop",
            policy_version=0,
        )
        for number, (text, _, _) in enumerate(answers)
    )
    rewards = tuple(Reward(value=value, feedback=note) for _, value, note in answers)
    return RolloutGroup(prompt=Prompt(index=0, text="", token_ids=(0,)), rollouts=rollouts, rewards=rewards)


OPS: dict[str, Callable[[Arrays, Params], Result]] = {
    "add_tail_bucket": _add_tail_bucket,
    "agg_loss": _agg_loss,
    "agg_loss_sdpo_fork": _agg_loss_fork,
    "compute_gae_advantage_return": _verl_gae,
    "compute_gdpo_outcome_advantage": _verl_gdpo,
    "compute_gpg_outcome_advantage": _verl_by_group(advantages.gpg),
    "compute_grpo_outcome_advantage": _verl_by_group(advantages.grpo, scaled=True),
    "compute_grpo_passk_outcome_advantage": _verl_by_group(advantages.pass_at_k, scaled=True),
    "compute_grpo_vectorized_outcome_advantage": _verl_by_group(advantages.grpo, scaled=True),
    "compute_offpolicy_metrics": _verl_off_policy_metrics,
    "compute_opo_outcome_advantage": _verl_opo,
    "compute_policy_loss_bypass_mode": _verl_bypass,
    "compute_policy_loss_cispo": _verl_policy_loss(policy_loss.cispo, **_VERL_BOUNDS),
    "compute_policy_loss_clip_cov": _depends_on_the_cut,
    "compute_policy_loss_dppo_kl": _verl_policy_loss(policy_loss.dppo_kl, **_VERL_BOUNDS, max_ratio="clip_ratio_c"),
    "compute_policy_loss_dppo_tv": _verl_policy_loss(policy_loss.dppo_tv, **_VERL_BOUNDS, max_ratio="clip_ratio_c"),
    "compute_policy_loss_dro": _verl_policy_loss(policy_loss.dro, beta="dro_beta"),
    "compute_policy_loss_geo_mean": _verl_geo_mean,
    "compute_policy_loss_gpg": _verl_policy_loss(policy_loss.reinforce),
    "compute_policy_loss_gspo": _verl_policy_loss(policy_loss.gspo, "seq-mean-token-mean", **_VERL_BOUNDS),
    "compute_policy_loss_kl_cov": _depends_on_the_cut,
    "compute_policy_loss_reinforce": _verl_reinforce,
    "compute_policy_loss_sapo": _verl_policy_loss(
        policy_loss.sapo, "seq-mean-token-mean", temperature_positive="tau_pos", temperature_negative="tau_neg"
    ),
    "compute_policy_loss_vanilla": _verl_ppo_clip,
    "compute_reinforce_plus_plus_baseline_outcome_advantage": _verl_reinforce_plus_plus_baseline,
    "compute_reinforce_plus_plus_outcome_advantage": _verl_reinforce_plus_plus,
    "compute_remax_outcome_advantage": _verl_remax,
    "compute_rloo_outcome_advantage": _verl_by_group(advantages.rloo),
    "compute_rloo_vectorized_outcome_advantage": _verl_by_group(advantages.rloo, zero_singletons=True),
    "compute_rollout_correction_weights": _verl_rollout_weights,
    "compute_rollout_rejection_mask": _verl_rejection_mask,
    "cs336_compute_group_normalized_rewards": _cs336_group_normalized_rewards,
    "dapo_overlong": _dapo_overlong,
    "distill_full_per_token": _trl_per_token,
    "distill_sampled_per_token": _trl_per_token,
    "distill_topk_per_token": _trl_per_token,
    "ema_decay_schedule": _ema_decay_schedule,
    "ema_step_axis": _ema_step_axis,
    "ema_step_axis_policy_loss": _ema_policy_loss(by_token=False),
    "ema_step_axis_shared_uid": _ema_step_axis_shared_uid,
    "ema_token_axis_init_first": _ema_token_axis,
    "ema_token_axis_policy_loss": _ema_policy_loss(by_token=True),
    "ema_update": _ema_update,
    "ema_weight_step": _ema_weight_step,
    "entropy_from_logits": _entropy_from_logits,
    "gae_dense": _slime_gae,
    "gkd_jsd": _gkd_jsd,
    "kl_penalty": _verl_kl_penalty,
    "kl_score_function": _nemo_kl_score_function,
    "liger_grpo_loss": _liger_grpo_loss,
    "logprobs_from_logits_naive": _logprobs_from_logits,
    "masked_whiten": _masked_whiten,
    "nemo_clipped_pg": _nemo_clipped_pg,
    "nemo_distill_topk": _nemo_distill_topk,
    "nemo_grpo_advantage": _nemo_grpo_advantage,
    "sdpo_loss": _sdpo_loss,
    "sdpo_teacher_context": _sdpo_teacher_context,
    "slime_approx_kl": _slime_approx_kl,
    "slime_cispo": _slime_cispo,
    "slime_gspo_kl": _slime_gspo_kl,
    "slime_opsm": _slime_opsm,
    "slime_policy_loss": _slime_policy_loss,
    "trl_grpo_loss": _trl_grpo_loss,
    "trl_sdpo_loss": _trl_sdpo_loss,
    "trust_region_mix": _trust_region_mix,
    "vocab_parallel_logprob_entropy": _slime_logprob_entropy,
    **building_blocks.OPS,
    **critic.OPS,
}
