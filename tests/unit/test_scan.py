"""The scan against its definition in a loop: values, gradients, precision at length, speed, and edges."""

import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.ops.scan import Init, decayed_sum, exponential_average

INITS: tuple[Init, ...] = ("one", "first")
LENGTHS = [1, 7, 0, 2, 16, 5, 33]
BETAS = [0.01, 0.1, 0.5, 0.9, 0.99]


def ids_of(lengths: list[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))


def weights_of(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (0.3 * torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)).exp().to(dtype)


def by_definition(weights: Tensor, ids: Tensor, beta: float, init: Init) -> Tensor:
    """In float64, one token after the other."""
    averages: list[float] = []
    before = None
    for weight, sequence in zip(weights.tolist(), ids.tolist()):
        if sequence != before:
            average = 1.0 if init == "one" else weight
        average = beta * weight + (1 - beta) * average
        averages.append(average)
        before = sequence
    return torch.tensor(averages, dtype=torch.float64)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float(((got.double() - expected) / expected).abs().max())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("beta", BETAS)
def test_packed_sequences_equal_the_definition(init: Init, beta: float) -> None:
    ids = ids_of(LENGTHS)
    weights = weights_of(len(ids))
    got = exponential_average(weights, ids, beta=beta, init=init)
    assert relative_error(got, by_definition(weights, ids, beta, init)) < 1e-14


def test_by_hand() -> None:
    weights, ids = torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([4, 4, 4, 9])
    assert exponential_average(weights, ids, beta=0.5).tolist() == [2, 1.5, 1.75, 3]
    assert exponential_average(weights, ids, beta=0.5, init="first").tolist() == [3, 2, 2, 5]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("beta", BETAS)
def test_float32_over_a_long_sequence(init: Init, beta: float) -> None:
    ids = torch.zeros(32768, dtype=torch.int64)
    weights = weights_of(32768, torch.float32)
    got = exponential_average(weights, ids, beta=beta, init=init)
    assert got.dtype == torch.float32
    assert relative_error(got, by_definition(weights, ids, beta, init)) < 1e-6


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from(INITS), st.floats(0.01, 1))
@settings(deadline=None, max_examples=50)
def test_packing_does_not_matter(lengths: list[int], init: Init, beta: float) -> None:
    ids = ids_of(lengths)
    weights = weights_of(len(ids))
    packed = exponential_average(weights, ids, beta=beta, init=init)
    for got, alone in zip(packed.split(lengths), weights.split(lengths)):
        expected = exponential_average(alone, torch.zeros(len(alone), dtype=torch.int64), beta=beta, init=init)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


def test_beta_one_changes_no_bit() -> None:
    ids = ids_of(LENGTHS)
    for init in INITS:
        leaf = weights_of(len(ids), torch.float32).requires_grad_()
        got = exponential_average(leaf, ids, beta=1.0, init=init)
        slope = weights_of(len(ids) + 1, torch.float32)[1:]
        got.backward(slope)
        assert got is leaf
        assert leaf.grad is not None and torch.equal(leaf.grad, slope)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("beta", [0.1, 0.9, 1.0])
def test_gradcheck(init: Init, beta: float) -> None:
    ids = ids_of([1, 5, 0, 3])
    leaf = weights_of(len(ids)).requires_grad_()

    def average(weights: Tensor) -> Tensor:
        return exponential_average(weights, ids, beta=beta, init=init)

    assert torch.autograd.gradcheck(average, leaf)
    assert torch.autograd.gradgradcheck(lambda weights: average(weights).square(), leaf)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_the_reverse_scan(init: Init, dtype: torch.dtype) -> None:
    """G_t = g_t + (1 - beta) G_{t+1} in a loop, and beta G_t, or G_1, for the weight."""
    beta, lengths = 0.3, LENGTHS
    ids = ids_of(lengths)
    leaf, slope = weights_of(len(ids), dtype).requires_grad_(), weights_of(len(ids) + 1)[1:]
    exponential_average(leaf, ids, beta=beta, init=init).backward(slope.to(dtype))
    expected = []
    for part in slope.split(lengths):
        adjoint, row = 0.0, []
        for value in reversed(part.tolist()):
            adjoint = value + (1 - beta) * adjoint
            row.append(beta * adjoint)
        if init == "first" and row:
            row[-1] = adjoint
        expected += row[::-1]
    assert leaf.grad is not None
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert relative_error(leaf.grad, torch.tensor(expected, dtype=torch.float64)) < tolerance


def test_reverse_is_the_transpose() -> None:
    ids = ids_of(LENGTHS)
    x, y = weights_of(len(ids)), weights_of(len(ids) + 1)[1:]
    forward, backward = decayed_sum(x, ids, 0.7), decayed_sum(y, ids, 0.7, reverse=True)
    torch.testing.assert_close(forward @ y, x @ backward, rtol=1e-14, atol=0)
    turned = decayed_sum(y.flip(0), ids.max() - ids.flip(0), 0.7)
    torch.testing.assert_close(backward.flip(0), turned, rtol=1e-14, atol=0)


def test_no_decay_and_no_tokens() -> None:
    ids = ids_of(LENGTHS)
    x = weights_of(len(ids))
    assert torch.equal(decayed_sum(x, ids, 0.0), x)
    empty = torch.zeros(0, requires_grad=True)
    result = exponential_average(empty, ids_of([0, 0]), beta=0.5)
    result.sum().backward()
    assert result.shape == (0,) and empty.grad is not None


def test_a_nan_stays_in_its_sequence() -> None:
    ids = ids_of([8, 8, 8])
    weights = weights_of(24)
    weights[12] = torch.nan
    leaf = weights.requires_grad_()
    average = exponential_average(leaf, ids, beta=0.5)
    assert average.isnan().nonzero().flatten().tolist() == [12, 13, 14, 15]
    (grad,) = torch.autograd.grad(average, leaf, weights.detach())
    assert grad.isnan().nonzero().flatten().tolist() == [8, 9, 10, 11, 12]


def test_weights_at_their_bounds() -> None:
    """e^20 and e^-20 in turns, and a sequence at e^-20 throughout, which must not drown in its w'_0 = 1."""
    signs = torch.tensor([20.0, -20.0]).repeat(64)
    weights = torch.cat([signs, torch.full((128,), -20.0)]).exp()
    ids = ids_of([128, 128])
    for beta in BETAS:
        got = exponential_average(weights, ids, beta=beta)
        assert relative_error(got, by_definition(weights, ids, beta, "one")) < 1e-6


def test_sequences_in_pieces_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="in one piece"):
        exponential_average(torch.ones(3), torch.tensor([0, 1, 0]), beta=0.5)


def test_at_least_fifty_times_faster_than_a_loop() -> None:
    """Several hundred times on one idle core, of CPU time."""
    weights, ids = weights_of(32768, torch.float32), torch.zeros(32768, dtype=torch.int64)

    def loop() -> None:
        average, averages = torch.ones(()), []
        for weight in weights:
            average = 0.9 * weight + 0.1 * average
            averages.append(average)
        torch.stack(averages)

    def scan() -> None:
        exponential_average(weights, ids, beta=0.9)

    scan()
    slow, fast = cpu_seconds(loop), min(cpu_seconds(scan) for _ in range(10))
    assert slow > 50 * fast, (slow, fast)


def cpu_seconds(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
