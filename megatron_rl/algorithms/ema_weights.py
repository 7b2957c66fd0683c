"""Importance weights smoothed by an exponential moving average, to lower the variance of the policy gradient.

    w'_t = beta w_t + (1 - beta) w'_{t-1},    w = exp(clamp(logp - old_logp, -20, 20)),    0 < beta <= 1

where t counts the tokens of a sequence that bear loss (the token axis), or the updates that visit the same token (the
step axis). A larger beta smooths less, and beta = 1 not at all, to the bit. The smoothed weight takes the place of the
ratio in both surrogates and in the dual clip.

Before the first token, or the first visit, w'_0 = 1 (`one`), or w'_1 = w_1 (`first`).

The recurrence over tokens is an operator of its own, and comes to this module as its result. What is here is the rest:
the gradient that a smoothed weight has, the recurrence over updates, figures, and theory.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Gradient = Literal["full", "current", "straight_through"]
Init = Literal["one", "first"]

EPSILON = 1e-8  # of the denominators, and what the variance of a sequence must exceed
_PREFIX = "ema"


# Gradient


def with_gradient(weights: Tensor, smoothed: Tensor, *, beta: float, gradient: Gradient) -> Tensor:
    """The values w' [N] of `smoothed`, with one of three gradients with respect to `weights` w [N].

        full               that of `smoothed` itself, through the whole history
        current            dw'_t / dw_t = beta, the history being constant, also where it is empty
        straight_through   dw'_t / dw_t = w'_t / w_t, so that dw'_t / dlogp_t = w'_t

    On the policy itself (all w = 1) the loss is the same, and its gradient is not: the token t of n has

        full, w'_0 = 1     1 - (1 - beta)^(n - t + 1)    times the gradient that it has without smoothing
        full, w'_1 = w_1   the same, but (1 - (1 - beta)^n) / beta for the first token; their mean is 1
        current            beta
        straight_through   1
    """
    if gradient == "full":
        return smoothed
    value, constant = smoothed.detach(), weights.detach()
    if gradient == "current":
        return value + beta * (weights - constant)
    assert gradient == "straight_through", gradient
    return value + value / constant * (weights - constant)


# Over updates


class StepAverages:
    """The recurrence over the updates that visit the same sample, of one rollout batch.

    The state is, by sample id, how many visits there were and the latest w' of the sample's tokens: on the CPU, without
    gradient, float64 for float64 weights and otherwise float32. It belongs to one rollout batch and the rank that
    visits the sample; `clear` it with the batch.
    """

    def __init__(self, *, beta: float, init: Init = "one") -> None:
        assert 0 < beta <= 1, beta
        assert init in ("one", "first"), init
        self.beta, self.init = beta, init
        self._visits: dict[int, int] = {}
        self._averages: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """The number of samples whose state is held."""
        return len(self._averages)

    def update(self, sample_ids: Sequence[int], weights: Tensor, sequence_ids: Tensor, *, visit: int) -> Tensor:
        """The smoothed weights [N], and the state after this visit to the samples, which counts from 0.

        `sequence_ids` [N] int64 are not decreasing, and are places in `sample_ids`. Earlier visits are constants for
        the gradient, so `full` is `current` here, but at the first visit of `first`, where w' = w.
        """
        assert len(set(sample_ids)) == len(sample_ids), f"a sample is visited twice at once: {sample_ids}"
        counts = torch.bincount(sequence_ids, minlength=len(sample_ids)).tolist()
        parts = list(zip(sample_ids, weights.split(counts), strict=True))
        for sample_id, part in parts:
            self._check(sample_id, part, visit)
        smoothed = [self._averaged(sample_id, part) for sample_id, part in parts]
        for (sample_id, _), part in zip(parts, smoothed):
            self._visits[sample_id] = visit + 1
            kept = torch.promote_types(part.dtype, torch.float32)
            # A copy: what autograd may still read, and what the caller may change, are not shared with it.
            self._averages[sample_id] = part.detach().to("cpu", kept, copy=True)
        return torch.cat(smoothed) if smoothed else weights

    def _check(self, sample_id: int, weights: Tensor, visit: int) -> None:
        visits = self._visits.get(sample_id, 0)
        if visits != visit:
            raise ValueError(
                f"sample {sample_id} is visited for the {visit + 1}. time, and its averaged weights know of {visits} "
                "visits: each rank must see the same samples in every pass, restore the state with a checkpoint, and "
                "clear it with the rollout batch"
            )
        if visit and len(self._averages[sample_id]) != len(weights):
            known = len(self._averages[sample_id])
            raise ValueError(f"sample {sample_id} has {len(weights)} tokens, and had {known} at the visit before")

    def _averaged(self, sample_id: int, weights: Tensor) -> Tensor:
        if sample_id in self._averages:
            history = self._averages[sample_id].to(weights)
        elif self.init == "first":
            return weights
        else:
            history = torch.ones_like(weights)
        return self.beta * weights + (1 - self.beta) * history

    def clear(self) -> None:
        """Forgets all samples: their rollout batch is no longer trained on."""
        self._visits.clear()
        self._averages.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs that falls inside a rollout batch."""
        return {"visits": dict(self._visits), "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state["visits"].keys() == state["averages"].keys(), "visits and averages of different samples"
        self._visits, self._averages = dict(state["visits"]), dict(state["averages"])


# Figures


def smoothing_metrics(
    weights: Tensor, smoothed: Tensor, sequence_ids: Tensor, *, beta: float, states: int | None = None
) -> dict[str, float]:
    """`ema/*` of the tokens of a global mini-batch: weights w [N], smoothed weights s [N], and their sequences [N].

        variance_reduction_ratio, _absolute   var(w) / (var(s) + e), var(w) - var(s)
        smoothing_strength                    1 - var(s) / (var(w) + e)
        weights_diff_l2, _l1, _max            norms of w - s; _rms and _mae are l2 / sqrt(N) and l1 / N
        relative_change_mean, _max            of |w - s| / (|w| + e)
        range_reduction                       1 - (p95 - p05 of s) / (p95 - p05 of w), with e in the denominator
        active_sequences                      sequences with tokens; on the step axis the number of `states` held
        avg_variance_reduction                mean of 1 - var_i(s) / var_i(w) over sequences with var_i(w) > e
        avg_smoothing_effect                  mean over sequences of the l2 norm of w - s

    with e = 1e-8, sums in float64, variances with N - 1 (0 for one token), quantiles interpolated. Figures that nothing
    was measured for are left out.

    Nothing here is a mean of means of parts, so the whole mini-batch has to be there: gather it first. The order of the
    tokens does not matter.
    """
    assert weights.shape == smoothed.shape == sequence_ids.shape, (weights.shape, smoothed.shape, sequence_ids.shape)
    sequences, of_sequence = sequence_ids.unique(return_inverse=True)
    active = len(sequences) if states is None else states
    figures = {"use_ema": 1.0, "beta": beta, "active_sequences": float(active)}
    if weights.numel() > 0:
        raw, smooth = weights.detach().double(), smoothed.detach().double()
        figures |= _spread("raw_weights", raw) | _spread("smoothed_weights", smooth)
        figures |= _reductions(raw, smooth) | _differences(raw, smooth)
        figures |= _over_sequences(raw, smooth, of_sequence, len(sequences))
    return _named(figures)


def raw_metrics(weights: Tensor) -> dict[str, float]:
    """The figures that are logged without smoothing, of the weights [N] of a global mini-batch."""
    raw = weights.detach().double()
    return _named({"use_ema": 0.0} | (_spread("raw_weights", raw) if raw.numel() > 0 else {}))


def _spread(name: str, values: Tensor) -> dict[str, float]:
    variance = _variance(values)
    return {f"{name}_mean": values.mean().item(), f"{name}_std": variance**0.5, f"{name}_variance": variance}


def _variance(values: Tensor) -> float:
    return values.var(correction=1).item() if values.numel() > 1 else 0.0


def _reductions(raw: Tensor, smooth: Tensor) -> dict[str, float]:
    of_raw, of_smooth = _variance(raw), _variance(smooth)
    (raw_low, raw_high), (low, high) = _quantiles(raw, 0.05, 0.95), _quantiles(smooth, 0.05, 0.95)
    raw_range, smooth_range = raw_high - raw_low, high - low
    return {
        "variance_reduction_ratio": of_raw / (of_smooth + EPSILON),
        "variance_reduction_absolute": of_raw - of_smooth,
        "smoothing_strength": 1 - of_smooth / (of_raw + EPSILON),
        "raw_weights_p05": raw_low,
        "raw_weights_p95": raw_high,
        "smoothed_weights_p05": low,
        "smoothed_weights_p95": high,
        "range_reduction": (raw_range - smooth_range) / (raw_range + EPSILON),
    }


def _quantiles(values: Tensor, *levels: float) -> list[float]:
    """Linear between order statistics, as NumPy's. torch.quantile refuses more than 2^24 values."""
    ordered = values.sort().values
    places = torch.tensor(levels, dtype=torch.float64, device=values.device) * (values.numel() - 1)
    below, above = places.floor().long(), places.ceil().long()
    return ordered[below].lerp(ordered[above], places - below).tolist()


def _differences(raw: Tensor, smooth: Tensor) -> dict[str, float]:
    size = (raw - smooth).abs()
    l2, l1, count = size.square().sum().item() ** 0.5, size.sum().item(), size.numel()
    relative = size / (raw.abs() + EPSILON)
    return {
        "weights_diff_l2": l2,
        "weights_diff_l1": l1,
        "weights_diff_max": size.max().item(),
        "weights_diff_rms": l2 / count**0.5,
        "weights_diff_mae": l1 / count,
        "relative_change_mean": relative.mean().item(),
        "relative_change_max": relative.max().item(),
    }


def _over_sequences(raw: Tensor, smooth: Tensor, of_sequence: Tensor, num_sequences: int) -> dict[str, float]:
    """Means over sequences, all of which have tokens."""

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(num_sequences).index_add_(0, of_sequence, values)

    counts = total(torch.ones_like(raw))

    def variance(values: Tensor) -> Tensor:
        centred = values - (total(values) / counts)[of_sequence]
        return total(centred.square()) / (counts - 1).clamp(min=1)

    of_raw, of_smooth = variance(raw), variance(smooth)
    figures = {"avg_smoothing_effect": total((raw - smooth).square()).sqrt().mean().item()}
    # The variance of a single token is 0 here, so that it is left out.
    varied = of_raw > EPSILON
    if varied.any():
        figures["avg_variance_reduction"] = ((of_raw - of_smooth) / of_raw)[varied].mean().item()
    return figures


def _named(figures: dict[str, float]) -> dict[str, float]:
    return {f"{_PREFIX}/{name}": value for name, value in figures.items()}


# Theory


def variance_ratio(beta: float, num_tokens: float = float("inf")) -> float:
    """var(w) / var(w'_t) for independent weights of one variance, t tokens (or visits) after w'_0 = 1.

        var(w'_t) = var(w) beta^2 sum_{j < t} (1 - beta)^2j,    so that the ratio is
        (2 - beta) / (beta (1 - (1 - beta)^2t)),    and (2 - beta) / beta far from the start.

    Weights of neighbouring tokens are not independent, and where they correlate the ratio is smaller.
    """
    assert 0 < beta <= 1 and num_tokens >= 1, (beta, num_tokens)
    return (2 - beta) / (beta * (1 - (1 - beta) ** (2 * num_tokens)))
