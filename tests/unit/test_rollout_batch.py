"""What becomes of a rollout batch before the update: refilled, cut, corrected."""

import math
from collections.abc import Sequence

import pytest
import torch

from megatron_rl.data.samples import from_example
from megatron_rl.types import Prompt, Reward, Rollout, RolloutGroup


def group(name: int, *rewards: float, finish: str = "stop") -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            prompt_index=name,
            sample_index=i,
            token_ids=(5, 6),
            text="",
            log_probs=(-1.0, -2.0),
            log_kept_mass=(-0.5, 0.0),
            finish_reason=finish,  # type: ignore[arg-type]
            policy_version=0,
        )
        for i in range(len(rewards))
    )
    judged = tuple(Reward(value=r, reason="timeout" if math.isnan(r) else None) for r in rewards)
    return RolloutGroup(prompt=Prompt(index=name, text="", token_ids=(1,)), rollouts=rollouts, rewards=judged)


def names(groups: Sequence[RolloutGroup]) -> list[int]:
    return [g.prompt.index for g in groups]


BATCHES = [
    [group(0, 1, 1), group(1, 0, 1), group(2, 0, 0)],
    [group(3, 0, 1), group(4, 1, math.nan), group(5, 1, 0)],
    [group(6, 0, 1)] * 3,
]


@pytest.mark.parametrize(
    ("size", "most", "kept", "calls"),
    [
        (3, 1, [0, 1, 2], 1),  # off: the batch is what was drawn
        (3, 9, [1, 3, 5], 2),  # refilled from the second, and not asked a third time
        (2, 9, [1, 3], 2),  # the surplus is dropped
        (5, 2, [1, 3, 5, 0, 2], 2),  # bounded: silent groups fill up
        (1, 9, [1], 1),
    ],
)
def test_groups_that_teach_nothing_are_replaced(size: int, most: int, kept: list[int], calls: int) -> None:
    from megatron_rl.trainers.rollouts import refill

    groups, found = refill(lambda number: BATCHES[number], size, most)
    assert (names(groups), found) == (kept, calls)


def test_truncated_responses_bear_no_loss_where_they_are_dropped() -> None:
    from megatron_rl.trainers.rollouts import to_samples

    groups = [group(0, 1, 0), group(1, 1, 0, finish="length")]
    assert [int(s.loss_mask.sum()) for s in to_samples(groups)] == [2, 2, 2, 2]
    assert [int(s.loss_mask.sum()) for s in to_samples(groups, drop_truncated=True)] == [2, 2, 0, 0]


def test_correction_weighs_and_rejects_tokens() -> None:
    """The engine's log-probabilities count with the mass that was kept; a rejected token leaves the loss mask."""
    from megatron_rl.config.schema import CorrectionLevel, RolloutCorrectionConfig
    from megatron_rl.trainers.correction import correct, with_rollout_log_probs

    sample = from_example(0, [1], [5, 6])
    samples = with_rollout_log_probs([sample, sample.without_loss()], [group(0, 1, 0)])
    assert samples[0].fields["rollout_log_probs"].tolist() == [-1.5, -2.0]
    samples = [s.with_field("old_log_probs", torch.tensor([-1.4, -0.5])) for s in samples]
    config = RolloutCorrectionConfig(level=CorrectionLevel.token, high=2.0)
    (weighed, empty), figures = correct(samples, config)
    assert weighed.fields["rollout_weights"].tolist() == pytest.approx([math.exp(0.1), 2.0])
    assert empty.fields["rollout_weights"].tolist() == [0, 0] and not empty.loss_mask.any()
    assert figures["rollout_corr/rollout_is_mean"] == pytest.approx((math.exp(0.1) + 2) / 2)
    assert figures["rollout_corr/kl"] == pytest.approx(-0.8)
    (cut, _), figures = correct(samples, RolloutCorrectionConfig(reject={"token_k2": 0.5}))
    assert cut.loss_mask.tolist() == [True, False] and figures["rollout_corr/rollout_rs_masked_fraction"] == 0.5
    assert cut.fields["rollout_weights"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("reject", "message"),
    [
        ({"k3": 1}, "has 'k3'; write a level"),
        ({"seq_max_k1": 2}, "seq_max_k1 is none"),
        ({"token_k3": -1}, r"token_k3=-1 must be a number above 0"),
        ({"token_k3": [0.5, 2]}, r"or for k1 \[low, high\] ratios"),
        ({"token_k1": [3, 2]}, r"token_k1=\[3, 2\]"),
    ],
)
def test_criteria_that_cannot_be_are_named(reject: dict, message: str) -> None:
    from megatron_rl.trainers.correction import read_criteria

    with pytest.raises(ValueError, match=message):
        read_criteria(reject)


def test_criteria_are_read() -> None:
    from megatron_rl.algorithms.rollout_correction import Criterion
    from megatron_rl.trainers.correction import read_criteria

    assert read_criteria({"seq_mean_k3": 0.1, "token_k1": [0.5, 2]}) == [
        Criterion("seq_mean", "k3", 0.1),
        Criterion("token", "k1", 2.0, 0.5),
    ]
