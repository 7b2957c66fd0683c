"""From scored groups to samples and figures."""

import math

import pytest
import torch

from megatron_rl.data.samples import from_example, weighed
from megatron_rl.rollout.sync import parity_gap
from megatron_rl.types import Prompt, Reward, Rollout, RolloutGroup


def rollout(sample: int, tokens: tuple[int, ...], finish: str = "stop") -> Rollout:
    return Rollout(
        prompt_index=0,
        sample_index=sample,
        token_ids=tokens,
        text="",
        log_probs=tuple(-0.5 * (i + 1) for i in range(len(tokens))),
        log_kept_mass=(-0.1,) * len(tokens),
        finish_reason=finish,  # type: ignore[arg-type]
        policy_version=3,
    )


PROMPT = Prompt(index=0, text="q", token_ids=(7, 8, 9))
GROUP = RolloutGroup(
    prompt=PROMPT,
    rollouts=(rollout(0, (1, 2)), rollout(1, (3,)), rollout(2, (4, 5, 6, 2), "length"), rollout(3, (2,))),
    rewards=(
        Reward(value=1.0, parts={"accuracy": 1.0, "format": 0.5}),
        Reward(value=0.2, parts={"accuracy": 0.0, "format": 1.0}),
        Reward(value=math.nan, reason="timeout"),
        Reward(value=0.6),
    ),
)
SILENT = RolloutGroup(prompt=PROMPT, rollouts=(rollout(0, (1,)),) * 2, rewards=(Reward(value=0.3),) * 2)


def test_samples_keep_tokens_and_drop_the_unjudged() -> None:
    from megatron_rl.config.schema import Advantage, AlgorithmConfig
    from megatron_rl.trainers.rollouts import to_samples
    from megatron_rl.trainers.shaping import reward_values, with_advantages

    groups = [GROUP, SILENT]
    algorithm = AlgorithmConfig(advantage=Advantage.grpo, normalize_by_std=True)
    samples, values = with_advantages(algorithm, groups, to_samples(groups), reward_values(groups), None)
    # 1.0, 0.2 and 0.6 have mean 0.6 and unbiased deviation 0.4.
    assert values.tolist() == pytest.approx([1, -1, 0, 0, 0, 0], abs=1e-5)
    assert [sample.id for sample in samples] == [0, 1, 2, 3, 4, 5]
    assert samples[0].token_ids.tolist() == [7, 8, 9, 1, 2]
    assert samples[0].fields["advantages"].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert [int(sample.loss_mask.sum()) for sample in samples] == [2, 1, 0, 1, 1, 1]
    weights = weighed(samples, "token-mean")
    assert sum(float(sample.fields["weights"].sum()) for sample in weights) == pytest.approx(1.0)
    assert not weights[2].fields["weights"].any()


def test_distance_to_the_reference_counts_loss_tokens_only() -> None:
    from megatron_rl.trainers.shaping import sample_kl

    sample = from_example(0, [5], [6, 7])
    near = sample.with_loss_field("old_log_probs", torch.tensor([-1.0, -2.0])).with_loss_field(
        "ref_log_probs", torch.tensor([-1.5, -1.0])
    )
    (k1,), (k2,), (k3,) = (sample_kl([near], name) for name in ("k1", "k2", "k3"))
    assert k1.tolist() == [0.5, -1.0] and k2.tolist() == [0.125, 0.5] and k1.dtype == torch.float64
    assert k3.tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.e - 2])
    assert [d.numel() for d in sample_kl([near.without_loss()], "k3")] == [0]


def test_fields_known_at_loss_tokens_only() -> None:
    sample = from_example(0, [5], [6, 7, 8])
    masked = sample.without_loss()
    assert masked.with_loss_field("old", torch.empty(0)).fields["old"].tolist() == [0, 0, 0]
    assert sample.with_loss_field("old", torch.tensor([1.0, 2.0, 3.0])).fields["old"].tolist() == [1, 2, 3]


def test_figures() -> None:
    from megatron_rl.trainers.rollout_metrics import rollout_metrics

    figures = rollout_metrics([GROUP, SILENT], torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0]))
    assert figures["critic/score/mean"] == pytest.approx((1.0 + 0.2 + 0.6 + 0.3 + 0.3) / 5)
    assert figures["reward/accuracy"] == 0.5 and figures["reward/format"] == 0.75
    assert figures["reward/failed"] == figures["reward/failed/timeout"] == 1
    assert figures["response_length/mean"] == pytest.approx((2 + 1 + 4 + 1 + 1 + 1) / 6)
    assert figures["response_length/clip_ratio"] == pytest.approx(1 / 6)
    assert figures["rollout/correct"] == pytest.approx(1 / 6)
    assert figures["perf/total_num_tokens"] == 10 + 6 * 3


def test_correct_is_full_marks_in_accuracy() -> None:
    from megatron_rl.trainers.evaluate import is_correct

    assert is_correct(Reward(value=1.0)) and not is_correct(Reward(value=0.9))
    assert is_correct(Reward(value=0.9, parts={"accuracy": 1.0})) and not is_correct(
        Reward(value=2.0, parts={"accuracy": 0})
    )
    assert not is_correct(Reward(value=math.nan, reason="timeout"))


def test_every_answer_is_in_one_of_three_classes() -> None:
    from megatron_rl.trainers.evaluate import answer_class, class_shares

    def parts(accuracy: float, form: float) -> Reward:
        return Reward(value=accuracy, parts={"accuracy": accuracy, "format": form})

    expected = {
        "correct": [parts(1, 1), Reward(value=1.0), Reward(value=0.2, parts={"accuracy": 1.0})],
        "format_only": [parts(0, 1), Reward(value=0.9), Reward(value=1.0, parts={"accuracy": 0.0})],
        "format_wrong": [parts(1, 0), parts(0, 0.5), Reward(value=math.nan, reason="timeout")],
    }
    for name, rewards in expected.items():
        assert [answer_class(reward) for reward in rewards] == [name] * 3
    shares = class_shares([parts(1, 1), parts(1, 0), parts(0, 0), Reward(value=0.0)])
    assert shares == {"correct": 0.25, "format_only": 0.25, "format_wrong": 0.5}


def test_pass_at_k_is_unbiased() -> None:
    """Against every choice of k out of n draws."""
    from itertools import combinations

    from megatron_rl.trainers.evaluate import pass_at_k

    for draws, correct in ((4, (0, 1, 4)), (5, (2, 3, 0))):
        for k in range(1, draws + 1):
            tries = [
                sum(any(i < c for i in chosen) for chosen in combinations(range(draws), k)) / math.comb(draws, k)
                for c in correct
            ]
            assert pass_at_k(correct, draws, k) == pytest.approx(sum(tries) / len(tries))


def test_parity_gap_counts_the_truncated_mass() -> None:
    trained = {0: torch.tensor([-0.6, -1.1]), 1: torch.tensor([-0.6 - 0.25])}
    largest, mean = parity_gap(GROUP.rollouts[:2], trained)
    assert largest == pytest.approx(0.25) and mean == pytest.approx(0.25 / 3)
    assert parity_gap([], {}) == (0.0, 0.0)


def test_every_comparison_reaches_the_tokens() -> None:
    """Rewards 1.0, 0.2, nan, 0.6 and twice 0.3; greedy answers 0.5 and 0.3; tokens 2, 1, (4), 1, 1, 1."""
    from megatron_rl.config.schema import Advantage, AlgorithmConfig
    from megatron_rl.trainers.rollouts import to_samples
    from megatron_rl.trainers.shaping import reward_values, with_advantages

    groups = [GROUP, SILENT]
    greedy = torch.tensor([0.5] * 4 + [0.3] * 2, dtype=torch.float64)

    def first_tokens(advantage: Advantage, **options: float) -> list[float]:
        algorithm = AlgorithmConfig(advantage=advantage, normalize_by_std=False, **options)  # type: ignore[arg-type]
        samples, _ = with_advantages(algorithm, groups, to_samples(groups), reward_values(groups), greedy)
        return [float(sample.fields["advantages"][0]) for sample in samples]

    assert first_tokens(Advantage.grpo) == pytest.approx([0.4, -0.4, 0, 0, 0, 0])
    assert first_tokens(Advantage.rloo) == pytest.approx([0.6, -0.6, 0, 0, 0, 0])
    # Lengths 2, 1 and 1 weigh the baseline: (2 + 0.2 + 0.6) / 4.
    assert first_tokens(Advantage.opo) == pytest.approx([0.3, -0.5, 0, -0.1, 0, 0])
    assert first_tokens(Advantage.remax) == pytest.approx([0.5, -0.3, 0, 0.1, 0, 0])
    assert first_tokens(Advantage.pass_at_k) == pytest.approx([0.4, 0, 0, 0, 0, 0])
    assert first_tokens(Advantage.gpg) == pytest.approx([0.4, -0.4, 0, 0, 0, 0])
    # Returns 1, 1, 0.2, 0.6, 0.3, 0.3 of six tokens, whitened; with a discount the first token's is half.
    returns = torch.tensor([1, 1, 0.2, 0.6, 0.3, 0.3], dtype=torch.float64)
    white = ((returns - returns.mean()) / returns.std()).tolist()
    assert first_tokens(Advantage.reinforce_plus_plus) == pytest.approx([white[0], white[2], 0, *white[3:]], abs=1e-6)
    returns[0] = 0.5
    white = ((returns - returns.mean()) / returns.std()).tolist()
    discounted = first_tokens(Advantage.reinforce_plus_plus, discount=0.5)
    assert discounted == pytest.approx([white[0], white[2], 0, *white[3:]], abs=1e-6)
    centred = torch.tensor([0.4, 0.4, -0.4, 0, 0, 0], dtype=torch.float64)
    white = ((centred - centred.mean()) / centred.std()).tolist()
    found = first_tokens(Advantage.reinforce_plus_plus_baseline)
    assert found == pytest.approx([white[0], white[2], 0, *white[3:]], abs=1e-6)
