"""The adapter's part for critics: pooled scores, the loss of pairs, PPO's value loss."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rl.algorithms import discriminator
from megatron_rl.algorithms.discriminator import Adaptive, PairLoss
from megatron_rl.algorithms.pooling import counted
from megatron_rl.algorithms.value_loss import value_loss
from megatron_rl.workers.critic import pooled

Arrays = dict[str, np.ndarray]
Params = dict[str, Any]
Result = dict[str, Any]


class Side:
    """One side's values as leaves, per response, and its scores."""

    def __init__(self, inputs: Arrays, prefix: str, params: Params) -> None:
        values, ids = inputs[f"{prefix}values"], inputs[f"{prefix}ids"]
        self.mask = inputs[f"{prefix}mask"] > 0
        stop = {int(params["eos_id"])}
        texts = [ids[row][self.mask[row]].tolist() for row in range(len(ids))]
        if params["mode"] == "mean_no_eos" and any(stop & set(text[:-1]) for text in texts):
            raise NotImplementedError("ids that end a response are counted where they stand inside of one")
        self.values = [torch.tensor(values[row][self.mask[row]], requires_grad=True) for row in range(len(values))]
        self.scores = pooled(self.values, [counted(text, params["mode"], stop) for text in texts])
        self.lengths = torch.tensor([len(text) for text in texts])

    def gradient(self) -> np.ndarray:
        result = np.zeros(self.mask.shape)
        grads = [v.grad if v.grad is not None else torch.zeros_like(v) for v in self.values]
        result[self.mask] = torch.cat(grads).numpy()
        return result


def score_pool(inputs: Arrays, params: Params) -> Result:
    side = Side(inputs, "", params)
    side.scores.sum().backward()
    return {"out.score": side.scores.detach().numpy(), "grad.sum.values": side.gradient()}


def bt_loss(inputs: Arrays, params: Params) -> Result:
    teacher, student = (Side(inputs, f"{name}_", params) for name in ("teacher", "student"))
    fixed: float | Adaptive = float(params["temperature"])
    if "adaptive" in params:
        offset, slope, low, high = params["adaptive"]
        fixed = Adaptive(offset=offset, slope=slope, low=low, high=high)
    options = PairLoss(
        raw_weight=params["raw_weight"],
        norm_weight=params["norm_weight"],
        batch_norm=params["batch_norm"],
        temperature=fixed,
    )
    terms = discriminator.pair_loss(teacher.scores, student.scores, teacher.lengths, student.lengths, options)
    terms.loss.backward()
    t, s = teacher.scores.detach(), student.scores.detach()
    figures = discriminator.pair_figures(terms.diff.detach(), t - s)
    figures |= {"temperature": terms.temperature}
    for side, scores in (("teacher", t), ("student", s)):
        own = discriminator.score_figures(side, scores)
        figures |= {f"{side}_score_{name}": own[f"{side}_value_{name}"] for name in ("mean", "std")}
    return {
        "out.loss": float(terms.loss.detach()),
        "out.diff": terms.diff.detach().numpy(),
        "grad.loss.student_values": student.gradient(),
        "grad.loss.teacher_values": teacher.gradient(),
        **{f"metric.critic/{name}": value for name, value in figures.items()},
        "metric.reward/length_corr": discriminator.length_correlation(s, student.lengths),
    }


def ppo_value_loss(inputs: Arrays, params: Params) -> Result:
    mask = inputs["response_mask"] > 0

    def flat(name: str) -> Tensor:
        return torch.tensor(inputs[name][mask])

    values = flat("vpreds").requires_grad_()
    terms = value_loss(values, flat("values"), flat("returns"), clip=params["cliprange_value"])
    loss = terms.loss.mean()
    loss.backward()
    gradient = np.zeros(mask.shape)
    assert values.grad is not None
    gradient[mask] = values.grad.numpy()
    return {
        "out.vf_loss": float(loss.detach()),
        "out.vf_clipfrac": float(terms.clipped.double().mean()),
        "grad.vf_loss.vpreds": gradient,
    }


OPS = {"gad_score_pool": score_pool, "gad_bt_loss": bt_loss, "compute_value_loss": ppo_value_loss}
