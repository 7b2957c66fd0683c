"""The plan keeps its contract for any lengths, and packs within the bounds that its docstring proves."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.planner import StepPlan, _ceil_div, _pack, plan_step

MAX_TOKENS = 50


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], dict[str, int]]:
    lengths = draw(st.lists(st.integers(1, MAX_TOKENS), max_size=60))
    return lengths, {
        "dp_size": draw(st.integers(1, 5)),
        "max_tokens": MAX_TOKENS,
        "min_micro_batches": draw(st.integers(1, 6)),
        "multiple_of": draw(st.integers(1, 4)),
    }


def sizes(plan: StepPlan, lengths: list[int]) -> list[list[int]]:
    return [[sum(lengths[i] for i in micro_batch) for micro_batch in rank] for rank in plan.micro_batches]


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_smaller_plan_is_skipped(problem: tuple[list[int], dict[str, int]]) -> None:
    """The search starts where plans become possible, and finds what it would have found from the tokens alone."""
    lengths, options = problem
    dp_size, multiple = options["dp_size"], options["multiple_of"]
    rounds = max(options["min_micro_batches"], _ceil_div(sum(lengths), dp_size * MAX_TOKENS))
    rounds = _ceil_div(rounds, multiple) * multiple
    while _pack(lengths, dp_size * rounds, MAX_TOKENS) is None:
        rounds += multiple
    assert plan_step(lengths, **options).num_micro_batches == rounds


@pytest.mark.parametrize("length, per_bin", [(513, 1), (342, 2), (257, 3)])
def test_many_samples_of_an_awkward_length_are_planned_at_once(length: int, per_bin: int) -> None:
    """Found by trying one number after the other, 8,192 of them took minutes."""
    start = time.process_time()
    plan = plan_step([length] * 8192, dp_size=1, max_tokens=1025)
    assert plan.num_micro_batches == -(-8192 // per_bin)
    assert time.process_time() - start < 5


@settings(max_examples=150, deadline=None)
@given(problems())
def test_contract(problem: tuple[list[int], dict[str, int]]) -> None:
    lengths, options = problem
    plan = plan_step(lengths, **options)
    placed = [i for rank in plan.micro_batches for micro_batch in rank for i in micro_batch]
    assert sorted(placed) == list(range(len(lengths)))
    assert len(plan.micro_batches) == options["dp_size"]
    assert {len(rank) for rank in plan.micro_batches} == {plan.num_micro_batches}
    assert plan.num_micro_batches >= options["min_micro_batches"]
    assert plan.num_micro_batches % options["multiple_of"] == 0
    assert max(max(rank) for rank in sizes(plan, lengths)) <= MAX_TOKENS
    assert plan_step(list(lengths), **options) == plan


@settings(max_examples=150, deadline=None)
@given(problems())
def test_number_of_micro_batches_is_near_the_least(problem: tuple[list[int], dict[str, int]]) -> None:
    lengths, options = problem
    # The proof: a failure with B micro-batches means sum(lengths) > B * max_tokens / 2.
    bound = max(options["min_micro_batches"], -(-2 * sum(lengths) // (options["dp_size"] * MAX_TOKENS)))
    step = options["multiple_of"]
    assert plan_step(lengths, **options).num_micro_batches <= -(-bound // step) * step


@settings(max_examples=150, deadline=None)
@given(problems())
def test_balance(problem: tuple[list[int], dict[str, int]]) -> None:
    lengths, options = problem
    per_rank = sizes(plan_step(lengths, **options), lengths)
    longest = max(lengths, default=0)
    flat = [size for rank in per_rank for size in rank]
    assert max(flat) - min(flat) <= longest
    assert sum(max(peers) - min(peers) for peers in zip(*per_rank)) <= longest
    totals = [sum(rank) for rank in per_rank]
    assert max(totals) - min(totals) <= longest


def test_a_plan_by_hand() -> None:
    # Longest first into the emptiest: 7 | 5 | 4 | 3, then 2 joins 3 and 1 joins 4, so four bins of 7, 5, 5, 5.
    plan = plan_step([4, 7, 1, 3, 5, 2], dp_size=2, max_tokens=7)
    assert plan.micro_batches == (((1,), (4,)), ((0, 2), (3, 5)))
    assert plan.num_micro_batches == 2


def test_perfect_packing_is_found() -> None:
    assert plan_step([8] * 12, dp_size=2, max_tokens=24).num_micro_batches == 2
    assert plan_step([10, 10, 10, 10, 1], dp_size=2, max_tokens=20).num_micro_batches == 2


def test_fillers() -> None:
    assert plan_step([], dp_size=2, max_tokens=8).micro_batches == (((),), ((),))
    assert plan_step([], dp_size=1, max_tokens=8, min_micro_batches=3, multiple_of=2).micro_batches == (((),) * 4,)
    plan = plan_step([5, 5, 5], dp_size=2, max_tokens=8, min_micro_batches=2)
    assert plan.micro_batches == (((0,), ()), ((1,), (2,)))


def test_a_sample_over_budget_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"sample 1 has 9 tokens .* max_tokens=8; .* raise max_tokens to at least 11"):
        plan_step([3, 9, 11], dp_size=2, max_tokens=8)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        plan_step([], dp_size=1, max_tokens=0)
