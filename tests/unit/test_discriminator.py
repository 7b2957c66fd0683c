"""Scores of responses, and the loss of pairs of them: closed forms, invariances, slopes."""

import math

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.discriminator import (
    Adaptive,
    PairLoss,
    length_correlation,
    length_slope,
    pair_figures,
    pair_loss,
    ranking_loss,
    rewards,
    score_figures,
    temperature,
)
from megatron_rl.algorithms.pooling import counted
from megatron_rl.workers.critic import pooled

EOS, OTHER = 151645, 151643
TEACHER, STUDENT = torch.tensor([1.0, 2.5, 0.3, 4.0]).double(), torch.tensor([0.5, 3.0, 0.25, -1.0]).double()
LENGTHS = torch.tensor([3, 9, 4, 6]), torch.tensor([5, 7, 2, 12])


def score(values: list[float], token_ids: list[int], mode: str) -> float:
    return float(pooled([torch.tensor(values)], [counted(token_ids, mode, (EOS, OTHER))])[0])


def test_the_end_is_left_out_and_nothing_else() -> None:
    values = [3.0, 1.0, 5.0, 100.0]
    assert score(values, [7, 8, 9, EOS], "mean_no_eos") == pytest.approx(3.0)
    assert score(values, [7, 8, 9, OTHER], "mean_no_eos") == pytest.approx(3.0)
    assert score(values, [7, 8, 9, 10], "mean_no_eos") == score(values, [7, 8, 9, EOS], "mean") == 27.25
    # One that stands inside of the text, or before the last, is text.
    assert score(values, [7, EOS, 9, EOS], "mean_no_eos") == pytest.approx(3.0)
    assert score(values, [7, 8, EOS, EOS], "mean_no_eos") == pytest.approx(3.0)
    assert score(values, [7, 8, 9, EOS], "last_token") == 100.0


def test_a_response_without_a_countable_token_scores_zero() -> None:
    assert counted([EOS], "mean_no_eos", (EOS,)).tolist() == [False] and score([5.0], [EOS], "mean_no_eos") == 0
    assert score([5.0], [EOS], "mean") == score([5.0], [EOS], "last_token") == 5
    for mode in ("mean_no_eos", "mean", "last_token"):
        assert counted([], mode, (EOS,)).tolist() == [] and score([], [], mode) == 0
    assert pooled([], []).tolist() == []


def slopes(options: PairLoss) -> tuple[Tensor, Tensor]:
    teacher, student = TEACHER.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    pair_loss(teacher, student, *LENGTHS, options).loss.backward()
    assert teacher.grad is not None and student.grad is not None
    return teacher.grad, student.grad


@pytest.mark.parametrize(
    "options",
    [
        PairLoss(),
        PairLoss(temperature=10.0, label_smoothing=0.1),
        PairLoss(raw_weight=0.5, norm_weight=0.5),
        PairLoss(debias_length=True),
        PairLoss(batch_norm=True),
        PairLoss(raw_weight=0.7, norm_weight=0.3, debias_length=True, batch_norm=True, temperature=2.0),
        PairLoss(l2=0.01, range_penalty=0.1, range_low=0.0, range_high=2.0),
    ],
)
def test_slopes_are_finite_differences(options: PairLoss) -> None:
    found = slopes(options)
    for side, values in enumerate((TEACHER, STUDENT)):
        for place in range(len(values)):
            ends = []
            for shift in (1e-5, -1e-5):
                moved = [TEACHER.clone(), STUDENT.clone()]
                moved[side][place] += shift
                ends.append(pair_loss(*moved, *LENGTHS, options).loss)
            assert found[side][place].item() == pytest.approx(float(ends[0] - ends[1]) / 2e-5, abs=1e-8)


def test_ranking_loss_by_hand() -> None:
    diff = torch.tensor([2.0, -1.0]).double()
    expected = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(0.25))) / 2
    assert float(ranking_loss(diff, 4.0)) == pytest.approx(expected)
    other = (math.log1p(math.exp(0.5)) + math.log1p(math.exp(-0.25))) / 2
    assert float(ranking_loss(diff, 4.0, 0.2)) == pytest.approx(0.8 * expected + 0.2 * other)
    plain = pair_loss(TEACHER, STUDENT, *LENGTHS, PairLoss())
    assert float(plain.loss) == pytest.approx(float(ranking_loss(TEACHER - STUDENT, 1.0)))
    penalised = pair_loss(TEACHER, STUDENT, *LENGTHS, PairLoss(l2=0.1, range_penalty=0.01, range_high=2.0))
    squares = (TEACHER.square() + STUDENT.square()).mean()
    outside = (0.5**2 + 2.0**2 + 1.0**2 + 1.0**2) / 4
    assert float(penalised.loss - plain.loss) == pytest.approx(float(0.1 * squares + 0.01 * outside))
    assert float(penalised.ranking_loss) == pytest.approx(float(plain.loss))


def test_the_temperature_scales_and_does_not_sort() -> None:
    cold, warm = (pair_loss(TEACHER, STUDENT, *LENGTHS, PairLoss(temperature=t)) for t in (1.0, 10.0))
    assert torch.equal(cold.diff, warm.diff) and float(cold.loss) != float(warm.loss)
    adaptive = Adaptive(offset=0.3, slope=0.7, low=0.3, high=2.0)
    assert temperature(torch.tensor([1.0, -2.0]), adaptive) == pytest.approx(0.3 + 0.7 * 1.5)
    assert temperature(torch.tensor([100.0]), adaptive) == 2.0 and temperature(torch.zeros(2), adaptive) == 0.3


def test_a_score_that_is_length_tells_nothing_apart() -> None:
    """Teachers write more here. What is left of a score is what it says beside the length."""
    teacher_lengths, student_lengths = torch.tensor([30, 50, 41]), torch.tensor([12, 8, 25])
    both = teacher_lengths, student_lengths
    own = torch.tensor([0.3, -0.2, 0.1]).double()
    options = PairLoss(debias_length=True)
    of_length = pair_loss(
        0.5 * teacher_lengths + 1.0, 0.5 * student_lengths + 1.0, teacher_lengths, student_lengths, options
    )
    assert of_length.diff.abs().max() < 1e-12
    plain = pair_loss(own, -own, teacher_lengths, student_lengths, options).diff
    loaded = pair_loss(
        own + 0.5 * teacher_lengths, 0.5 * student_lengths - own, teacher_lengths, student_lengths, options
    )
    torch.testing.assert_close(loaded.diff, plain)
    # The two sides' own means do not count for the slope: a side apart is no effect of length.
    sides = torch.tensor([0, 0, 0, 1, 1, 1])
    lengths = torch.cat(both)
    assert float(length_slope(torch.tensor([5.0, 5.0, 5.0, 0.0, 0.0, 0.0]).double(), lengths, sides)) == 0.0
    assert float(length_slope(own.repeat(2), torch.full((6,), 4), sides)) == 0.0


def test_debiased_rewards_do_not_correlate_with_length() -> None:
    scores, lengths = STUDENT + 0.4 * LENGTHS[1], LENGTHS[1]
    assert abs(length_correlation(rewards(scores, lengths, PairLoss()), lengths)) > 0.5
    assert abs(length_correlation(rewards(scores, lengths, PairLoss(debias_length=True)), lengths)) < 1e-12
    assert torch.equal(rewards(scores, lengths, PairLoss()), scores)
    mixed = rewards(scores, lengths, PairLoss(raw_weight=0.5, norm_weight=0.5))
    torch.testing.assert_close(mixed, 0.5 * scores + 0.5 * scores / lengths)


def test_figures_by_hand() -> None:
    diff = torch.tensor([1.0, 0.0, -0.05, 3.0]).double()
    figures = pair_figures(diff, 2 * diff)
    assert (
        figures["d_acc"] == 0.5
        and figures["hard_sample_ratio"] == 0.5
        and figures["score_diff"] == pytest.approx(0.9875)
    )
    assert figures["raw_score_diff"] == pytest.approx(1.975)
    expected = (1 / (1 + math.exp(-2)) + 0.5 + 1 / (1 + math.exp(0.1)) + 1 / (1 + math.exp(-6))) / 4
    assert figures["d_acc_soft"] == pytest.approx(expected)
    assert score_figures("teacher", torch.tensor([1.0, 3.0])) == {
        "teacher_value_mean": 2.0,
        "teacher_value_std": pytest.approx(math.sqrt(2)),
        "teacher_value_min": 1.0,
        "teacher_value_max": 3.0,
    }
    assert score_figures("student", torch.tensor([1.0]))["student_value_std"] == 0.0
    assert length_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([6, 4, 2])) == pytest.approx(-1.0)
    assert length_correlation(torch.ones(3), torch.tensor([6, 4, 2])) == 0.0
