"""Weights, masks and figures of rollout correction: by hand, on the policy, in any order, and at the edges."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.algorithms.rollout_correction import (
    Criterion,
    Level,
    importance_metrics,
    importance_weights,
    off_policy_metrics,
    off_policy_sequence_mask,
    rejection_mask,
    rejection_metrics,
)

LEVELS: tuple[Level, ...] = get_args(Level)
# Sequences 0 and 2 interleave, sequence 1 is empty. Ratios 2, 1/4 and 4, 1/2, 1: products 1/2 and 2.
RATIOS = (2.0, 4.0, 0.25, 0.5, 1.0)
IDS = torch.tensor([0, 2, 0, 2, 2])
CRITERIA = [
    *(Criterion(level, "k1", 4 / 3) for level in ("token", "seq_sum", "seq_mean")),
    *(Criterion(level, "k2", 0.1) for level in ("token", "seq_sum", "seq_mean", "seq_max")),
    *(Criterion(level, "k3", 0.1) for level in ("token", "seq_sum", "seq_mean", "seq_max")),
]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_close(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got, vector(*expected), rtol=1e-12, atol=1e-12)


def weights(level: Level, **options: Any) -> Tensor:
    return importance_weights(vector(*RATIOS).log(), IDS, 3, level=level, **options)


def kept(*criteria: Criterion, ratios: tuple[float, ...] = RATIOS) -> list[bool]:
    return rejection_mask(vector(*ratios).log(), IDS, 3, criteria).tolist()


def own(figures: dict[str, float], prefix: str = "") -> dict[str, float]:
    """Figures by their names without the prefix, which all of them must have."""
    start = f"rollout_corr/{prefix}"
    assert all(name.startswith(start) for name in figures), figures
    return {name.removeprefix(start): value for name, value in figures.items()}


class TestImportanceWeights:
    def test_truncated(self) -> None:
        assert_close(weights("token", high=1.5), 1.5, 1.5, 0.25, 0.5, 1)
        assert_close(weights("token", high=math.inf), *RATIOS)
        assert_close(weights("sequence", high=1.5), 0.5, 1.5, 0.5, 1.5, 1.5)

    def test_icepop(self) -> None:
        """The bounds belong to the range."""
        assert_close(weights("token", low=0.4, high=3.0), 2, 0, 0, 0.5, 1)
        assert_close(weights("sequence", low=0.6, high=3.0), 0, 2, 0, 2, 2)
        edges = importance_weights(vector(0, 0), torch.tensor([0, 0]), 1, level="token", low=1.0, high=1.0)
        assert torch.equal(edges, vector(1, 1))

    def test_normalized(self) -> None:
        """Means: (1.5 + 1.5 + 0.25 + 0.5 + 1) / 5 of tokens, (0.5 + 2) / 2 of sequences, whatever their length."""
        truncated = (1.5, 1.5, 0.25, 0.5, 1)
        assert_close(weights("token", high=1.5, normalize=True), *(w / 0.95 for w in truncated))
        assert_close(weights("sequence", high=2.5, normalize=True), *(w / 1.25 for w in (0.5, 2, 0.5, 2, 2)))

    @pytest.mark.parametrize("level", LEVELS)
    def test_nothing_left_to_normalize(self, level: Level) -> None:
        assert torch.equal(weights(level, low=8.0, high=9.0, normalize=True), torch.zeros(5).double())
        tiny = importance_weights(vector(-30, -30), torch.tensor([0, 1]), 2, level=level, high=2.0, normalize=True)
        assert_close(tiny, math.exp(-20), math.exp(-20))

    @pytest.mark.parametrize("level", LEVELS)
    def test_log_ratios_are_bounded(self, level: Level) -> None:
        extreme = importance_weights(vector(1e4, -1e4), torch.tensor([0, 1]), 2, level=level, high=math.inf)
        torch.testing.assert_close(extreme, vector(20, -20).exp(), rtol=1e-12, atol=0)

    def test_the_bound_is_on_the_sum(self) -> None:
        """30 - 30 = 0: bounded per token first, 25 - 30 would be -5 and then 0."""
        ids = torch.tensor([0, 0, 1, 1])
        got = importance_weights(vector(30, -30, 25, -30), ids, 2, level="sequence", high=9.0)
        assert_close(got, 1, 1, math.exp(-5), math.exp(-5))

    def test_no_gradient_and_the_same_dtype(self) -> None:
        log_ratio = torch.zeros(2, requires_grad=True)
        got = importance_weights(log_ratio, torch.tensor([0, 0]), 1, level="token", high=2.0, normalize=True)
        assert not got.requires_grad
        assert got.dtype == torch.float32

    @pytest.mark.parametrize("bounds", [{"high": 0.0}, {"low": 0.0, "high": 1.0}, {"low": 2.0, "high": 1.0}])
    def test_refuses_bounds_that_are_none(self, bounds: dict[str, float]) -> None:
        with pytest.raises(AssertionError):
            weights("token", **bounds)


class TestRejection:
    def test_k1_has_bounds_on_the_inverse_ratio(self) -> None:
        """Rollout / old is 1/2, 1/4, 4, 2, 1."""
        assert kept(Criterion("token", "k1", 2.0, 0.25)) == [True, True, False, True, True]
        assert kept(Criterion("token", "k1", 2.0)) == [True, False, False, True, True]
        # Sequence 0: 2, sequence 2: 1/2; means: the square and the cubic root.
        assert kept(Criterion("seq_sum", "k1", 1.9, 0.4)) == [False, True, False, True, True]
        assert kept(Criterion("seq_sum", "k1", 2.1, 0.6)) == [True, False, True, False, False]
        assert kept(Criterion("seq_mean", "k1", 1.41)) == [False, True, False, True, True]
        assert kept(Criterion("seq_mean", "k1", 1.42)) == [True] * 5

    @pytest.mark.parametrize(
        ("statistic", "values"),
        [
            ("k2", [math.log(ratio) ** 2 / 2 for ratio in RATIOS]),
            ("k3", [ratio - 1 - math.log(ratio) for ratio in RATIOS]),
        ],
    )
    def test_k2_and_k3_by_hand(self, statistic: Any, values: list[float]) -> None:
        """Every threshold between two values separates them, at every level."""
        zero, two = [values[0], values[2]], [values[1], values[3], values[4]]
        by_level: dict[Any, Callable[[list[float]], float]] = {
            "seq_sum": sum,
            "seq_mean": lambda members: sum(members) / len(members),
            "seq_max": max,
        }
        for level, of in by_level.items():
            in_order = [of(zero), of(two), of(zero), of(two), of(two)]
            for threshold in (min(in_order) * 0.99, (min(in_order) + max(in_order)) / 2, max(in_order) * 1.01):
                expected = [value <= threshold for value in in_order]
                assert kept(Criterion(level, statistic, threshold)) == expected
        for threshold in (0.01, 0.25, 0.5, 0.8, 2.0):
            expected = [value <= threshold for value in values]
            assert kept(Criterion("token", statistic, threshold)) == expected

    def test_criteria_are_anded(self) -> None:
        low, high = Criterion("token", "k1", 9.0, 0.4), Criterion("token", "k1", 3.0, 0.1)
        assert kept(low) == [True, False, True, True, True]
        assert kept(high) == [True, True, False, True, True]
        assert kept(low, high) == kept(high, low) == [True, False, False, True, True]
        assert kept() == [True] * 5

    def test_extremes(self) -> None:
        """k2 is at most 200, k3 at most exp(20) - 21, and 19 on the other side; a NaN passes nothing."""
        extremes = vector(1e4, -1e4, math.nan, 0)
        ids = torch.arange(4)
        for statistic, above, below in (("k2", 200.1, 199.9), ("k3", math.exp(20), 19.1)):
            wide = Criterion("token", statistic, above)  # type: ignore[arg-type]
            narrow = Criterion("token", statistic, below)  # type: ignore[arg-type]
            assert rejection_mask(extremes, ids, 4, [wide]).tolist() == [True, True, False, True]
            inside = statistic == "k3"
            assert rejection_mask(extremes, ids, 4, [narrow]).tolist() == [False, inside, False, True]

    @pytest.mark.parametrize(
        ("level", "statistic", "high", "low"),
        [
            ("seq_max", "k1", 2.0, None),
            ("token", "k2", 2.0, 0.5),
            ("token", "k1", 0.5, None),
            ("token", "k1", 0.5, 0.6),
            ("token", "k1", 2.0, 0.0),
            ("token", "k3", 0.0, None),
        ],
    )
    def test_refuses_criteria_that_are_none(self, level: Any, statistic: Any, high: float, low: float | None) -> None:
        with pytest.raises(AssertionError):
            Criterion(level, statistic, high, low)

    def test_off_policy_sequences(self) -> None:
        """Drifts of 0.2, 0.3 and 0.1, the first two off the policy; the second has a positive advantage."""
        old, logp = vector(-1, -1, -1, -1, -1), vector(-1.4, -1, -1.3, -1, -1.2)
        ids, advantages = torch.tensor([0, 0, 1, 2, 2]), vector(-1, -1, 1, -1, -1)
        keep = off_policy_sequence_mask(logp.requires_grad_(), old, advantages, ids, 4, delta=0.15)
        assert keep.tolist() == [False, False, True, True, True]
        assert off_policy_sequence_mask(logp, old, advantages, ids, 4, delta=0.25).all()
        # A policy that has come closer to a bad answer keeps it.
        assert off_policy_sequence_mask(old, logp, advantages, ids, 4, delta=0.0).all()
        assert off_policy_sequence_mask(old, old, advantages, ids, 4, delta=0.0).all()
        assert off_policy_sequence_mask(logp, old, vector(0, 0, 0, 0, 0), ids, 4, delta=0.0).all()


class TestFigures:
    def test_weights_by_token(self) -> None:
        figures = own(importance_metrics(vector(*RATIOS).log(), IDS, 3, level="token", high=2.0), "rollout_is_")
        applied = vector(2, 2, 0.25, 0.5, 1)
        by_sequence = vector(1.125, 3.5 / 3)
        assert figures == pytest.approx(
            {
                "mean": 1.15,
                "max": 2,
                "min": 0.25,
                "std": applied.std(correction=0).item(),
                "eff_sample_size": 5.75**2 / (5 * 9.3125),
                "ratio_fraction_high": 1 / 5,
                "ratio_fraction_low": 1 / 5,
                "seq_mean": by_sequence.mean().item(),
                "seq_std": by_sequence.std().item(),
                "seq_max": 3.5 / 3,
                "seq_min": 1.125,
                "seq_max_deviation": 0.5 / 3,
                "seq_fraction_high": 0,
                "seq_fraction_low": 0,
            },
            rel=1e-12,
        )

    def test_weights_by_sequence(self) -> None:
        """Weights 1/2 for two tokens and 2 for three, of which the range takes the second; sequences count once."""
        options: dict[str, Any] = {"level": "sequence", "low": 0.4, "high": 1.6, "normalize": True}
        figures = own(importance_metrics(vector(*RATIOS).log(), IDS, 3, **options), "rollout_is_")
        expected = {
            "mean": 0.2,
            "max": 2,
            "min": 0.5,
            "std": math.sqrt(0.06),
            "eff_sample_size": 0.4,
            "ratio_fraction_high": 1 / 2,
            "ratio_fraction_low": 0,
            "oob_ratio": 3 / 5,
            "seq_mean": 0.25,
            "seq_min": 0,
            "seq_max_deviation": 1,
            "seq_fraction_high": 1 / 2,
            "batch_norm_factor": 0.25,
        }
        assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-12)

    def test_the_worst_sequence_shows(self) -> None:
        """By sequence the ratio is bounded from above only, by token on both sides."""
        log_ratio, ids = vector(50, -50), torch.tensor([0, 1])
        for level, least in (("sequence", -50), ("token", -20)):
            figures = importance_metrics(log_ratio, ids, 2, level=level, high=math.inf)  # type: ignore[arg-type]
            assert figures["rollout_corr/rollout_is_max"] == pytest.approx(math.exp(20), rel=1e-12)
            assert figures["rollout_corr/rollout_is_min"] == pytest.approx(math.exp(least), rel=1e-12)

    def test_all_weights_cut(self) -> None:
        figures = own(
            importance_metrics(vector(*RATIOS).log(), IDS, 3, level="token", low=8.0, high=9.0), "rollout_is_"
        )
        assert (figures["mean"], figures["eff_sample_size"], figures["oob_ratio"]) == (0, 0, 1)

    def test_rejection_by_token(self) -> None:
        """k1 is -log of 2, 4, 1/4, 1/2, 1; its mean is 0 over tokens, and +-log(2) / 2, / 3 over sequences."""
        criterion, two = Criterion("token", "k1", 2.1, 0.4), math.log(2)
        figures = own(rejection_metrics(vector(*RATIOS).log(), IDS, 3, [criterion]), "rollout_rs_")
        clamped = vector(-two, math.log(0.4), math.log(2.1), two, 0)
        expected = {
            "token_k1_mean": 0,
            "token_k1_max": 2 * two,
            "token_k1_min": -2 * two,
            "token_k1_std": clamped.std(correction=0).item(),
            "token_k1_fraction_high": 1 / 5,
            "token_k1_fraction_low": 1 / 5,
            "token_k1_seq_mean": two / 12,
            "token_k1_seq_max": two / 2,
            "token_k1_seq_min": -two / 3,
            "token_k1_seq_max_deviation": two / 2,
            "token_k1_seq_fraction_high": 0,
            "token_k1_seq_fraction_low": 0,
            "token_k1_masked_fraction": 2 / 5,
            "token_k1_seq_masked_fraction": 1,
            "masked_fraction": 2 / 5,
            "seq_masked_fraction": 1,
        }
        assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-12, abs=1e-15)

    def test_rejection_by_sequence(self) -> None:
        """k2 in units of log(2)^2 / 2: 1 + 4 and 4 + 1 + 0, maxima 4 and 4; k1 sums to log(2) and -log(2)."""
        half, criteria = math.log(2) ** 2 / 2, [Criterion("seq_sum", "k1", 1.5, 0.4), Criterion("seq_max", "k2", 9.0)]
        figures = own(rejection_metrics(vector(*RATIOS).log(), IDS, 3, criteria), "rollout_rs_")
        expected = {
            "seq_sum_k1_mean": -math.log(2) / 5,
            "seq_sum_k1_fraction_high": 1 / 2,
            "seq_sum_k1_fraction_low": 0,
            "seq_sum_k1_masked_fraction": 2 / 5,
            "seq_max_k2_mean": 4 * half,
            "seq_max_k2_seq_max_deviation": 4 * half,
            "seq_max_k2_masked_fraction": 0,
            "masked_fraction": 2 / 5,
            "seq_masked_fraction": 1 / 2,
        }
        assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-12)

    def test_off_policy(self) -> None:
        """The engine gave every token 1/4: the trainer gave 1/2, 1, 1/16, 1/8, 1/4."""
        rollout = vector(*[math.log(0.25)] * 5)
        figures = own(off_policy_metrics(rollout + vector(*RATIOS).log(), rollout, IDS, 3))
        gaps = vector(math.log(2) / 2, -math.log(2) / 3)
        assert figures == pytest.approx(
            {
                "training_ppl": 4 * gaps.exp().mean().item(),
                "training_log_ppl": math.log(4) + gaps.mean().item(),
                "rollout_ppl": 4,
                "rollout_log_ppl": math.log(4),
                "kl": 0,
                "k3_kl": 7.75 / 5 - 1,
                "log_ppl_diff": math.log(2) / 12,
                "log_ppl_abs_diff": math.log(2) * 5 / 12,
                "log_ppl_diff_max": math.log(2) / 2,
                "log_ppl_diff_min": -math.log(2) / 3,
                "ppl_ratio": gaps.exp().mean().item(),
                "chi2_token": (4 + 16 + 1 / 16 + 1 / 4 + 1) / 5 - 1,
                "chi2_seq": (1 / 4 + 4) / 2 - 1,
            },
            rel=1e-12,
            abs=1e-15,
        )

    def test_the_sign_of_the_distance(self) -> None:
        """The engine was surer of what it drew than the trainer is."""
        figures = own(off_policy_metrics(vector(-3, -2), vector(-1, -1), torch.tensor([0, 0]), 1))
        assert (figures["kl"], figures["log_ppl_diff"]) == (1.5, 1.5)


def everything(log_ratio: Tensor, ids: Tensor, count: int, level: Level) -> dict[str, float]:
    rollout = torch.full_like(log_ratio, -1.0)
    options: dict[str, Any] = {"level": level, "high": 2.0, "normalize": True}
    return {
        **importance_metrics(log_ratio, ids, count, **options),
        **rejection_metrics(log_ratio, ids, count, CRITERIA),
        **off_policy_metrics(rollout + log_ratio, rollout, ids, count),
    }


@st.composite
def batches(draw: st.DrawFn, largest: float = 3.0) -> tuple[list[list[float]], list[int]]:
    """Log-ratios of sequences, some of them empty, and an order for them."""
    values = st.floats(-largest, largest, allow_subnormal=False)
    sequences = draw(st.lists(st.lists(values, max_size=5), min_size=1, max_size=5))
    return sequences, draw(st.permutations(range(len(sequences))))


def flat(sequences: list[list[float]]) -> tuple[Tensor, Tensor, int]:
    ids = torch.tensor([i for i, values in enumerate(sequences) for _ in values], dtype=torch.int64)
    return vector(*(value for values in sequences for value in values)), ids, len(sequences)


class TestProperties:
    @settings(max_examples=80, deadline=None)
    @given(batches(), st.sampled_from(LEVELS), st.sampled_from([None, 0.5]))
    def test_the_order_of_sequences_does_not_matter(
        self, batch: tuple[list[list[float]], list[int]], level: Level, low: float | None
    ) -> None:
        sequences, order = batch
        before, after = flat(sequences), flat([sequences[i] for i in order])
        lengths = [len(values) for values in sequences]

        def permuted(values: Tensor) -> Tensor:
            parts = values.split(lengths)
            return torch.cat([parts[i] for i in order])

        for normalize in (False, True):
            options: dict[str, Any] = {"level": level, "high": 2.0, "low": low, "normalize": normalize}
            torch.testing.assert_close(
                importance_weights(*after, **options), permuted(importance_weights(*before, **options))
            )
        for criterion in CRITERIA:
            assert torch.equal(rejection_mask(*after, [criterion]), permuted(rejection_mask(*before, [criterion])))
        assert everything(*after, level) == pytest.approx(everything(*before, level), rel=1e-9, abs=1e-9)

    @settings(max_examples=50, deadline=None)
    @given(batches(), st.sampled_from(LEVELS))
    def test_an_empty_sequence_counts_nowhere(self, batch: tuple[list[list[float]], list[int]], level: Level) -> None:
        sequences = batch[0]
        with_empty, without = flat([[], *sequences, []]), flat([values for values in sequences if values])
        assert everything(*with_empty, level) == everything(*without, level)
        options: dict[str, Any] = {"level": level, "high": 2.0, "normalize": True}
        assert torch.equal(importance_weights(*with_empty, **options), importance_weights(*without, **options))

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(0, 5), max_size=6), st.sampled_from(LEVELS), st.booleans(), st.booleans())
    def test_on_policy_nothing_happens(self, lengths: list[int], level: Level, normalize: bool, icepop: bool) -> None:
        log_ratio, ids, count = flat([[0.0] * length for length in lengths])
        options: dict[str, Any] = {"level": level, "high": 1.0, "low": 1.0 if icepop else None}
        got = importance_weights(log_ratio, ids, count, normalize=normalize, **options)
        assert torch.equal(got, torch.ones_like(log_ratio))
        criteria = [*CRITERIA, Criterion("token", "k1", 1.0, 1.0)]
        assert rejection_mask(log_ratio, ids, count, criteria).all()
        figures = everything(log_ratio, ids, count, level)
        assert all(
            value == 0 for name, value in figures.items() if "fraction" in name or "kl" in name or "chi2" in name
        )
        assert not figures or figures["rollout_corr/rollout_is_eff_sample_size"] == 1

    @settings(max_examples=80, deadline=None)
    @given(batches(largest=1e6), st.sampled_from(LEVELS), st.sampled_from([torch.float32, torch.float64]))
    def test_everything_is_finite(
        self, batch: tuple[list[list[float]], list[int]], level: Level, dtype: torch.dtype
    ) -> None:
        log_ratio, ids, count = flat(batch[0])
        log_ratio = log_ratio.to(dtype)
        for low in (None, 0.5):
            for normalize in (False, True):
                got = importance_weights(log_ratio, ids, count, level=level, high=2.0, low=low, normalize=normalize)
                assert got.isfinite().all()
                assert (got >= 0).all()
        figures = everything(log_ratio, ids, count, level)
        assert all(math.isfinite(value) for value in figures.values()), figures
        assert bool(figures) == (log_ratio.numel() > 0)
