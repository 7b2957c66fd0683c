"""The average of model weights: schedule, values, and what it needs to move."""

import statistics
import time

import pytest
import torch

from megatron_rl.ops.ema import decay, ema_update_


def test_schedule_by_hand() -> None:
    """Closed form: 1 - (1 + n)^(-2/3) is 0.99 at n = 999, 0.9999 at a million; copies before."""
    assert [decay(n) for n in (0, 1)] == [0.0, 0.0]
    assert decay(2) == pytest.approx(1 - 2 ** (-2 / 3))
    assert decay(1000) == pytest.approx(0.99)
    assert decay(10**7) == 0.9999
    assert decay(32, power=0.75, inv_gamma=10) == pytest.approx(1 - 4.1**-0.75)


def test_schedule_begins_with_copies() -> None:
    """Also where there is a least decay; then it grows without a step back."""
    values = [decay(n, min_value=0.5, max_value=0.95, update_after=10) for n in range(200)]
    assert values[:12] == [0.0] * 12 and values[12] == 0.5 and values[-1] == 0.95
    assert values == sorted(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update(dtype: torch.dtype) -> None:
    averages = [torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([[4.0]], dtype=dtype), torch.empty(0, dtype=dtype)]
    weights = [torch.tensor([3.0, 2.0], dtype=dtype), torch.tensor([[0.0]], dtype=dtype), torch.empty(0, dtype=dtype)]
    places = [x.data_ptr() for x in averages]
    ema_update_(averages, weights, 0.75)
    assert averages[0].tolist() == [1.5, 2.0] and averages[1].item() == 3.0
    assert [x.data_ptr() for x in averages] == places
    ema_update_(averages, weights, 1.0)
    assert averages[0].tolist() == [1.5, 2.0]
    ema_update_(averages, weights, 0.0)
    assert all(torch.equal(a, w) for a, w in zip(averages, weights))
    ema_update_([], [], 0.5)


def test_shards_are_parts_of_the_whole() -> None:
    whole, weights = torch.randn(1000), torch.randn(1000)
    parts = [x.clone() for x in whole.split([300, 1, 699])]
    ema_update_(parts, weights.split([300, 1, 699]), 0.9)
    ema_update_([whole], [weights], 0.9)
    assert torch.equal(torch.cat(parts), whole)


def test_many_updates_are_the_closed_form() -> None:
    """After n updates to a constant the gap is d^n of the first, also where one step is 1e-5 of the weight."""
    average, weight = torch.full((8,), 1.0), torch.full((8,), 1.001)
    for _ in range(300):
        ema_update_([average], [weight], 0.99)
    gap = (weight - average) / 0.001
    assert gap.tolist() == pytest.approx([0.99**300] * 8, rel=0.02)


def test_copies_are_the_averages_rounded() -> None:
    average, copy = torch.linspace(-1, 1, 100), torch.zeros(100, dtype=torch.bfloat16)
    ema_update_([average], [torch.ones(100)], 0.9, copies=[copy])
    torch.testing.assert_close(average, torch.linspace(-1, 1, 100) * 0.9 + 0.1)
    assert torch.equal(copy, average.bfloat16())


def test_low_precision_is_refused() -> None:
    for left, right in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)):
        with pytest.raises(AssertionError):
            ema_update_([torch.ones(2, dtype=left)], [torch.ones(2, dtype=right)], 0.9)


@pytest.mark.full
def test_cost_is_that_of_a_copy() -> None:
    averages, weights = ([torch.randn(1 << 20) for _ in range(32)] for _ in range(2))

    def seconds(update: object) -> float:
        start = time.process_time()
        update()  # type: ignore[operator]
        return time.process_time() - start

    ratios = []
    for _ in range(11):
        copy = seconds(lambda: torch._foreach_copy_(averages, weights))
        ratios.append(seconds(lambda: ema_update_(averages, weights, 0.99)) / copy)
    assert statistics.median(ratios) < 1.3
