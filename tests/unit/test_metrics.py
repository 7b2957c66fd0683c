"""Figures merge exactly over micro-batches and ranks; the timer adds up."""

import math
from functools import reduce

import pytest

from megatron_rl.metrics import timing
from megatron_rl.metrics.progress import progress
from megatron_rl.metrics.timing import Timer, phases
from megatron_rl.metrics.types import Max, Mean, Metrics, Min, Sum, flatten, merge, unflatten


def results(metrics: Metrics) -> dict[str, float]:
    return {name: value.result() for name, value in metrics.items()}


def test_each_type_merges_its_own_way() -> None:
    a: Metrics = {"sum": Sum(1.5), "mean": Mean.of([1.0, 2.0, 6.0]), "max": Max(2.0), "min": Min(2.0)}
    b: Metrics = {"sum": Sum(2.0), "mean": Mean.of([11.0]), "max": Max(-3.0), "min": Min(-3.0)}
    # The mean of the four values is 5; the average of the two averages would be 7.
    assert results(merge(a, b)) == {"sum": 3.5, "mean": 5.0, "max": 2.0, "min": -3.0}
    assert merge(a, b) == merge(b, a)


def test_merging_leaves_its_inputs_alone() -> None:
    a: Metrics = {"x": Sum(1.0)}
    merge(a, {"x": Sum(2.0), "y": Sum(3.0)})
    assert a == {"x": Sum(1.0)}


def test_a_figure_of_one_side_is_kept() -> None:
    assert merge({"x": Sum(1.0)}, {"y": Max(2.0)}) == {"x": Sum(1.0), "y": Max(2.0)}


@pytest.mark.parametrize("empty", [Mean.of([]), Max(-math.inf), Min(math.inf)])
def test_nothing_measured_is_nan(empty: Mean | Max | Min) -> None:
    assert math.isnan(empty.result())


def test_identities_change_nothing() -> None:
    some: Metrics = {"mean": Mean(3.0, 2), "max": Max(-5.0), "min": Min(5.0), "sum": Sum(1.0)}
    none: Metrics = {"mean": Mean(0.0, 0), "max": Max(-math.inf), "min": Min(math.inf), "sum": Sum(0.0)}
    assert merge(some, none) == merge(none, some) == some


@pytest.mark.parametrize("kind", [Max, Min])
def test_a_nan_extreme_is_never_lost(kind: type[Max] | type[Min]) -> None:
    for values in ((math.nan, 1.0), (1.0, math.nan), (math.nan, math.inf), (-math.inf, math.nan)):
        first, second = (kind(value) for value in values)
        assert math.isnan(merge({"x": first}, {"x": second})["x"].result())


def test_infinite_extremes_stay_infinite() -> None:
    assert merge({"x": Max(math.inf)}, {"x": Max(-math.inf)})["x"].result() == math.inf
    assert merge({"x": Min(-math.inf)}, {"x": Min(math.inf)})["x"].result() == -math.inf


def test_two_types_under_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="'actor/loss' is a Sum and Mean"):
        merge({"actor/loss": Sum(1.0)}, {"actor/loss": Mean(1.0, 1)})


def test_flattening_sorts_by_name_and_type() -> None:
    metrics: Metrics = {"d": Min(4.0), "b": Mean(6.0, 3), "c": Max(5.0), "a": Sum(1.0), "e": Sum(2.0)}
    assert flatten(metrics) == ([1.0, 6.0, 3, 2.0], [5.0], [4.0])
    assert unflatten(metrics, *flatten(metrics)) == metrics


def test_a_nan_extreme_crosses_ranks_as_an_infinity() -> None:
    assert flatten({"a": Max(math.nan), "b": Min(math.nan)}) == ([], [math.inf], [-math.inf])


def test_reducing_flat_lists_equals_merging() -> None:
    ranks: list[Metrics] = [
        {"n": Mean.of([1.0, 2.0]), "s": Sum(1.0), "hi": Max(1.0), "lo": Min(1.0)},
        {"n": Mean.of([]), "s": Sum(0.0), "hi": Max(-math.inf), "lo": Min(math.inf)},
        {"n": Mean.of([9.0]), "s": Sum(4.0), "hi": Max(7.0), "lo": Min(-7.0)},
    ]
    rows = zip(*map(flatten, ranks))
    reduced = [[operator(column) for column in zip(*row)] for operator, row in zip((sum, max, min), rows)]
    assert unflatten(ranks[0], *reduced) == reduce(merge, ranks)
    assert results(reduce(merge, ranks)) == {"n": 4.0, "s": 5.0, "hi": 7.0, "lo": -7.0}


def test_unflatten_wants_the_right_number_of_values() -> None:
    with pytest.raises(AssertionError, match=r"\(2, 0, 0\)"):
        unflatten({"x": Mean(1.0, 1)}, [1.0], [], [])


def test_timer_adds_nests_and_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 6.0, 10.0])
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))
    timer = Timer()
    with timer("step"):
        with timer("gen"):
            pass
        with timer("gen"):
            pass
    assert timer.metrics() == {"timing_s/gen": 4.0, "timing_s/step": 10.0}
    timer.reset()
    assert timer.metrics() == {}


def test_a_span_inside_a_phase_is_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 3.0, 3.5, 4.0, 6.0, 6.5, 7.0, 9.0])
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))
    timer = Timer()
    with timer("step"), timer("update_actor"):
        with timer("forward_backward"), timer("reduce_gradients"):
            assert progress.place.phase == "update_actor/forward_backward/reduce_gradients"
        assert progress.place.phase == "update_actor"
    with timer("testing"):
        pass
    assert timer.metrics() == {
        "timing_s/step": 6.5,
        "timing_s/update_actor": 5.0,
        "timing_s/update_actor/forward_backward": 2.0,
        "timing_s/update_actor/forward_backward/reduce_gradients": 0.5,
        "timing_s/testing": 2.0,
    }
    logged = timer.metrics() | {"timing_s/gen_ahead": 5.0, "timing_s/gen": 2.0, "perf/time_per_step": 6.0}
    assert phases(logged) == {"update_actor": 5.0, "gen": 2.0}


def test_timer_counts_a_span_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))
    timer = Timer()
    with pytest.raises(KeyError), timer("gen"):
        raise KeyError
    assert timer.metrics() == {"timing_s/gen": 2.5}
