"""Scans and means along packed sequences through the kernels, against the torch path."""

import pytest
import torch
from torch import Tensor

from megatron_rl.ops import dispatch
from megatron_rl.ops.scan import Init, decayed_sum, exponential_average
from megatron_rl.ops.segments import segment_mean

LENGTHS = [1, 7, 0, 2, 16, 5, 33]
N = sum(LENGTHS)
IDS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}


def draw(seed: int) -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("init", ["one", "first"])
@pytest.mark.parametrize("beta", [0.01, 0.9])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_exponential_average(
    device: torch.device, dtype: torch.dtype, beta: float, init: Init, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward_and_backward(kernels: str, place: torch.device, dtype: torch.dtype) -> list[Tensor]:
        monkeypatch.setenv(dispatch.VARIABLE, kernels)
        weights = draw(0).to(place, dtype).requires_grad_()
        averages = exponential_average(weights, IDS.to(place), beta=beta, init=init)
        (grad,) = torch.autograd.grad(averages, weights, draw(1).to(place, dtype))
        return [averages.detach().cpu().double(), grad.cpu().double()]

    results = forward_and_backward("triton", device, dtype)
    expected = forward_and_backward("torch", torch.device("cpu"), torch.float64)
    for result, value in zip(results, expected):
        torch.testing.assert_close(result, value, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_float32_over_a_long_sequence(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred tokens count here, and the decay's own rounding would be off by as many times its size."""
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    ids = torch.zeros(1000, dtype=torch.int64)
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    expected = exponential_average(weights.double(), ids, beta=0.01)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    result = exponential_average(weights.to(device), ids.to(device), beta=0.01).cpu()
    torch.testing.assert_close(result.double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_nan_stays_in_its_sequence(
    device: torch.device, decay: float, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = draw(0)
    values[9] = torch.nan
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    expected = decayed_sum(values, IDS, decay, reverse=reverse)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    result = decayed_sum(values.to(device), IDS.to(device), decay, reverse=reverse).cpu()
    others = (IDS[9] != IDS) & expected.isfinite()
    assert int(others.sum()) == N - 2
    torch.testing.assert_close(result[others], expected[others], rtol=1e-14, atol=1e-14)
    assert result[9].isnan()


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16])
def test_segment_mean(device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = draw(2) < 0.7
    mask[1:8] = False  # nothing of the second counts
    drawn = draw(0).to(dtype)
    drawn[~mask] = torch.nan

    def forward_and_backward(kernels: str, place: torch.device) -> list[Tensor]:
        monkeypatch.setenv(dispatch.VARIABLE, kernels)
        values = drawn.to(place).requires_grad_()
        means = segment_mean(values, mask.to(place), BOUNDS.to(place))
        (grad,) = torch.autograd.grad(means, values, torch.arange(1, 8, device=place).to(means.dtype))
        return [means.detach().cpu(), grad.cpu()]

    (means, grad), (expected, slopes) = (
        forward_and_backward("triton", device),
        forward_and_backward("torch", torch.device("cpu")),
    )
    torch.testing.assert_close(means, expected)
    torch.testing.assert_close(grad, slopes, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)
