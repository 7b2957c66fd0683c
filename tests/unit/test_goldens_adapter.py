"""The adapter of the numeric cases: values computed here, where gradients go, and which cases it refuses."""

import math
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from tests.goldens.adapter import OPS, Arrays, Params, Result

MASK = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0}


def assert_close(got: Any, expected: Any) -> None:
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
        scores: np.ndarray = np.array([[0, reward] for reward in rewards], dtype)
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

    def test_leave_one_out_has_no_deviation(self) -> None:
        inputs = {"prompt_ids": np.array([[1], [1], [2]]), "rewards": np.array([0.0, 1.0, 3.0])}
        params = {"use_leave_one_out_baseline": False, "normalize_rewards": False}
        assert_close(OPS["nemo_grpo_advantage"](inputs, params)["out.advantages"], [-0.5, 0.5, 0])
        others = params | {"use_leave_one_out_baseline": True}
        assert_close(OPS["nemo_grpo_advantage"](inputs, others)["out.advantages"], [-1, 1, 0])
        refused("nemo_grpo_advantage", inputs, others | {"normalize_rewards": True}, "leave_one_out")


class TestOtherAdvantages:
    """Scores of 3, 5; 1, 0 in two groups. The third row's reward is outside its mask, the last row has no token."""

    MASK = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    REWARDS = np.array([[1.0, 0.0, 2.0], [0.0, 5.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])

    def inputs(self, rewards: np.ndarray = REWARDS, mask: np.ndarray = MASK, groups: str = "aabb") -> Arrays:
        return {"token_level_rewards": rewards, "response_mask": mask, "index": np.array(list(groups))}

    @pytest.mark.parametrize(
        ("operation", "params", "values"),
        [
            ("rloo", {}, [-2, 2, 1, -1]),
            ("rloo_vectorized", {}, [-2, 2, 1, -1]),
            ("opo", {}, [-1, 1, 0, -1]),
            ("gpg", {"f_norm": 1.0}, [-4 / 3, 4 / 3, 2 / 3, -2 / 3]),
            ("grpo_passk", {"norm_adv_by_std_in_grpo": False}, [0, 2, 1, 0]),
        ],
    )
    def test_by_group(self, operation: str, params: Params, values: list[float]) -> None:
        name = f"compute_{operation}_outcome_advantage"
        result = OPS[name](self.inputs(), params)
        assert_close(result["out.advantages"], np.array(values)[:, None] * self.MASK)
        if operation != "rloo_vectorized":
            refused(name, self.inputs(groups="abbb"), params, "group of one")

    def test_group_refusals(self) -> None:
        assert not OPS["compute_rloo_vectorized_outcome_advantage"](self.inputs(groups="abcd"), {})[
            "out.advantages"
        ].any()
        refused("compute_gpg_outcome_advantage", self.inputs(), {"f_norm": 2.0}, "f_norm")
        empty = self.inputs(mask=self.MASK * [[1], [1], [0], [0]])
        refused("compute_opo_outcome_advantage", empty, {}, "without tokens")
        equal = self.inputs(np.full((8, 1), 0.3, np.float32), np.ones((8, 1)), "a" * 8)
        refused("compute_grpo_passk_outcome_advantage", equal, {}, "equal rewards")

    def test_whitened(self) -> None:
        """Values and counts; the counts of verl are larger by 1e-8."""
        cases: list[tuple[str, Params, np.ndarray]] = [
            ("reinforce_plus_plus", {"gamma": 0.5}, np.array([[2, 0, 2], [2.5, 5, 0], [0, 0, 0], [0, 0, 0]])),
            ("reinforce_plus_plus_baseline", {}, np.array([[-1], [1], [0.5], [-0.5]]) * self.MASK),
            ("gdpo", {}, np.array([[-1], [1], [1], [-1]]) * math.sqrt(0.5) * self.MASK),
        ]
        for operation, params, raw in cases:
            kept = raw[self.MASK > 0]
            expected = (raw - kept.mean()) / kept.std(ddof=1) * self.MASK
            result = OPS[f"compute_{operation}_outcome_advantage"](self.inputs(), params)
            np.testing.assert_allclose(result["out.advantages"], expected, rtol=1e-5, atol=1e-5)
            if operation == "reinforce_plus_plus":
                assert_close(result["out.returns"], raw)

    def test_whitened_refusals(self) -> None:
        for name in ("reinforce_plus_plus_baseline", "gdpo"):
            refused(f"compute_{name}_outcome_advantage", self.inputs(groups="abcc"), {}, "group of one")
        equal = np.array([[0.0, 0.0, 3.0], [0.0, 3.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
        name = "compute_reinforce_plus_plus_outcome_advantage"
        refused(name, self.inputs(equal), {"gamma": 1.0}, "equal values")
        refused("compute_reinforce_plus_plus_baseline_outcome_advantage", self.inputs(equal), {}, "equal values")
        values = np.ones((2, 2))
        refused("masked_whiten", {"values": values, "mask": values * [1, 0]}, {}, "bear no loss")
        refused("masked_whiten", {"values": values, "mask": values}, {}, "equal values")
        result = OPS["masked_whiten"]({"values": values * [1, 2], "mask": values}, {})
        np.testing.assert_allclose(result["out.shift"], values * [-1, 1] * math.sqrt(3 / 4), rtol=1e-6)

    def test_remax_leaves_the_next_return_in_a_gap(self) -> None:
        inputs = self.inputs() | {"reward_baselines": np.array([0.5, 0.5, 0.5, 0.5])}
        result = OPS["compute_remax_outcome_advantage"](inputs, {})
        assert_close(result["out.returns"], [[3, 2, 2], [5, 5, 0], [0, 0, 0], [0, 0, 0]])
        assert_close(result["out.advantages"], [[2.5, 2, 1.5], [4.5, 4.5, 0], [-0.5, 0, 0], [0, 0, 0]])

    def test_gae(self) -> None:
        """With gamma = lambda = 1 the advantages are 3 - 0.25, 2 - 0.75 and 5 - 0.25, 5 - 0.5."""
        values = np.array([[0.25, 0.5, 0.75], [0.25, 0.5, 0.75]])
        inputs = {"token_level_rewards": self.REWARDS[:2], "values": values, "response_mask": self.MASK[:2]}
        params = {"gamma": 1.0, "lam": 1.0}
        result = OPS["compute_gae_advantage_return"](inputs, params)
        assert_close(result["out.returns"], [[3, 1.75, 2], [5, 5, 0.75]])
        assert "out.advantages" not in result
        inputs["response_mask"] = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
        raw = np.array([[2.75, 1.25, 1.25], [4.5, 4.5, -0.75]])
        kept = raw[inputs["response_mask"] > 0]
        result = OPS["compute_gae_advantage_return"](inputs, params)
        np.testing.assert_allclose(result["out.advantages"], (raw - kept.mean()) / kept.std(ddof=1), rtol=1e-6)

    def test_gae_of_whole_rows(self) -> None:
        inputs = {"rewards": np.array([[0.0, 1.0]]), "values": np.array([[0.5, 0.25]])}
        result = OPS["gae_dense"](inputs, {"gamma": 0.5, "lambd": 0.5})
        assert_close(result["out.advantages"], [[-0.375 + 0.25 * 0.75, 0.75]])
        assert_close(result["out.chunked_advantages"], result["out.advantages"])
        assert_close(result["out.returns"], [[0.3125, 1]])


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
        liger = OPS["liger_grpo_loss"](inputs, params | {"beta": 0.0})
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

    def test_refuses_what_is_not_there(self) -> None:
        inputs = policy_inputs() | {"mask": MASK, "advantages": np.ones(3)}
        params = {"loss_type": "grpo", "level": "token", "eps": [0.2, 0.2]}
        refused("trl_grpo_loss", inputs, params | {"loss_type": "vespo"}, "no loss like vespo")
        refused("trl_grpo_loss", inputs, params | {"quant": 0.5}, "quant")
        refused("trl_grpo_loss", inputs | {"mask": MASK * [[1], [0], [1]]}, params, "without tokens")
        refused("trl_grpo_loss", inputs | {"old_log_prob": MASK * 25}, params, "bounded at 20")


class TestOtherPolicyLosses:
    """The tokens of the mask have A = 2 and the same ratio; where it matters, log-probabilities of log(ratio) - 1."""

    def inputs(self, ratio: float, advantage: float = 2.0) -> Arrays:
        inputs = policy_inputs(ratio, advantage)
        old = np.where(MASK > 0, -1.0, 0.0)
        return inputs | {"log_prob": inputs["log_prob"] + old, "old_log_prob": old}

    @pytest.mark.parametrize(
        ("operation", "extra", "ratio", "slope", "clipped"),
        [
            ("cispo", {}, 1.1, -2.2, 0),
            ("cispo", {}, 1.5, -2.4, 1),
            ("gpg", {}, 1.5, -2.0, None),
            ("dppo_tv", {}, 1.1, -2.2, 0),
            ("dppo_tv", {}, 1.6, 0.0, 1),
            ("dppo_kl", {}, 1.1, -2.2, 0),
            ("dppo_kl", {"clip_ratio_high": 0.02}, 1.6, 0.0, 1),
            ("dro", {"dro_beta": 0.5}, math.e, -1.5, None),
        ],
    )
    def test_verl(self, operation: str, extra: Params, ratio: float, slope: float, clipped: int | None) -> None:
        params = {"loss_agg_mode": "token-mean"} | CLIP | extra
        result = OPS[f"compute_policy_loss_{operation}"](self.inputs(ratio), params)
        assert_close(result["grad.loss.log_prob"], MASK * slope / 5)
        linear = slope * (math.log(ratio) - 1)
        assert_close(result["out.loss"], 0.25 if operation == "dro" else linear)
        if clipped is not None:
            assert result["metric.actor/pg_clipfrac"] == clipped

    def test_verl_sapo_is_a_mean_of_means(self) -> None:
        params = {"loss_agg_mode": "token-mean", "tau_pos": 1.0, "tau_neg": 1.05}
        result = OPS["compute_policy_loss_sapo"](self.inputs(1.0), params)
        np.testing.assert_allclose(result["out.loss"], -4, rtol=1e-7)
        expected = MASK / MASK.sum(1, keepdims=True) * -2 / 3
        np.testing.assert_allclose(result["grad.loss.log_prob"], expected, rtol=1e-7)

    def test_verl_geo_mean_counts_rows_without_tokens(self) -> None:
        mask, low = MASK * [[1], [0], [1]], {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
        inputs = policy_inputs(1.1) | {"response_mask": mask}
        result = OPS["compute_policy_loss_geo_mean"](inputs, low)
        np.testing.assert_allclose(result["out.loss"], -2.2 * 2 / 3, rtol=1e-7)
        expected = mask / np.maximum(mask.sum(1, keepdims=True), 1) * -2.2 / 3
        np.testing.assert_allclose(result["grad.loss.log_prob"], expected, rtol=1e-7)
        far = inputs | {"old_log_prob": inputs["log_prob"] - 11, "advantages": -inputs["advantages"]}
        refused("compute_policy_loss_geo_mean", far, low, "bounded at 10")
        refused("compute_policy_loss_geo_mean", inputs | {"rollout_is_weights": MASK}, low, "geometric mean of weights")

    def test_verl_covariances_depend_on_the_cut(self) -> None:
        for operation in ("compute_policy_loss_clip_cov", "compute_policy_loss_kl_cov"):
            refused(operation, policy_inputs(), {}, "cut would matter")

    def test_cs336(self) -> None:
        logp, advantages = np.log([[0.5, 0.25]]), np.array([[2.0]])
        inputs = {"policy_log_probs": logp, "raw_rewards_or_advantages": advantages}
        assert_close(OPS["cs336_compute_naive_policy_gradient_loss"](inputs, {})["out.array"], -2 * logp)
        step = {"policy_log_probs": logp, "response_mask": np.ones((1, 2), bool), "advantages": advantages}
        params = {"loss_type": "reinforce_with_baseline", "gradient_accumulation_steps": 2}
        result = OPS["cs336_grpo_microbatch_train_step"](step, params)
        assert_close(result["grad.loss.policy_log_probs"], [[-0.5, -0.5]])
        rewards = step | {"raw_rewards": -advantages}
        result = OPS["cs336_grpo_microbatch_train_step"](rewards, params | {"loss_type": "no_baseline"})
        assert_close(result["grad.loss.policy_log_probs"], [[0.5, 0.5]])

    def test_slime(self) -> None:
        old = np.log(np.full(2, 0.1, np.float32))
        logp = old + np.log(np.array([1.1, 8.0], np.float32))
        inputs = {"log_prob": logp, "old_log_prob": old, "advantages": np.array([2, -1], np.float32)}
        result = OPS["slime_cispo"](inputs, {"eps_clip": 1.0, "eps_clip_high": 4.0})
        np.testing.assert_allclose(result["grad.sum.log_prob"], [-2.2, 5], rtol=1e-6)
        np.testing.assert_allclose(result["out.pg_losses"], [-2.2, 5] * logp, rtol=1e-6)
        assert_close(result["out.clipfrac"], [0, 1])
        by_sequence = inputs | {"lens": np.array([1, 1]), "loss_mask": np.array([1.0, 0.0])}
        result = OPS["slime_gspo_kl"](by_sequence, {})
        np.testing.assert_allclose(result["out.ppo_kl"], [-math.log(1.1), 0], rtol=1e-5)

    @pytest.mark.parametrize("operation", ["trl_grpo_loss", "liger_grpo_loss"])
    def test_trl_and_liger(self, operation: str) -> None:
        def loss(name: str, ratio: float, advantage: float = 2.0, **params: Any) -> Result:
            if operation == "trl_grpo_loss":
                low, high = params.pop("epsilon_low", 0.2), params.pop("epsilon_high", 0.2)
                params |= {"eps": [low, high], "level": params.pop("importance_sampling_level", "token")}
            inputs = self.inputs(ratio, advantage) | {"mask": MASK, "advantages": np.full(3, advantage)}
            inputs["ref_log_prob"] = inputs["log_prob"]
            return OPS[operation](inputs, {"loss_type": name, "beta": 0.0} | params)

        assert_close(loss("cispo", 8.0, epsilon_high=5.0)["grad.loss.log_prob"], MASK * -10 / 5)
        assert_close(loss("cispo", 0.1, epsilon_high=5.0, beta=0.5)["grad.loss.log_prob"], MASK * -0.2 / 5)
        assert_close(loss("sapo", 1.0)["grad.loss.log_prob"], MASK / MASK.sum(1, keepdims=True) * -2 / 3)
        for ratio, advantage, slope in ((3.0, -2.0, 0.0), (1.9, -2.0, 3.8), (3.0, 2.0, 0.0)):
            result = loss("dapo", ratio, advantage, delta=2.0)
            assert_close(result["grad.loss.log_prob"], MASK * slope / 5)
        sequence = {"importance_sampling_level": "sequence"}
        assert_close(loss("luspo", 1.1, **sequence)["grad.loss.log_prob"], MASK * -2.2 / 3)
        for name, params, reason in (
            ("dapo", {"delta": 1.1}, "beyond the first"),
            ("dapo", {"delta": 2.0} | sequence, "no second bound"),
            ("cispo", sequence, "no sequence ratios"),
            ("luspo", {}, "over rows"),
            ("luspo", sequence | {"beta": 0.1}, "over rows"),
        ):
            with pytest.raises(NotImplementedError, match=reason):
                loss(name, 1.1, **params)

    def nemo(self, ratio: float, **params: Any) -> Any:
        inputs = self.inputs(ratio) | {"token_mask": MASK, "sample_mask": np.ones(3)}
        inputs["rollout_log_prob"] = inputs["old_log_prob"] - np.where(MASK > 0, np.log([[2], [0.5], [1]]), 0)
        result = OPS["nemo_clipped_pg"](inputs, {"reference_policy_kl_penalty": 0.0} | params)
        return 5 * result["grad.loss.log_prob"]

    def test_nemo(self) -> None:
        assert_close(self.nemo(1.5), 0 * MASK)
        assert_close(self.nemo(1.5, use_cispo=True), -2.4 * MASK)
        assert_close(self.nemo(1.5, disable_ppo_ratio=True), -2 * MASK)
        assert_close(self.nemo(1.5, force_on_policy_ratio=True), -2 * MASK)
        refused_options = {"use_cispo": True, "disable_ppo_ratio": True}
        with pytest.raises(NotImplementedError, match="use_cispo"):
            self.nemo(1.5, **refused_options)

    @pytest.mark.parametrize(
        ("params", "factors"),
        [
            ({}, [2, 0.5, 1]),
            ({"type": "tis", "ratio": 1.5}, [1.5, 0.5, 1]),
            ({"type": "icepop", "ratio": 1.5, "ratio_min": 0.4}, [0, 0.5, 1]),
            ({"type": "seq-mask-tis", "ratio": 2.5, "ratio_min": 0.8}, [2, 0, 1]),
        ],
    )
    def test_nemo_corrects_the_rollouts(self, params: Params, factors: list[float]) -> None:
        named = {f"truncated_importance_sampling_{name}": value for name, value in params.items()}
        got = self.nemo(1.1, use_importance_sampling_correction=True, **named)
        assert_close(got, -2.2 * MASK * np.array(factors)[:, None])

    def test_nemo_corrects_by_sequence(self) -> None:
        by_sequence = {"sequence_level_importance_ratios": True, "token_level_loss": False}
        got = self.nemo(1.1, use_importance_sampling_correction=True, **by_sequence)
        expected = -2.2 * MASK / MASK.sum(1, keepdims=True) * 5 / 3 * [[4], [0.25], [1]]
        np.testing.assert_allclose(got, expected, rtol=1e-7)


class TestRegularisers:
    """The same token everywhere: r = 1.1 and A = 2, hence a policy loss and slope of -2.2."""

    TRL = MappingProxyType({"loss_type": "bnpo", "level": "token", "eps": [0.2, 0.2]})

    def inputs(self, ref_ratio: float) -> Arrays:
        """A reference that finds the tokens `ref_ratio` times as likely as the policy does."""
        inputs = policy_inputs() | {"mask": MASK, "advantages": np.array([2.0, 2.0, 2.0])}
        entropies = np.where(MASK > 0, 0.25, np.nan)
        return inputs | {"ref_log_prob": inputs["log_prob"] + math.log(ref_ratio), "entropies": entropies}

    @pytest.mark.parametrize("level", ["token", "sequence"])
    @pytest.mark.parametrize(("beta", "bonus"), [(0.5, 0.0), (0.0, 0.1), (0.5, 0.1)])
    def test_trl(self, level: str, beta: float, bonus: float) -> None:
        params = {**self.TRL, "level": level, "beta": beta, "entc": bonus}
        result = OPS["trl_grpo_loss"](self.inputs(2.0), params)
        assert_close(result["out.loss"], -2.2 + beta * (2 - 1 - math.log(2)) - bonus * 0.25)
        assert_close(result["grad.loss.log_prob"], MASK * (-2.2 + beta * (1 - 2)) / 5)

    def test_liger_has_a_coefficient_by_default(self) -> None:
        result = OPS["liger_grpo_loss"](self.inputs(0.5), {"loss_type": "dapo"})
        assert_close(result["out.loss"], -2.2 + 0.04 * (math.log(2) - 0.5))
        assert_close(result["grad.loss.log_prob"], MASK * (-2.2 + 0.04 * 0.5) / 5)
        without = OPS["liger_grpo_loss"](self.inputs(0.5), {"loss_type": "dapo", "beta": 0.0})
        assert_close(without["out.loss"], -2.2)

    def test_refuses_other_terms(self) -> None:
        inputs = self.inputs(2.0)
        refused("trl_grpo_loss", inputs, {**self.TRL, "loss_type": "dr_grpo", "entc": 0.1}, "averaged like the loss")
        refused("trl_grpo_loss", self.inputs(14.0), {**self.TRL, "beta": 0.5}, "bounded at 10")
        refused("liger_grpo_loss", self.inputs(1e-5), {"loss_type": "dapo"}, "bounded at 10")
        del inputs["entropies"], inputs["ref_log_prob"]
        refused("trl_grpo_loss", inputs, {**self.TRL, "entc": 0.1}, "no entropies")
        refused("trl_grpo_loss", inputs, {**self.TRL, "beta": 0.5}, "no reference")

    def test_trl_weighs_the_kl(self) -> None:
        """r k3 has the slope r (k3 + 1 - e^d), and r is 1.1."""
        params = {**self.TRL, "beta": 0.5, "bias": True}
        result = OPS["trl_grpo_loss"](self.inputs(2.0), params)
        k3 = 1 - math.log(2)
        assert_close(result["out.loss"], -2.2 + 0.5 * 1.1 * k3)
        assert_close(result["grad.loss.log_prob"], MASK * (-2.2 + 0.5 * 1.1 * (k3 - 1)) / 5)
        refused("trl_grpo_loss", self.inputs(2.0), params | {"level": "sequence"}, "no sequence ratios")
        refused("trl_grpo_loss", self.inputs(2.0), params | {"entc": 0.1}, "no entropy bonus")

    @pytest.mark.parametrize(
        ("estimator", "value", "slope"),
        [
            ("k1", -math.log(2), 1.0),
            ("k2", math.log(2) ** 2 / 2, -math.log(2)),
            ("k3", 1 - math.log(2), -1.0),
        ],
    )
    def test_nemo_adds_the_score_function(self, estimator: str, value: float, slope: float) -> None:
        ones = {"token_mask": MASK, "sample_mask": np.ones(3), "advantages": 2 * MASK}
        params = {"reference_policy_kl_penalty": 0.5, "reference_policy_kl_type": estimator}
        result = OPS["nemo_clipped_pg"](self.inputs(2.0) | ones, params)
        assert_close(result["out.loss"], -2.2 + 0.5 * value)
        assert_close(result["grad.loss.log_prob"], MASK * (-2.2 + 0.5 * (slope + value)) / 5)
        inputs = self.inputs(2.0) | ones
        inputs["rollout_log_prob"] = inputs["log_prob"] - math.log(3)
        result = OPS["nemo_clipped_pg"](inputs, params | {"use_on_policy_kl_approximation": True})
        assert_close(result["out.loss"], -2.2 + 0.5 * 3 * value)
        assert_close(result["grad.loss.log_prob"], MASK * (-2.2 + 0.5 * 3 * (slope + value)) / 5)
        refused("nemo_clipped_pg", self.inputs(1e5) | ones, params, "bounded at 10")

    def test_nemo_has_no_dual_clip_by_sequence(self) -> None:
        inputs = policy_inputs() | {"token_mask": MASK, "sample_mask": np.ones(3)}
        params = {"reference_policy_kl_penalty": 0.0, "token_level_loss": False}
        by_sequence = params | {"sequence_level_importance_ratios": True, "ratio_clip_c": 3.0}
        refused("nemo_clipped_pg", inputs, by_sequence, "ratio_clip_c")


class TestRolloutCorrection:
    """Ratios old / rollout of 2, 1/2; 4, 4; 1 in the rows of the mask: products of 1, 16 and 1."""

    RATIOS = np.array([[2, 0.5, 1], [1, 4, 4], [1, 1, 1]])

    def inputs(self, mask: np.ndarray = MASK) -> Arrays:
        return {"log_ratio": np.where(mask > 0, np.log(self.RATIOS), np.nan), "response_mask": mask}

    def weights(self, level: str, threshold: object, *, normalize: bool = False, mask: np.ndarray = MASK) -> Result:
        params = {"rollout_is": level, "rollout_is_threshold": threshold, "rollout_is_batch_normalize": normalize}
        return OPS["compute_rollout_correction_weights"](self.inputs(mask), params)

    def test_weights(self) -> None:
        assert_close(self.weights("token", 3)["out.weights"], [[2, 0.5, 0], [0, 3, 3], [1, 0, 0]])
        assert_close(self.weights("token", "1_2")["out.weights"], [[2, 0, 0], [0, 0, 0], [1, 0, 0]])
        result = self.weights("sequence", "3.0")
        assert_close(result["out.weights"], [[1, 1, 0], [0, 3, 3], [1, 0, 0]])
        assert_close(result["metric.rollout_is_mean"], 9 / 5)
        assert_close(result["metric.rollout_is_seq_mean"], 5 / 3)

    def test_normalized_by_counts_that_are_a_little_larger(self) -> None:
        token, sequence = (self.weights(level, 3, normalize=True) for level in ("token", "sequence"))
        assert_close(token["out.weights"][0, 0], 2 / (9.5 / (5 + 1e-8)))
        assert_close(sequence["out.weights"][1, 1], 3 / ((2 / (2 + 1e-8) + 6 / (2 + 1e-8) + 1 / (1 + 1e-8)) / 3))
        assert not self.weights("token", "8_9", normalize=True)["out.weights"].any()

    def test_figures_that_count_empty_rows_are_left_out(self) -> None:
        result = self.weights("sequence", 3, mask=MASK * [[1], [1], [0]])
        assert "metric.rollout_is_seq_mean" not in result
        assert "metric.rollout_is_max" not in result
        assert_close(result["metric.rollout_is_mean"], 2)

    def test_rejection(self) -> None:
        def mask(names: str, thresholds: object) -> np.ndarray:
            params = {"rollout_rs": names, "rollout_rs_threshold": thresholds}
            return OPS["compute_rollout_rejection_mask"](self.inputs(), params)["out.mask"]

        assert_close(mask("token_k1", "0.3_1.5"), [[1, 0, 0], [0, 0, 0], [1, 0, 0]])
        assert_close(mask("seq_max_k3", 0.5), [[1, 1, 0], [0, 0, 0], [1, 0, 0]])
        assert_close(mask("token_k3,seq_sum_k2", "0.25,9"), [[0, 1, 0], [0, 0, 0], [1, 0, 0]])
        assert_close(mask("token_k2,seq_sum_k2", "0.1"), [[0, 0, 0], [0, 0, 0], [1, 0, 0]])
        params = {"rollout_rs": "binary_kl", "rollout_rs_threshold": 0.1}
        refused("compute_rollout_rejection_mask", self.inputs(), params, "no statistic binary_kl")

    def test_off_policy_figures(self) -> None:
        rollout = np.full_like(MASK, -1.0)
        inputs = {"response_mask": MASK, "rollout_log_prob": rollout, "old_log_prob": rollout + np.log(self.RATIOS)}
        result = OPS["compute_offpolicy_metrics"](inputs, {})
        assert_close(result["metric.kl"], -4 * math.log(2) / 5)
        assert_close(result["metric.chi2_seq"], (1 + 256 + 1) / 3 - 1)
        far = OPS["compute_offpolicy_metrics"](inputs | {"rollout_log_prob": rollout - 30}, {})
        assert {"metric.k3_kl", "metric.rollout_ppl"}.isdisjoint(far)
        refused("compute_offpolicy_metrics", inputs | {"response_mask": MASK * 0}, {}, "nothing to measure")

    @pytest.mark.parametrize("operation", ["compute_policy_loss_vanilla", "compute_policy_loss_gspo"])
    def test_weights_multiply_after_the_clip(self, operation: str) -> None:
        weights = {"rollout_is_weights": np.where(MASK > 0, 0.5, np.nan)}
        params = {"loss_agg_mode": "token-mean"} | CLIP
        for ratio, loss, slope in ((1.1, -2.2, -2.2), (1.5, -2.4, 0.0)):
            result = OPS[operation](policy_inputs(ratio) | weights, params)
            np.testing.assert_allclose(result["out.loss"], loss / 2, rtol=1e-7)
            np.testing.assert_allclose(result["grad.loss.log_prob"].sum(), slope / 2, rtol=1e-7)

    def test_reinforce(self) -> None:
        inputs = policy_inputs(1.5) | {"rollout_is_weights": 0.5 * MASK, "rollout_log_prob": np.zeros_like(MASK)}
        result = OPS["compute_policy_loss_reinforce"](inputs, {"loss_agg_mode": "token-mean"})
        assert_close(result["grad.loss.log_prob"], MASK * -2 / 2 / 5)
        assert_close(result["metric.actor/ppo_kl"], -math.log(1.5))
        assert_close(result["out.loss"], -math.log(1.5))

    def test_bypass(self) -> None:
        """Weights are for REINFORCE; what is rejected leaves the denominator."""
        inputs = policy_inputs(1.1)
        inputs["old_log_prob"] = np.where([[1, 0, 0], [0, 0, 0], [0, 0, 0]], -5.0, 0.0)
        params = {"rollout_is": "token", "rollout_is_threshold": 1.05, "rollout_rs": "token_k3"}
        params["rollout_rs_threshold"] = "0.3"
        left = MASK * [[0, 1, 1], [1, 1, 1], [1, 1, 1]]
        clipped = OPS["compute_policy_loss_bypass_mode"](inputs, {"loss_type": "ppo_clip", **params})
        assert_close(clipped["grad.loss.log_prob"], left * -2.2 / 4)
        reinforce = OPS["compute_policy_loss_bypass_mode"](inputs, {"loss_type": "reinforce", **params})
        assert_close(reinforce["grad.loss.log_prob"], left * 1.05 * -2 / 4)
        for result in (clipped, reinforce):
            assert_close(result["metric.rollout_corr/rollout_rs_masked_fraction"], 1 / 5)
            assert_close(result["metric.rollout_corr/rollout_is_mean"], 1.05)

    def test_trl_multiplies_and_leaves_out(self) -> None:
        params = {"loss_type": "bnpo", "level": "token", "eps": [0.2, 0.2]}
        inputs = policy_inputs(0.9) | {"mask": MASK, "advantages": np.array([-2.0, -2.0, 2.0])}
        inputs["log_prob"] = np.where(MASK > 0, np.log([[0.9], [1.1], [0.9]]), np.nan)
        left = MASK * [[0], [2.2], [-1.8]] / 5
        dropped = OPS["trl_grpo_loss"](inputs, params | {"opsm": 0.05})
        assert_close(dropped["grad.loss.log_prob"], left)
        ratios = inputs | {"importance_sampling_ratio": np.array([[0.5], [0.5], [3.0]])}
        both = OPS["trl_grpo_loss"](ratios, params | {"opsm": 0.05, "vllm": True})
        assert_close(both["grad.loss.log_prob"], left * [[0.5], [0.5], [3]])
        liger = OPS["liger_grpo_loss"](ratios, {"loss_type": "bnpo", "beta": 0.0})
        assert_close(liger["grad.loss.log_prob"], MASK * [[0.9], [1.1], [-5.4]] / 5)

    def test_trl_refusals(self) -> None:
        params = {"loss_type": "bnpo", "level": "token", "eps": [0.2, 0.2], "vllm": True}
        inputs = policy_inputs() | {"mask": MASK, "advantages": np.ones(3), "entropies": MASK, "ref_log_prob": MASK}
        ratios = inputs | {"importance_sampling_ratio": np.arange(9.0).reshape(3, 3)}
        refused("trl_grpo_loss", inputs, params, "there to be used")
        refused("trl_grpo_loss", ratios, params | {"vllm": False}, "there to be used")
        refused("trl_grpo_loss", ratios, params | {"beta": 0.1}, "other terms are not corrected")
        refused("trl_grpo_loss", ratios, params | {"entc": 0.1}, "other terms are not corrected")
        refused("trl_grpo_loss", ratios, params | {"level": "sequence"}, "own weight")
        refused("liger_grpo_loss", ratios, {"loss_type": "bnpo"}, "other terms are not corrected")

    def test_slime_masks(self) -> None:
        old = np.zeros(5, np.float32)
        inputs = {"log_prob": old - 0.2, "old_log_prob": old, "lens": np.array([2, 3])}
        inputs |= {"advantages": np.array([-1, -1, 1, 1, 1], np.float32), "loss_mask": np.ones(5, np.float32)}
        result = OPS["slime_opsm"](inputs, {"opsm_delta": 0.1})
        assert_close(result["out.mask"], [0, 0, 1, 1, 1])
        assert_close(result["out.clipfrac"], 1)
        assert_close(OPS["slime_opsm"](inputs, {"opsm_delta": 0.3})["out.clipfrac"], 0)
        masked = inputs | {"loss_mask": np.array([1, 0, 1, 1, 1], np.float32)}
        refused("slime_opsm", masked, {"opsm_delta": 0.1}, "bears no loss")

    def test_overlong(self) -> None:
        inputs = {"length": np.array([6, 7, 8]), "base_score": np.ones(3)}
        params = {"max_resp_len": 8, "overlong_buffer_len": 2, "penalty_factor": 0.5}
        assert_close(OPS["dapo_overlong"](inputs, params)["out.overlong_reward"], [0, -0.25, -0.5])
        refused("dapo_overlong", inputs, params | {"max_resp_len": 7}, "longer than allowed")
        refused("dapo_overlong", inputs, params | {"overlong_buffer_len": 0}, "a part of the length")


class TestDistances:
    """d = ref_logp - logp of 0, log 2, 3 (k3 above its bound of 10), 25 and -25 (beyond that of the log-ratio)."""

    D = np.array([0, math.log(2), 3, 25, -25])

    @pytest.mark.parametrize(
        ("names", "values", "slopes"),
        [
            (["kl", "k1"], -D, np.ones(5)),
            (["mse", "k2"], D * D / 2, -D),
            (["low_var_kl", "k3"], [0, 1 - math.log(2), 10, 10, 10], [0, -1, 0, 0, 0]),
            (["abs"], abs(D), -np.sign(D)),
            (["abs+"], abs(D), -D),
            (["kl+", "k1+"], -D, -D),
            (["mse+", "k2+"], D * D / 2, -D),
            (["low_var_kl+", "k3+"], [0, 1 - math.log(2), 10, 10, 10], -D),
        ],
    )
    def test_verl_names(self, names: list[str], values: object, slopes: object) -> None:
        for name in names:
            inputs = {"logprob": -self.D, "ref_logprob": np.zeros(5)}
            result = OPS["kl_penalty"](inputs, {"kl_penalty": name})
            assert_close(result["out.kl"], values)
            assert_close(result["grad.sum_kl.logprob"], slopes)

    def test_verl_shape_and_refusals(self) -> None:
        inputs = {"logprob": np.zeros((2, 3)), "ref_logprob": np.ones((2, 3))}
        assert_close(OPS["kl_penalty"](inputs, {"kl_penalty": "k1"})["out.kl"], -np.ones((2, 3)))
        refused("kl_penalty", inputs, {"kl_penalty": "full"}, "no estimator full")

    def test_slime_bounds_one_name(self) -> None:
        inputs = {"log_probs": -self.D, "base": np.zeros(5)}
        bounded = OPS["slime_approx_kl"](inputs, {"kl_loss_type": "low_var_kl"})["out.kl"]
        assert_close(bounded, [0, 1 - math.log(2), 10, 10, 10])
        refused("slime_approx_kl", inputs, {"kl_loss_type": "k3"}, "bounded at 10")
        near = {"log_probs": -self.D[:2], "base": np.zeros(2)}
        assert_close(OPS["slime_approx_kl"](near, {"kl_loss_type": "k3"})["out.kl"], [0, 1 - math.log(2)])

    def test_slime_weights(self) -> None:
        inputs = {"log_probs": -self.D, "base": np.zeros(5), "importance_ratio": np.ones(5)}
        assert_close(OPS["slime_approx_kl"](inputs, {"kl_loss_type": "k2"})["out.kl"], self.D**2 / 2)
        ratio = np.array([1, 1, 1, 2, 0.5])
        weighted = OPS["slime_approx_kl"](inputs | {"importance_ratio": ratio}, {"kl_loss_type": "k2"})
        assert_close(weighted["out.kl"], ratio * self.D**2 / 2)
        refused("slime_approx_kl", inputs | {"importance_ratio": ratio}, {"kl_loss_type": "low_var_kl"}, "its weight")
        refused("slime_approx_kl", inputs | {"importance_ratio": 0 * ratio}, {"kl_loss_type": "k2"}, "no ratio")

    def test_score_function(self) -> None:
        logp = -self.D
        result = OPS["kl_score_function"]({"logprob": logp, "ref_logprob": logp + math.log(2)}, {"kl_type": "k3"})
        assert_close(result["out.kl"], np.full(5, 1 - math.log(2)))
        assert_close(result["grad.sum_kl.logprob"], np.full(5, -math.log(2)))
        for kind in ("k1", "k2", "k3"):
            inputs = {"logprob": logp, "ref_logprob": logp + 25}
            refused("kl_score_function", inputs, {"kl_type": kind}, "bounded at 10")


class TestSmoothedWeights:
    """With beta 1/2, over the tokens of the mask and from the first of each row, or over updates and from 1."""

    RAW = np.array([[2.0, 1.0, 9.0], [9.0, 3.0, 2.0], [0.5, 9.0, 9.0]])

    def test_over_tokens(self) -> None:
        result = OPS["ema_token_axis_init_first"]({"raw": self.RAW, "response_mask": MASK}, {"beta": 0.5})
        assert_close(result["out.smoothed"], [[2, 1.5, 9], [9, 3, 2.5], [0.5, 9, 9]])
        assert set(result) == {"out.smoothed"}

    def test_over_updates(self) -> None:
        inputs = {"raw_step1": self.RAW, "raw_step2": 2 * self.RAW, "response_mask": MASK}
        result = OPS["ema_step_axis"](inputs, {"beta": 0.5})
        assert_close(result["out.smoothed_step1"], self.RAW / 2 + 0.5)
        assert_close(result["out.smoothed_step2"], self.RAW * 5 / 4 + 0.25)

    def test_samples_do_not_share_a_state(self) -> None:
        inputs = {"raw": self.RAW, "response_mask": MASK, "uid": np.array(["g", "h", "i"])}
        result = OPS["ema_step_axis_shared_uid"](inputs, {"beta": 0.5})
        assert_close(result["out.smoothed"], self.RAW / 2 + 0.5)
        shared = inputs | {"uid": np.array(["g", "h", "g"])}
        refused("ema_step_axis_shared_uid", shared, {"beta": 0.5}, "a state of its own")

    def inputs(self) -> Arrays:
        """Smoothed over tokens the ratios are 2, 3/2; 3, 5/2; 1/2, over updates 3/2, 1; 2, 3/2; 3/4."""
        advantages = np.array([[-1.0], [1.0], [2.0]]) + np.where(MASK > 0, 0.0, np.nan)
        logp = np.where(MASK > 0, np.log(self.RAW), np.nan)
        return {"log_prob": logp, "old_log_prob": np.zeros_like(MASK), "advantages": advantages, "response_mask": MASK}

    PARAMS = MappingProxyType({"beta": 0.5, "cliprange": 0.2, "clip_ratio_c": 1.8})

    def assert_near(self, got: Any, expected: Any) -> None:
        """The reference's denominator is count + 1e-8."""
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)

    def test_loss_over_tokens(self) -> None:
        """2 is cut at 1.8; the slope of 3/2 is the first token's too; 3 and 5/2 are clipped; 1/2 is not, for A > 0."""
        result = OPS["ema_token_axis_policy_loss"](self.inputs(), dict(self.PARAMS))
        self.assert_near(result["out.loss"], (1.8 + 1.5 - 1.2 - 1.2 - 1) / 5)
        self.assert_near(result["out.clipfrac"], 2 / 5)
        self.assert_near(result["out.clipfrac_lower"], 1 / 5)
        self.assert_near(result["out.ppo_kl"], -math.log(6) / 5)
        slopes = [[0.5 * 2, 0.5 * 1, 0], [0, 0, 0], [-2 * 0.5, 0, 0]]
        self.assert_near(result["grad.loss.log_prob"], np.array(slopes) / 5)

    def test_loss_over_updates(self) -> None:
        result = OPS["ema_step_axis_policy_loss"](self.inputs(), dict(self.PARAMS))
        self.assert_near(result["out.loss"], (1.5 + 1 - 1.2 - 1.2 - 1.5) / 5)
        slopes = [[0.5 * 2, 0.5 * 1, 0], [0, 0, 0], [-2 * 0.5 * 0.5, 0, 0]]
        self.assert_near(result["grad.loss.log_prob"], np.array(slopes) / 5)

    def test_refuses_ratios_that_are_bounded(self) -> None:
        far = self.inputs() | {"old_log_prob": np.full_like(MASK, -21.0)}
        refused("ema_token_axis_policy_loss", far, dict(self.PARAMS), "bounded at 20")


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
