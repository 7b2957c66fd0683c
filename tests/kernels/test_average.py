"""The update of averaged weights through the kernel, against the torch path."""

import pytest
import torch
from torch import Tensor

from megatron_rl.ops import dispatch
from megatron_rl.ops.ema import ema_update_

SIZES = [1, 64, 200, 0]


def tensors(seed: int, dtype: torch.dtype, device: torch.device, offset: int) -> list[Tensor]:
    """Parts of one buffer, which begins `offset` numbers after an address that is a multiple of 16."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(offset + sum(SIZES), generator=generator, dtype=torch.float64).to(device, dtype)
    return list(numbers[offset:].split(SIZES))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_update(device: torch.device, dtype: torch.dtype, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {}
    for kernels, place in (("triton", device), ("torch", torch.device("cpu"))):
        monkeypatch.setenv(dispatch.VARIABLE, kernels)
        averages, weights = (tensors(seed, dtype, place, offset=1) for seed in (0, 1))
        copies = tensors(2, torch.bfloat16, place, offset=1)
        ema_update_(averages, weights, decay, copies=copies)
        results[kernels] = [torch.cat(x).cpu() for x in (averages, weights, copies)]
    averages, weights, copies = results["triton"]
    expected, unchanged, rounded = results["torch"]
    torch.testing.assert_close(averages, expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(copies, rounded, rtol=2**-7, atol=0)
    assert torch.equal(weights, unchanged)
    if decay == 0:
        assert torch.equal(averages, weights)
    if decay == 1:
        assert torch.equal(averages, torch.cat(tensors(0, dtype, torch.device("cpu"), offset=1)))


def test_without_copies_and_by_wide_loads(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of their own start at multiples of 16."""
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    averages = [x.clone() for x in tensors(0, torch.float32, device, offset=0)]
    weights = [x.clone() for x in tensors(1, torch.float32, device, offset=0)]
    assert all(x.data_ptr() % 16 == 0 for x in averages + weights)
    expected = torch.cat([a.double() + 0.1 * (w.double() - a.double()) for a, w in zip(averages, weights)])
    ema_update_(averages, weights, 0.9)
    torch.testing.assert_close(torch.cat(averages).double(), expected, rtol=1e-6, atol=1e-7)


def test_tensors_in_pieces_are_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    average = torch.zeros(4, 4, device=device).t()
    with pytest.raises(AssertionError, match="in one piece"):
        ema_update_([average], [average.clone()], 0.9)
