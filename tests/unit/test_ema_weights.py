"""Smoothed importance weights: their gradients, their state over updates, their figures, and theory."""

import copy
import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.ema_weights import (
    Gradient,
    Init,
    StepAverages,
    raw_metrics,
    smoothing_metrics,
    variance_ratio,
    with_gradient,
)
from megatron_rl.ops.scan import exponential_average

GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)
INITS: tuple[Init, ...] = get_args(Init)
LENGTHS = [1, 6, 4, 9]
IDS = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
N = len(IDS)


def random(n: int, seed: int, scale: float = 0.4) -> Tensor:
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(got: Tensor, expected: object) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=1e-12, atol=1e-12)


def slopes(logp: Tensor, outer: Tensor, beta: float, gradient: Gradient, init: Init) -> tuple[Tensor, Tensor]:
    """Smoothed weights of exp(logp), and the gradient of sum(outer * w') with respect to logp."""
    leaf = logp.clone().requires_grad_()
    weights = leaf.exp()
    smoothed = exponential_average(weights, IDS, beta=beta, init=init)
    result = with_gradient(weights, smoothed, beta=beta, gradient=gradient)
    (grad,) = torch.autograd.grad(result, leaf, outer)
    return result.detach(), grad


class TestGradient:
    @pytest.mark.parametrize("init", INITS)
    def test_closed_forms(self, init: Init) -> None:
        logp, outer, beta = random(N, 0), random(N, 1), 0.3
        weights = logp.exp()
        smoothed = exponential_average(weights, IDS, beta=beta, init=init)
        # dw'_t / dw_j as a dense matrix: beta (1 - beta)^(t - j) within a sequence, 1 in place of beta at the start.
        place = torch.cat([torch.arange(n) for n in LENGTHS])
        distance = (place[:, None] - place).double()
        dense = (1 - beta) ** distance * beta * ((IDS[:, None] == IDS) & (distance >= 0))
        if init == "first":
            dense[:, place == 0] /= beta
        expected = {
            "full": dense.T @ outer * weights,
            "current": outer * beta * weights,
            "straight_through": outer * smoothed,
        }
        for gradient in GRADIENTS:
            values, grad = slopes(logp, outer, beta, gradient, init)
            assert torch.equal(values, smoothed)
            assert_close(grad, expected[gradient])

    @pytest.mark.parametrize("init", INITS)
    def test_on_the_policy_the_gradient_is_scaled(self, init: Init) -> None:
        beta = 0.9
        from_the_end = torch.cat([torch.arange(n, 0, -1) for n in LENGTHS])
        is_first = torch.cat([torch.arange(n) for n in LENGTHS]) == 0
        full = 1 - (1 - beta) ** from_the_end.double()
        if init == "first":
            full[is_first] /= beta
            for part in full.split(LENGTHS):
                assert_close(part.mean(), 1.0)
        scales = {"full": full, "current": full * 0 + beta, "straight_through": torch.ones(N)}
        for gradient in GRADIENTS:
            values, grad = slopes(torch.zeros(N, dtype=torch.float64), torch.ones(N).double(), beta, gradient, init)
            assert_close(values, torch.ones(N))
            assert_close(grad, scales[gradient])
        assert_close(full[0], beta if init == "one" else 1.0)
        assert_close(full[-1], beta)

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_beta_one_changes_no_bit(self, gradient: Gradient) -> None:
        logp, outer = random(N, 0).float(), random(N, 1).float()
        values, grad = slopes(logp, outer, 1.0, gradient, "one")
        assert torch.equal(values, logp.exp())
        assert torch.equal(grad, outer * logp.exp())

    def test_no_gradient_reaches_the_history(self) -> None:
        for gradient in ("current", "straight_through"):
            outer = torch.zeros(N, dtype=torch.float64)
            outer[-1] = 1
            grad = slopes(random(N, 0), outer, 0.5, gradient, "one")[1]
            assert grad.nonzero().flatten().tolist() == [N - 1]


class TestSteps:
    WEIGHTS = (torch.tensor([2.0, 4.0, 0.5]), torch.tensor([1.0, 2.0, 1.5]), torch.tensor([4.0, 1.0, 1.0]))
    SEQUENCES = torch.tensor([0, 0, 1])

    def visits(self, averages: StepAverages, count: int = 3) -> list[list[float]]:
        weights = enumerate(self.WEIGHTS[:count])
        return [averages.update((7, 3), w, self.SEQUENCES, visit=visit).tolist() for visit, w in weights]

    def test_by_hand(self) -> None:
        one = self.visits(StepAverages(beta=0.5))
        assert one == [[1.5, 2.5, 0.75], [1.25, 2.25, 1.125], [2.625, 1.625, 1.0625]]
        first = self.visits(StepAverages(beta=0.5, init="first"))
        assert first == [[2, 4, 0.5], [1.5, 3, 1], [2.75, 2, 1]]

    @pytest.mark.parametrize("init", INITS)
    def test_is_the_recurrence_over_tokens_turned(self, init: Init) -> None:
        """One token over 40 updates is one sequence of 40 tokens."""
        weights = random(40, 2).exp()
        averages = StepAverages(beta=0.3, init=init)
        zero = torch.zeros(1, dtype=torch.int64)
        got = torch.cat([averages.update((0,), w[None], zero, visit=i) for i, w in enumerate(weights)])
        assert_close(got, exponential_average(weights, torch.zeros(40, dtype=torch.int64), beta=0.3, init=init))

    def test_beta_one_changes_no_bit(self) -> None:
        averages = StepAverages(beta=1.0)
        for visit in range(3):
            weights = random(N, visit).exp().float()
            assert torch.equal(averages.update(range(4), weights, IDS, visit=visit), weights)

    def test_micro_batches_and_their_order_do_not_matter(self) -> None:
        whole, parts = StepAverages(beta=0.7), StepAverages(beta=0.7)
        for visit in range(3):
            weights = random(N, visit).exp()
            together = whole.update((5, 6, 7, 8), weights, IDS, visit=visit).split(LENGTHS)
            by_sample = weights.split(LENGTHS)
            for place in ((2, 0, 3, 1), (3, 2, 1, 0), (0, 1, 2, 3))[visit]:
                ids = torch.zeros(LENGTHS[place], dtype=torch.int64)
                alone = parts.update((5 + place,), by_sample[place], ids, visit=visit)
                assert torch.equal(alone, together[place])

    @pytest.mark.parametrize("gradient", ["full", "current"])
    def test_history_is_constant(self, gradient: Gradient) -> None:
        averages, leaf = StepAverages(beta=0.25), torch.tensor([0.5, 0.5, 2.0], requires_grad=True)
        for visit in range(2):
            smoothed = averages.update((7, 3), leaf, self.SEQUENCES, visit=visit)
            result = with_gradient(leaf, smoothed, beta=0.25, gradient=gradient)
            assert torch.autograd.grad(result.sum(), leaf)[0].tolist() == [0.25] * 3

    def test_state_is_float32_and_a_copy(self) -> None:
        averages = StepAverages(beta=0.5, init="first")
        weights = torch.tensor([2.0, 4.0, 0.5], requires_grad=True)
        averages.update((7, 3), weights, self.SEQUENCES, visit=0)
        kept = averages.state_dict()["averages"]
        assert {i: x.tolist() for i, x in kept.items()} == {7: [2, 4], 3: [0.5]}
        assert all(x.dtype == torch.float32 and not x.requires_grad for x in kept.values())
        with torch.no_grad():
            weights.zero_()
        assert kept[7].tolist() == [2, 4]

    def test_a_sample_that_is_not_known_is_refused(self) -> None:
        averages = StepAverages(beta=0.5)
        self.visits(averages, 1)
        with pytest.raises(ValueError, match=r"sample 4 is visited for the 2\. time, .* know of 0"):
            averages.update((7, 4), self.WEIGHTS[1], self.SEQUENCES, visit=1)
        # The refused visit has left no trace.
        averages.update((7, 3), self.WEIGHTS[1], self.SEQUENCES, visit=1)
        with pytest.raises(ValueError, match=r"sample 7 is visited for the 1\. time, .* know of 2"):
            averages.update((7,), torch.ones(2), torch.zeros(2, dtype=torch.int64), visit=0)
        with pytest.raises(ValueError, match="sample 7 has 3 tokens, and had 2"):
            averages.update((7,), torch.ones(3), torch.zeros(3, dtype=torch.int64), visit=2)
        with pytest.raises(AssertionError, match="twice at once"):
            averages.update((7, 7), torch.ones(2), torch.arange(2), visit=2)

    def test_clear(self) -> None:
        averages = StepAverages(beta=0.5)
        once = self.visits(averages)
        assert len(averages) == 2
        averages.clear()
        assert len(averages) == 0
        assert self.visits(averages) == once

    def test_state_goes_through_a_checkpoint(self) -> None:
        straight, before, after = (StepAverages(beta=0.5) for _ in range(3))
        expected = self.visits(straight)[-1]
        self.visits(before, 2)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        assert after.update((7, 3), self.WEIGHTS[2], self.SEQUENCES, visit=2).tolist() == expected

    def test_samples_without_tokens(self) -> None:
        averages = StepAverages(beta=0.5)
        for visit in range(2):
            result = averages.update((1, 2, 3), torch.full((2,), 2.0), torch.ones(2, dtype=torch.int64), visit=visit)
            assert result.tolist() == [[1.5] * 2, [1.75] * 2][visit]
        assert averages.update((), torch.zeros(0), torch.zeros(0, dtype=torch.int64), visit=0).shape == (0,)


def by_numpy(w: np.ndarray, s: np.ndarray, ids: np.ndarray, beta: float) -> dict[str, float]:
    """The definitions, as they are written down, over a list of sequences."""
    e, diff = 1e-8, np.abs(w - s)
    rows = [(w[ids == i], s[ids == i]) for i in np.unique(ids)]
    varied = [(a.var(ddof=1), b.var(ddof=1)) for a, b in rows if len(a) >= 2 and a.var(ddof=1) > 1e-8]
    w05, w95, s05, s95 = (float(np.quantile(x, q)) for x in (w, s) for q in (0.05, 0.95))
    figures = {
        "use_ema": 1.0,
        "beta": beta,
        "variance_reduction_ratio": w.var(ddof=1) / (s.var(ddof=1) + e),
        "variance_reduction_absolute": w.var(ddof=1) - s.var(ddof=1),
        "smoothing_strength": 1 - s.var(ddof=1) / (w.var(ddof=1) + e),
        "weights_diff_l2": np.sqrt((diff**2).sum()),
        "weights_diff_l1": diff.sum(),
        "weights_diff_max": diff.max(),
        "weights_diff_rms": np.sqrt((diff**2).mean()),
        "weights_diff_mae": diff.mean(),
        "relative_change_mean": (diff / (np.abs(w) + e)).mean(),
        "relative_change_max": (diff / (np.abs(w) + e)).max(),
        "raw_weights_p05": w05,
        "raw_weights_p95": w95,
        "smoothed_weights_p05": s05,
        "smoothed_weights_p95": s95,
        "range_reduction": ((w95 - w05) - (s95 - s05)) / ((w95 - w05) + e),
        "active_sequences": len(rows),
        "avg_variance_reduction": np.mean([(a - b) / a for a, b in varied]),
        "avg_smoothing_effect": np.mean([np.linalg.norm(a - b) for a, b in rows]),
    }
    for name, x in (("raw", w), ("smoothed", s)):
        figures |= {f"{name}_weights_mean": x.mean(), f"{name}_weights_std": x.std(ddof=1)}
        figures[f"{name}_weights_variance"] = x.var(ddof=1)
    return {f"ema/{name}": float(value) for name, value in figures.items()}


class TestFigures:
    @pytest.mark.parametrize("beta", [0.1, 0.9])
    def test_by_numpy(self, beta: float) -> None:
        weights = random(N, 3).exp()
        weights[IDS == 2] = 1.25
        smoothed = exponential_average(weights, IDS, beta=beta)
        got = smoothing_metrics(weights, smoothed, IDS, beta=beta)
        expected = by_numpy(weights.numpy(), smoothed.numpy(), IDS.numpy(), beta)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-12, abs=1e-14), name

    def test_by_hand(self) -> None:
        weights, smoothed = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1.0, 2.0, 1.5])
        got = smoothing_metrics(weights, smoothed, torch.tensor([0, 0, 5]), beta=0.5)
        assert got["ema/raw_weights_variance"] == 1 and got["ema/smoothed_weights_variance"] == 0.25
        assert got["ema/variance_reduction_ratio"] == pytest.approx(4, rel=1e-7)
        assert got["ema/smoothing_strength"] == pytest.approx(0.75, rel=1e-7)
        assert got["ema/weights_diff_l1"] == 1.5 and got["ema/weights_diff_mae"] == 0.5
        assert got["ema/weights_diff_l2"] == pytest.approx(math.sqrt(1.25), rel=1e-15)
        assert got["ema/raw_weights_p95"] == pytest.approx(2.9, rel=1e-15)
        assert got["ema/active_sequences"] == 2
        assert got["ema/avg_variance_reduction"] == 0.75
        assert got["ema/avg_smoothing_effect"] == 0.75

    def test_neither_order_nor_names_of_sequences_matter(self) -> None:
        weights = random(N, 4).exp().float()
        smoothed = exponential_average(weights, IDS, beta=0.5)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        got = smoothing_metrics(weights[order], smoothed[order], 1000 - 7 * IDS[order], beta=0.5)
        assert got == pytest.approx(smoothing_metrics(weights, smoothed, IDS, beta=0.5), rel=1e-12)

    def test_the_vanishing_variance_of_large_weights_is_seen(self) -> None:
        """In float32, or as a difference of squares, it would be lost."""
        weights = torch.tensor([1e6, 1e6 + 0.0625]).repeat(50)
        got = smoothing_metrics(weights, weights, torch.arange(2).repeat_interleave(50), beta=1.0)
        assert got["ema/raw_weights_variance"] == pytest.approx(0.03125**2 * 100 / 99, rel=1e-9)
        assert got["ema/avg_variance_reduction"] == 0

    @pytest.mark.parametrize(("variance", "counts"), [(1.1e-8, True), (0.9e-8, False)])
    def test_a_sequence_that_hardly_varies_has_no_variance_to_reduce(self, variance: float, counts: bool) -> None:
        """Of two weights the variance is half the square of their difference."""
        weights = torch.tensor([1.0, 1.0 + math.sqrt(2 * variance)], dtype=torch.float64)
        got = smoothing_metrics(weights, torch.ones(2), torch.zeros(2, dtype=torch.int64), beta=0.5)
        assert got.get("ema/avg_variance_reduction") == (1 if counts else None)

    def test_states_of_the_step_axis(self) -> None:
        got = smoothing_metrics(torch.ones(2), torch.ones(2), torch.zeros(2, dtype=torch.int64), beta=0.5, states=12)
        assert got["ema/active_sequences"] == 12

    def test_one_token_and_none(self) -> None:
        one, ids = torch.full((1,), 2.0), torch.zeros(1, dtype=torch.int64)
        got = smoothing_metrics(one, one * 0.75, ids, beta=0.5)
        assert got["ema/raw_weights_std"] == got["ema/variance_reduction_ratio"] == 0
        assert got["ema/avg_smoothing_effect"] == got["ema/weights_diff_max"] == 0.5
        assert "ema/avg_variance_reduction" not in got
        none = smoothing_metrics(one[:0], one[:0], ids[:0], beta=0.5)
        assert none == {"ema/use_ema": 1, "ema/beta": 0.5, "ema/active_sequences": 0}

    def test_off(self) -> None:
        got = raw_metrics(torch.tensor([1.0, 3.0]))
        raw = {"mean": 2.0, "std": math.sqrt(2), "variance": 2.0}
        assert got == {"ema/use_ema": 0.0} | {f"ema/raw_weights_{name}": value for name, value in raw.items()}
        assert raw_metrics(torch.zeros(0)) == {"ema/use_ema": 0.0}


class TestTheory:
    @pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 1.0])
    def test_independent_weights(self, beta: float) -> None:
        """Within 3% over 2^18 tokens: the relative error of a variance is about sqrt(2 ratio / 2^18), or 1.2%."""
        weights = random(2**18, 5).exp()
        ids = torch.arange(2**4).repeat_interleave(2**14)
        smoothed = exponential_average(weights, ids, beta=beta)
        got = smoothing_metrics(weights, smoothed, ids, beta=beta)["ema/variance_reduction_ratio"]
        assert variance_ratio(beta) == pytest.approx((2 - beta) / beta, rel=1e-15)
        assert got == pytest.approx((2 - beta) / beta, rel=0.03)

    def test_near_the_start(self) -> None:
        """20000 sequences of 4 tokens with beta 0.3; within 5%, where far from the start it is 5.7."""
        weights = random(80_000, 6).exp().reshape(-1, 4)
        ids = torch.arange(20_000).repeat_interleave(4)
        smoothed = exponential_average(weights.reshape(-1), ids, beta=0.3).reshape(-1, 4)
        ratios = weights.var(0) / smoothed.var(0)
        expected = [variance_ratio(0.3, tokens) for tokens in (1, 2, 3, 4)]
        assert expected[0] == pytest.approx(1 / 0.3**2, rel=1e-12)
        torch.testing.assert_close(ratios, torch.tensor(expected, dtype=torch.float64), rtol=0.05, atol=0)

    def test_equal_weights_are_not_smoothed(self) -> None:
        """Fully correlated weights: with w'_1 = w_1 no variance goes away."""
        weights = random(50, 7).exp().repeat_interleave(20)
        ids = torch.arange(50).repeat_interleave(20)
        smoothed = exponential_average(weights, ids, beta=0.1, init="first")
        assert_close(smoothed, weights)
