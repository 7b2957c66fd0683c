"""Keyed draws: the right distribution, and numbers that depend on their key alone."""

import numpy as np
import pytest
import torch

from megatron_rl.rollout.sampling import draw, sampling_log_probs, uniforms

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.5]])


def test_uniforms_depend_on_the_key_alone() -> None:
    first = uniforms(7, (0, 3, 11, 2), 6)
    assert np.array_equal(first, uniforms(7, (0, 3, 11, 2), 6))
    # A longer response starts with the same numbers.
    assert np.array_equal(first, uniforms(7, (0, 3, 11, 2), 50)[:6])
    for other in ((8, (0, 3, 11, 2)), (7, (1, 3, 11, 2)), (7, (0, 4, 11, 2)), (7, (0, 3, 2, 11))):
        assert not np.intersect1d(first, uniforms(*other, 6)).size
    many = uniforms(1, (0,), 20000)
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.01


def test_temperature_is_a_softmax() -> None:
    log_probs, kept = sampling_log_probs(LOGITS, temperature=0.5, top_k=0, top_p=1.0)
    torch.testing.assert_close(log_probs, torch.log_softmax(LOGITS / 0.5, -1))
    assert kept.tolist() == [0.0]


def test_top_k_and_top_p_renormalise_and_say_what_they_kept() -> None:
    p = torch.softmax(LOGITS, -1)[0]
    log_probs, kept = sampling_log_probs(LOGITS, temperature=1.0, top_k=2, top_p=1.0)
    assert torch.isneginf(log_probs[0, 2:]).all()
    torch.testing.assert_close(kept.exp()[0], p[:2].sum())
    torch.testing.assert_close(log_probs[0, :2] + kept, p[:2].log())
    # 0.53 and 0.19: the second is needed to reach 0.6, the third is not.
    log_probs, kept = sampling_log_probs(LOGITS, temperature=1.0, top_k=0, top_p=0.6)
    assert (~torch.isneginf(log_probs[0])).tolist() == [True, True, False, False, False]
    log_probs, _ = sampling_log_probs(LOGITS, temperature=1.0, top_k=0, top_p=1e-9)
    assert log_probs[0, 0] == 0


def test_top_k_then_top_p() -> None:
    # Of the two largest, the first alone has 0.73 of their mass.
    log_probs, kept = sampling_log_probs(LOGITS, temperature=1.0, top_k=2, top_p=0.7)
    assert (~torch.isneginf(log_probs[0])).sum() == 1
    torch.testing.assert_close(kept.exp()[0], torch.softmax(LOGITS, -1)[0, 0])


def test_greedy_is_certain_and_keeps_the_largest() -> None:
    log_probs, kept = sampling_log_probs(LOGITS, temperature=0.0, top_k=3, top_p=0.9)
    assert log_probs[0].tolist() == [0.0] + [-torch.inf] * 4
    torch.testing.assert_close(kept, torch.log_softmax(LOGITS, -1)[:, 0])


def test_draw_inverts_the_distribution() -> None:
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    for uniform, token in ((0.0, 0), (0.199, 0), (0.2001, 2), (0.6999, 2), (0.7001, 3), (1 - 2**-53, 3)):
        assert draw(p.log(), torch.tensor([uniform], dtype=torch.float64)).item() == token
    grid = torch.from_numpy(uniforms(3, (1,), 40000))
    tokens = draw(p.log().expand(len(grid), -1), grid)
    frequency = torch.bincount(tokens, minlength=4) / len(grid)
    assert frequency.tolist() == pytest.approx(p[0].tolist(), abs=0.01)
    assert frequency[1] == 0
