"""The adapter of the numeric cases: values computed here, where gradients go, and which cases it refuses."""

import math

import numpy as np
import pytest

from tests.goldens.adapter import OPS, Arrays, Params, Result

MASK = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0}


def assert_close(got: np.ndarray | float, expected: object) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def policy_inputs(ratio: float = 1.1, advantage: float = 2.0) -> Arrays:
    """The same ratio and advantage for every token of the mask; what lies outside it must not matter."""
    logp = np.where(MASK > 0, math.log(ratio), np.nan)
    advantages = np.where(MASK > 0, advantage, np.nan)
    return {"log_prob": logp, "old_log_prob": np.zeros_like(MASK), "advantages": advantages, "response_mask": MASK}


def refused(operation: str, inputs: Arrays, params: Params, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        OPS[operation](inputs, params)


class TestAdvantages:
    def run(self, rewards: list[float], groups: str, dtype: type = np.float64, *, by_std: bool = True) -> Result:
        mask = np.ones((len(rewards), 2))
        scores = np.array([[0, reward] for reward in rewards], dtype)
        inputs = {"token_level_rewards": scores, "response_mask": mask, "index": np.array(list(groups))}
        return OPS["compute_grpo_outcome_advantage"](inputs, {"norm_adv_by_std_in_grpo": by_std, "epsilon": 1e-6})

    def test_by_hand(self) -> None:
        scale = math.sqrt(2) + 1e-6
        result = self.run([1, 5, 3, 5], "abab")
        assert_close(result["out.advantages"], np.repeat([[-1 / scale], [0], [1 / scale], [0]], 2, axis=1))
        assert_close(self.run([1, 5, 3, 5], "abab", by_std=False)["out.returns"][:, 0], [-1, 0, 1, 0])

    def test_refuses_raw_scores_and_rounded_means(self) -> None:
        with pytest.raises(NotImplementedError, match="group of one"):
            self.run([1, 2, 0.5], "aab")
        with pytest.raises(NotImplementedError, match="equal rewards"):
            self.run([0.3] * 8, "a" * 8, np.float32)
        assert_close(self.run([0.3] * 8, "a" * 8, np.float32, by_std=False)["out.advantages"], np.zeros((8, 2)))

    def test_leave_one_out_is_another_baseline(self) -> None:
        inputs = {"prompt_ids": np.array([[1], [1]]), "rewards": np.array([0.0, 1.0])}
        params = {"use_leave_one_out_baseline": False, "normalize_rewards": False}
        assert_close(OPS["nemo_grpo_advantage"](inputs, params)["out.advantages"], [-0.5, 0.5])
        refused("nemo_grpo_advantage", inputs, params | {"use_leave_one_out_baseline": True}, "leave_one_out")


class TestReductions:
    VALUES = np.arange(9.0).reshape(3, 3)

    @pytest.mark.parametrize(
        ("params", "loss"),
        [
            ({"loss_agg_mode": "token-mean"}, (0 + 1 + 4 + 5 + 6) / 5),
            ({"loss_agg_mode": "token-mean", "batch_num_tokens": 10, "dp_size": 2}, 16 / 10 * 2),
            ({"loss_agg_mode": "seq-mean-token-sum"}, 16 / 3),
            ({"loss_agg_mode": "seq-mean-token-sum", "global_batch_size": 8, "dp_size": 2}, 16 / 8 * 2),
            ({"loss_agg_mode": "seq-mean-token-sum-norm"}, 16 / 9),
            ({"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 4}, 16 / 12),
        ],
    )
    def test_by_hand(self, params: Params, loss: float) -> None:
        result = OPS["agg_loss"]({"loss_mat": self.VALUES, "loss_mask": MASK}, params)
        assert_close(result["out.loss"], loss)
        assert_close((result["grad.loss.loss_mat"] * self.VALUES).sum(), loss)
        assert not np.any(result["grad.loss.loss_mat"][MASK == 0])

    def test_refuses_other_denominators(self) -> None:
        inputs = {"loss_mat": self.VALUES, "loss_mask": MASK * [[1], [0], [1]]}
        refused("agg_loss", inputs, {"loss_agg_mode": "token-sum"}, "no aggregation token-sum")
        params = {"loss_agg_mode": "seq-mean-token-sum", "global_batch_size": 8}
        refused("agg_loss", inputs, params, "without tokens is not counted")
        refused("agg_loss", inputs | {"loss_mask": MASK * 0}, {"loss_agg_mode": "token-mean"}, "0 / 0")
        refused("agg_loss_sdpo_fork", inputs, {"loss_agg_mode": "seq-mean-token-sum-norm"}, "number of sequences")

    @pytest.mark.parametrize(("dim", "mean"), [(None, 3.2), (0, [3, 2.5, 5]), (-1, [0.5, 4.5, 6])])
    def test_lines(self, dim: int | None, mean: object) -> None:
        inputs = {"tensor": self.VALUES, "mask": MASK > 0}
        assert_close(OPS["cs336_masked_mean"](inputs, {"dim": dim})["out.array"], mean)
        total = OPS["cs336_masked_normalize"](inputs, {"dim": dim, "normalize_constant": 4.0})["out.array"]
        assert_close(total, (self.VALUES * MASK).sum(dim) / 4)


class TestPolicyLosses:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "slope"),
        [(1.1, 2.0, -2.2, -2.2), (1.5, 2.0, -2.4, 0.0), (1.5, -1.0, 1.5, 1.5), (4.0, -1.0, 3.0, 0.0)],
    )
    def test_vanilla(self, ratio: float, advantage: float, loss: float, slope: float) -> None:
        inputs = policy_inputs(ratio, advantage)
        result = OPS["compute_policy_loss_vanilla"](inputs, {"loss_agg_mode": "token-mean"} | CLIP)
        assert_close(result["out.loss"], loss)
        assert_close(result["grad.loss.log_prob"], MASK * slope / 5)
        assert_close(result["metric.actor/ppo_kl"], -math.log(ratio))
        assert result["metric.actor/pg_clipfrac"] == (ratio == 1.5 and advantage > 0)
        assert result["metric.actor/pg_clipfrac_lower"] == (ratio == 4)

    def test_gspo_is_a_mean_of_means(self) -> None:
        result = OPS["compute_policy_loss_gspo"](policy_inputs(), {"loss_agg_mode": "token-mean"} | CLIP)
        np.testing.assert_allclose(result["out.loss"], -2.2, rtol=1e-7)
        expected = MASK / MASK.sum(1, keepdims=True) * -2.2 / 3
        np.testing.assert_allclose(result["grad.loss.log_prob"], expected, rtol=1e-7)

    @pytest.mark.parametrize("level", ["token", "sequence"])
    @pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
    def test_trl_and_liger_agree(self, level: str, loss_type: str) -> None:
        inputs = policy_inputs() | {"mask": MASK, "advantages": np.array([2.0, 2.0, 2.0])}
        trl = OPS["trl_grpo_loss"](inputs, {"loss_type": loss_type, "level": level, "eps": [0.2, 0.2]})
        params = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 3}
        liger = OPS["liger_grpo_loss"](inputs, params)
        assert_close(trl["out.loss"], -2.2 * (5 / 9 if loss_type == "dr_grpo" else 1))
        assert_close(liger["out.loss"], trl["out.loss"])
        assert_close(liger["grad.loss.log_prob"], trl["grad.loss.log_prob"])

    def test_slime_counts_backwards(self) -> None:
        inputs = {"ppo_kl": np.log([1 / 1.1, 1 / 1.5]), "advantages": np.array([2.0, 2.0])}
        result = OPS["slime_policy_loss"](inputs, {"eps_clip": 0.2, "eps_clip_high": 0.2})
        assert_close(result["out.pg_losses"], [-2.2, -2.4])
        assert_close(result["grad.sum.ppo_kl"], [2.2, 0])
        assert_close(result["out.clipfrac"], [0, 1])

    def test_nemo_leaves_out_samples(self) -> None:
        inputs = policy_inputs() | {"token_mask": MASK, "sample_mask": np.array([1.0, 0.0, 1.0])}
        result = OPS["nemo_clipped_pg"](inputs, {"reference_policy_kl_penalty": 0.0})
        assert_close(result["grad.loss.log_prob"], MASK * [[1], [0], [1]] * -2.2 / 3)
        refused("nemo_clipped_pg", inputs, {}, "no KL")

    def test_refuses_what_is_not_there(self) -> None:
        inputs = policy_inputs() | {"mask": MASK, "advantages": np.ones(3)}
        params = {"loss_type": "grpo", "level": "token", "eps": [0.2, 0.2]}
        refused("trl_grpo_loss", inputs, params | {"delta": 2.0}, "delta")
        refused("trl_grpo_loss", inputs, params | {"beta": 0.04}, "beta")
        refused("trl_grpo_loss", inputs, params | {"loss_type": "cispo"}, "cispo")
        refused("trl_grpo_loss", inputs | {"mask": MASK * [[1], [0], [1]]}, params, "without tokens")
        refused("trl_grpo_loss", inputs | {"old_log_prob": MASK * 25}, params, "bounded at 20")
        weighted = policy_inputs() | {"rollout_is_weights": MASK}
        refused("compute_policy_loss_vanilla", weighted, {"loss_agg_mode": "token-mean"} | CLIP, "rollout")


class TestLogits:
    """p = (1/8, 1/8, 3/4), over more columns than a chunk: the others have probability 0."""

    P = np.array([1 / 8, 1 / 8, 3 / 4])
    LOGITS = np.concatenate([np.log(P), np.full(4, -1e3)])[None, None]

    def test_logprobs(self) -> None:
        result = OPS["logprobs_from_logits_naive"]({"logits": self.LOGITS, "labels": np.array([[2]])}, {})
        assert_close(result["out.logprobs"], [[math.log(3 / 4)]])
        assert_close(result["grad.sum_logprobs.logits"][0, 0], [-1 / 8, -1 / 8, 1 / 4, 0, 0, 0, 0])

    def test_entropy(self) -> None:
        result = OPS["entropy_from_logits"]({"logits": self.LOGITS}, {})
        entropy = -(self.P * np.log(self.P)).sum()
        assert_close(result["out.entropy"], [[entropy]])
        assert_close(result["grad.sum_entropy.logits"][0, 0, :3], -self.P * (np.log(self.P) + entropy))

    def test_both(self) -> None:
        inputs = {"logits": self.LOGITS[0], "target": np.array([2])}
        result = OPS["vocab_parallel_logprob_entropy"](inputs, {"weights": [1.0, 0.0]})
        assert result["out.log_prob"].shape == (1, 1)
        assert_close(result["grad.1.0lp+0.0ent.logits"][0, :3], [-1 / 8, -1 / 8, 1 / 4])
