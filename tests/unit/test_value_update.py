"""From rewards of outcomes to what each token is compared with, by hand."""

import math

import pytest
import torch

from megatron_rl.config.critic import PpoOptions
from megatron_rl.config.schema import KLPlace, PpoConfig
from megatron_rl.data.samples import Sample, from_example
from megatron_rl.trainers.shaping import token_rewards
from megatron_rl.trainers.value_update import with_estimates
from megatron_rl.types import Prompt, Reward, RolloutGroup

VALUES = {0: torch.tensor([0.5, 0.25]), 1: torch.empty(0), 2: torch.tensor([0.0])}


def samples() -> list[Sample]:
    """Two tokens that bear loss with one between them that does not; none, for it was not judged; one."""
    first = from_example(0, [5], [6, 7, 8])
    first.loss_mask[1] = False
    return [first, from_example(1, [5], [6, 7]).without_loss(), from_example(2, [5, 6], [7])]


def groups() -> list[RolloutGroup]:
    rewards = (Reward(value=1.0), Reward(value=math.nan, reason="timeout"), Reward(value=0.5))
    return [RolloutGroup(prompt=Prompt(index=0, text="", token_ids=(5,), row={}), rollouts=(), rewards=rewards)]


def test_rewards_of_tokens() -> None:
    """The outcome's at the last token that bears loss; with a reference, each token loses its own distance."""
    config = PpoConfig()
    config.algorithm.overlong_buffer = 0
    assert token_rewards(config, groups(), samples())[0].tolist() == [0.0, 1.0, 0.5]
    config.kl.where, config.kl.coeff = KLPlace.reward, 2.0
    apart = [
        s.with_field("old_log_probs", torch.tensor([-1.0, -9.0, -2.0])[: s.response_length]).with_field(
            "ref_log_probs", torch.tensor([-1.5, -1.0, -2.0])[: s.response_length]
        )
        for s in samples()
    ]
    rewards, figures = token_rewards(config, groups(), apart)
    k3 = math.exp(-0.5) - 1 + 0.5
    assert rewards.tolist() == pytest.approx([-2 * k3, 1.0, 0.5 - 2 * k3])
    assert figures["actor/reward_kl_penalty"] == pytest.approx((k3 / 2 + k3) / 2)


def test_estimates_by_hand() -> None:
    """gamma 1/2 and lam 1/2: the errors are 1/2 0.25 - 0.5 = -3/8, 1 - 0.25 = 3/4, and 0.5."""
    rewards = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    options = PpoOptions(gamma=0.5, lam=0.5, whiten=False)
    estimated, advantages, figures = with_estimates(options, samples(), rewards, VALUES)
    assert advantages.tolist() == pytest.approx([-3 / 8 + 3 / 16, 3 / 4, 1 / 2])
    # Only at tokens that bear loss.
    assert estimated[0].fields["advantages"].tolist() == pytest.approx([-3 / 16, 0, 3 / 4])
    assert estimated[0].fields["returns"].tolist() == pytest.approx([5 / 16, 0, 1])
    assert estimated[0].fields["old_values"].tolist() == [0.5, 0, 0.25]
    assert not estimated[1].fields["returns"].any() and estimated[2].fields["returns"].tolist() == [0.5]
    assert figures["critic/returns/max"] == 1 and figures["critic/values/mean"] == pytest.approx(0.25)
    # var(R - V) = var(-3/16, 3/4, 1/2), var(R) = var(5/16, 1, 1/2).
    rest, whole = (torch.tensor(v).var() for v in ([-3 / 16, 3 / 4, 1 / 2], [5 / 16, 1.0, 1 / 2]))
    assert figures["critic/vf_explained_var"] == pytest.approx(float(1 - rest / whole), abs=1e-3)


def test_whitened_over_the_whole_batch() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    plain = with_estimates(PpoOptions(whiten=False), samples(), rewards, VALUES)[1]
    estimated, advantages, _ = with_estimates(PpoOptions(), samples(), rewards, VALUES)
    assert advantages.tolist() == pytest.approx(((plain - plain.mean()) / plain.std()).tolist(), abs=1e-6)
    # What a value is to become is not whitened.
    assert estimated[0].fields["returns"].tolist() == [1.0, 0.0, 1.0]


def test_a_batch_without_any_judged_answer() -> None:
    none = [sample.without_loss() for sample in samples()]
    empty = {sample.id: torch.empty(0) for sample in none}
    estimated, advantages, figures = with_estimates(PpoOptions(), none, torch.zeros(0, dtype=torch.float64), empty)
    assert advantages.numel() == 0 and figures == {"critic/vf_explained_var": 0.0}
    assert not any(sample.fields["advantages"].any() for sample in estimated)
