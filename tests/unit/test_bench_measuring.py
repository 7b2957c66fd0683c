"""How seconds, peaks and matrix products are measured."""

import time

import pytest
import torch

from megatron_rl.bench.measuring import Turns, copy_rate, peak_of, resident, take_turns, timed
from megatron_rl.bench.products import Products

MIB = 2**20


def test_sides_take_turns() -> None:
    called: list[str] = []
    turns = take_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3, calls={"b": 2})
    assert "".join(called) == "abb" * 3
    assert {name: len(seconds) for name, seconds in turns.seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_the_turns_ratios() -> None:
    """The second turn was slow on both sides: its ratio is that of the others."""
    turns = Turns({"ours": (1.0, 50.0, 3.0), "plain": (2.0, 100.0, 2.0)})
    assert turns.ratio("ours", "plain") == 0.5
    assert turns.median("ours") == 3.0


def test_the_clock_on_the_wall_counts_sleep_and_that_of_the_processor_does_not() -> None:
    assert timed(lambda: time.sleep(0.05), 2, clock="wall") >= 0.05
    assert timed(lambda: time.sleep(0.05), clock="cpu") < 0.04


def test_a_peak_is_of_the_work_alone() -> None:
    before = resident()
    large = peak_of(lambda: torch.ones(64 * MIB)) - before
    small = peak_of(lambda: torch.ones(8 * MIB)) - before
    # The kernel counts resident pages in batches.
    assert 250 * MIB <= large < 320 * MIB
    assert 26 * MIB <= small < 96 * MIB


def test_a_copy_moves_some_gigabytes_a_second() -> None:
    assert 1e8 < copy_rate() < 1e13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_noted_forward_and_backward(dtype: torch.dtype) -> None:
    """[8, 16] times [16, 4]: one product forward, two backward; the sums and the exponential are none."""
    left = torch.randn(8, 16, dtype=dtype, requires_grad=True)
    right = torch.randn(16, 4, dtype=dtype, requires_grad=True)
    products = Products()
    with products:
        (left @ right).exp().sum().backward()
    assert len(products) == 3
    assert products.flops == 3 * 2 * 8 * 16 * 4


def test_products_are_executed_again_as_they_were() -> None:
    """A part of a buffer, a transposed factor, an output that is given, and a sum that is added to."""
    buffer, weight, total = torch.randn(8, 64), torch.randn(32, 16), torch.zeros(8, 16)

    def work() -> None:
        torch.mm(torch.ones(8, 16), weight.t(), out=buffer[:, 16:48])
        total.addmm_(buffer[:, 16:48], weight)

    noting, again = Products(), Products()
    with noting:
        work()
    with again:
        noting()
    assert [(p.function, [_layout(x) for x in p.args]) for p in again._noted] == [
        (p.function, [_layout(x) for x in p.args]) for p in noting._noted
    ]
    assert again.flops == noting.flops == 2 * (2 * 8 * 16 * 32)


def _layout(view: object) -> tuple[object, ...]:
    return (view.size, view.stride, view.offset, view.key[1])  # type: ignore[attr-defined]


def test_executing_them_again_changes_no_operand() -> None:
    total = torch.zeros(4, 4)
    products = Products()
    with products:
        total.addmm_(torch.ones(4, 4), torch.ones(4, 4))
    products()
    assert bool((total == 4).all())
