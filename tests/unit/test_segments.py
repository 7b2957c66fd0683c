"""Means over segments against a loop, with their gradients, and at the edges."""

import pytest
import torch

from megatron_rl.ops.segments import segment_mean

BOUNDS = torch.tensor([0, 3, 3, 4, 9])


def test_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 6.0, 5.0, 1.0, torch.nan, 3.0, torch.inf, 2.0])
    mask = torch.tensor([1, 1, 1, 0, 1, 0, 1, 0, 1], dtype=torch.bool)
    assert segment_mean(values, mask, BOUNDS).tolist() == [3, 0, 0, 2]


def test_gradient_by_hand() -> None:
    values = torch.ones(9, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    (grad,) = torch.autograd.grad(segment_mean(values, mask, BOUNDS), values, torch.tensor([2.0, 5.0, 3.0, 8.0]))
    assert grad.tolist() == [1, 1, 0, 0, 2, 2, 2, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_a_loop(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 100, 101, 500, 1000])
    values = torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(1000, generator=generator) < 0.5
    means = segment_mean(values, mask, bounds)
    expected = [values[a:b][mask[a:b]].double().sum() / max(int(mask[a:b].sum()), 1) for a, b in bounds.unfold(0, 2, 1)]
    assert means.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(means.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_gradients_by_differences() -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: segment_mean(x, mask, BOUNDS), values)
