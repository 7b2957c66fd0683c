"""The adapter's distillation: values by hand, refusals, and the cases themselves where the environment has them."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.goldens import adapter
from tests.goldens.adapter import OPS, Arrays, Params

HALF, QUARTER = np.log([0.5, 0.5]), np.log([0.25, 0.75])
REVERSE = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
FORWARD = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
# dKL(s || t)/dz = s (log s - log t - KL), dKL(t || s)/dz = s - t
REVERSE_SLOPE = 0.5 * (np.log([2, 2 / 3]) - REVERSE)
FORWARD_SLOPE = np.array([0.25, -0.25])
SDPO: Params = {
    "alpha": 1.0,
    "distillation_topk": None,
    "distillation_add_tail": True,
    "full_logit_distillation": True,
    "is_clip": None,
    "loss_agg_mode": "token-mean",
    "temperature": 1.0,
}


def assert_close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def logits(student: np.ndarray = HALF, teacher: np.ndarray = QUARTER) -> Arrays:
    """Two rows of two tokens, all alike; the last is masked, and the rows have labels 0."""
    return {
        "student_logits": np.tile(student, (2, 2, 1)),
        "teacher_logits": np.tile(teacher, (2, 2, 1)),
        "labels": np.zeros((2, 2), np.int64),
        "response_mask": np.array([[1.0, 1.0], [1.0, 0.0]]),
        "old_log_probs": np.full((2, 2), math.log(0.5)),
    }


def refused(operation: str, inputs: Arrays, params: Params, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        OPS[operation](inputs, params)


@pytest.mark.parametrize("k", [None, 1, 2, 5])
def test_sdpo_loss(k: int | None) -> None:
    """One id and the tail of two is the whole vocabulary; of two ids the tail is nothing."""
    result = OPS["sdpo_loss"](logits(), SDPO | {"distillation_topk": k})
    np.testing.assert_allclose(result["out.loss"], REVERSE, rtol=1e-6)
    expected = np.array([[REVERSE_SLOPE, REVERSE_SLOPE], [REVERSE_SLOPE, 0 * REVERSE_SLOPE]]) / 3
    np.testing.assert_allclose(result["grad.loss.student_logits"], expected, rtol=1e-6, atol=1e-12)
    if k is not None:
        assert (
            result["out.student_topk_ids"].shape == (2, 2, min(k, 2))
            and (result["out.student_topk_ids"][..., 0] == 0).all()
        )


def test_sdpo_masks_and_weights() -> None:
    masked = logits() | {"self_distillation_mask": np.array([0.0, 1.0])}
    result = OPS["sdpo_loss"](masked, SDPO)
    assert_close(result["out.loss"], REVERSE)
    assert not result["grad.loss.student_logits"][0].any()
    empty = OPS["sdpo_loss"](logits() | {"self_distillation_mask": np.zeros(2)}, SDPO)
    assert empty["out.loss"] == 0 and not empty["grad.loss.student_logits"].any()
    old = logits() | {"old_log_probs": np.log([[0.5, 0.1], [1.0, 1.0]])}
    clipped = OPS["sdpo_loss"](old, SDPO | {"is_clip": 2.0})
    assert_close(clipped["out.loss"], (1 + 2 + 0.5) * REVERSE / 3)
    corrected = OPS["sdpo_loss"](old | {"rollout_is_weights": np.array([[3.0, 1], [0, 0]])}, SDPO | {"is_clip": 2.0})
    assert_close(corrected["out.loss"], (3 + 2) * REVERSE / 3)
    cooled = OPS["sdpo_loss"](logits(0.5 * HALF, 0.5 * QUARTER), SDPO | {"temperature": 0.5})
    assert_close(cooled["out.loss"], REVERSE)
    assert_close(cooled["grad.loss.student_logits"][0, 0], REVERSE_SLOPE / 3 / 0.5)
    refused("sdpo_loss", logits(), SDPO | {"loss_agg_mode": "seq-mean-token-sum-norm"}, "number of sequences")


def test_sampled_tokens() -> None:
    params = SDPO | {"full_logit_distillation": False}
    result = OPS["sdpo_loss"](logits(), params)
    advantage = math.log(0.5) - math.log(0.25)
    assert_close(result["out.loss"], advantage * math.log(0.5))
    assert_close(result["grad.loss.student_logits"][0, 0], advantage * np.array([0.5, -0.5]) / 3)
    refused("sdpo_loss", logits(), params | {"alpha": 0.5}, "reverse KL")
    inputs = {name: logits()[name] for name in ("student_logits", "teacher_logits")}
    inputs |= {"completion_ids": logits()["labels"], "weight": np.array([[1.0, 2], [3, 0]])}
    result = OPS["distill_sampled_per_token"](inputs, {})
    assert_close(result["out.per_token"], np.full((2, 2), advantage * math.log(0.5)))
    assert_close(result["grad.sum_weighted.student_logits"][1, 0], 3 * advantage * np.array([0.5, -0.5]))


def test_trl() -> None:
    inputs = {name: logits()[name] for name in ("student_logits", "teacher_logits")}
    inputs["weight"] = np.array([[1.0, 2], [3, 0]])
    result = OPS["distill_full_per_token"](inputs, {"alpha": 0.0})
    assert_close(result["out.per_token"], np.full((2, 2), FORWARD))
    assert_close(result["grad.sum_weighted.student_logits"][0, 1], 2 * FORWARD_SLOPE)
    one = OPS["distill_topk_per_token"](inputs, {"alpha": 0.0, "topk": 1, "add_tail": True})
    assert_close(one["out.per_token"], np.full((2, 2), FORWARD))
    alone = OPS["distill_topk_per_token"](inputs, {"alpha": 0.0, "topk": 1, "add_tail": False})
    assert_close(alone["out.per_token"], np.zeros((2, 2)))
    # The mean over both rows, the second of which has no teacher.
    params = {
        "distillation_mode": "full_logits",
        "alpha": 1.0,
        "distillation_topk": None,
        "distillation_add_tail": True,
    }
    rows = logits() | {"self_distillation_mask": np.array([1.0, 0.0])}
    assert_close(OPS["trl_sdpo_loss"](rows, params | {"is_clip": 2.0})["out.loss"], REVERSE / 2)
    assert_close(OPS["add_tail_bucket"]({"log_probs": HALF[None, :1]}, {})["out.out"], HALF[None])


def test_gkd() -> None:
    inputs = {name: logits()[name] for name in ("student_logits", "teacher_logits")}
    inputs["labels"] = np.array([[0, -100], [1, -100]])
    params = {"beta": 1.0, "temperature": 1.0, "reduction": "batchmean"}
    result = OPS["gkd_jsd"](inputs, params)
    assert_close(result["out.loss"], REVERSE)
    assert_close(result["grad.loss.student_logits"][1], [REVERSE_SLOPE / 2, [0, 0]])
    refused("gkd_jsd", inputs, params | {"reduction": "sum"}, "no reduction sum")
    refused("gkd_jsd", inputs | {"labels": np.full((2, 2), -100)}, params, "nothing to average")


def test_nemo() -> None:
    inputs = {name: logits()[name] for name in ("student_logits", "teacher_logits")}
    inputs |= {"token_mask": np.ones((2, 2)), "sample_mask": np.array([1.0, 0.0])}
    params = {"kl_type": "mixed", "k": 2, "zero_outside_topk": False}
    result = OPS["nemo_distill_topk"](inputs, params)
    np.testing.assert_allclose(result["out.loss"], (FORWARD + REVERSE) / 2, rtol=1e-7)
    assert result["out.teacher_topk_ids"].tolist() == [[[1, 0]] * 2] * 2
    assert not result["grad.loss.student_logits"][1].any()
    refused("nemo_distill_topk", inputs, params | {"zero_outside_topk": True}, "outside the teacher's ids")


def test_weights_of_models() -> None:
    mixed = OPS["trust_region_mix"](
        {"ref_logits": HALF[None, None], "student_logits": QUARTER[None, None]}, {"mix_coef": 0.25}
    )
    assert_close(mixed["out.logits"][0, 0], 0.75 * HALF + 0.25 * QUARTER)
    names = ["frozen", "buf", "a.weight", "a.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    inputs = {
        f"{role}.{name}": np.full(2, value) for role, value in (("teacher", 1.0), ("student", 3.0)) for name in names
    }
    result = OPS["ema_update"](inputs, {"update_rate": 0.25})
    assert_close(result["out.teacher_new.a.weight"], [1.5, 1.5])
    assert "out.teacher_new.buf" not in result and "out.teacher_new.bn.running_mean" not in result
    inputs = {
        f"{role}.{name}": np.full(2, value)
        for role, value in (("ema", 1.0), ("model", 3.0))
        for name in ("lin.weight", "lin.bias", "fz.weight", "fz.bias")
    }
    step = OPS["ema_weight_step"](inputs, {"decay": 0.75})
    assert_close(step["out.ema_new.lin.bias"], [1.5, 1.5])
    assert_close(step["out.ema_new.fz.weight"], [3, 3])
    schedule = {"inv_gamma": 1.0, "power": 1.0, "min_value": 0.0, "max_value": 0.7, "update_after_step": 1}
    decays = OPS["ema_decay_schedule"]({"optimization_step": np.array([0, 2, 3, 4, 9])}, schedule)["out.decay"]
    assert_close(decays, [0, 0, 1 / 2, 2 / 3, 0.7])


def test_cases() -> None:
    """Every case of the distillation and of averaged weights; one asks for a mean that divides by no sequences."""
    folder = os.environ.get("MEGATRON_RL_GOLDENS", "")
    if not folder:
        pytest.skip("set MEGATRON_RL_GOLDENS to a directory with check_goldens.py and its cases")
    families = r"^(sdpo|trl\.sdpo|trl\.gkd|nemo\.distill|ema\.weight)"
    command = [
        sys.executable,
        str(Path(folder) / "check_goldens.py"),
        "--adapter",
        adapter.__file__,
        "--only",
        families,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed, failed, skipped, _ = (int(word) for word in done.stdout.split() if word.isdigit())
    assert passed >= 42 and failed == 0 and skipped <= 1, done.stdout
