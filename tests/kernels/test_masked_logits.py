"""Logits of -inf, up to whole blocks and rows of them, in the kernels and in bfloat16."""

from typing import Any

import pytest
import torch
from torch import Tensor

N, V = 4, 150
NEVER = -torch.inf


@pytest.fixture
def logits() -> Tensor:
    """float64, exact in bfloat16; nothing but -inf in the last row."""
    values = torch.randint(-40, 41, (N, V), generator=torch.Generator().manual_seed(0)).double() / 8
    values[0, 64:128] = NEVER  # a whole block
    values[1, :64] = NEVER  # the first one
    values[2, ::2] = NEVER
    values[3] = NEVER
    return values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows(device: torch.device, dtype: torch.dtype, logits: Tensor) -> None:
    from megatron_rl.ops.triton.rows import row_statistics

    wide = torch.promote_types(dtype, torch.float32)
    values = logits.to(device, dtype)
    labels, ids = torch.tensor([3, 70, 8, 9]), torch.tensor([[1, 70, -1], [0, V, 140], [2, 3, 5], [0, 1, 2]])
    rows = torch.empty(N, 5, dtype=wide, device=device)
    listed = torch.empty(N, 3, dtype=wide, device=device)
    arguments: dict[str, Any] = {"scale": 0.5, "entropy": True}
    row_statistics(values, labels.to(device), rows, ids.to(device), listed, **arguments)
    assert torch.equal(values.cpu(), logits.to(dtype)), "listed logits are put back"

    inside = (ids >= 0) & (ids < V)
    torch.testing.assert_close(
        listed.cpu().double(), logits.gather(1, ids.clamp(0, V - 1)).where(inside, 0), rtol=0, atol=0
    )
    scaled = logits * 0.5
    top = scaled.amax(1).clamp(min=torch.finfo(wide).min)
    shifted = (scaled - top[:, None]).clamp(min=-1e4)
    exp = shifted.exp()
    others = torch.cat([exp, exp.new_zeros(N, 1)], 1).scatter(1, ids.where(inside, V), 0)[:, :V]
    expected = [top, others.sum(1), scaled.gather(1, labels[:, None])[:, 0], (shifted * exp).sum(1), exp.sum(1)]
    torch.testing.assert_close(rows.cpu().double(), torch.stack(expected, 1), rtol=1e-6, atol=1e-6)
    assert rows[3, 1:].tolist() == [0, NEVER, 0, 0]


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients(device: torch.device, dtype: torch.dtype, entropy: bool, logits: Tensor) -> None:
    from megatron_rl.ops.triton.dlogits import dlogits_

    wide = torch.promote_types(dtype, torch.float32)
    top, offset, slope, grad_logp = torch.tensor(
        [[2.5, 2, 2.5, 0], [0.5, -0.25, 1, 2], [0.5, 1, 0.125, 1], [3, -4, 5, 0]], dtype=torch.float64
    )
    labels, ids = torch.tensor([3, 70, 8, V]), torch.tensor([[1, 3], [V, 70], [-1, 5], [0, 1]])
    listed = torch.arange(2.0 * N, dtype=torch.float64).view(N, 2)
    numbers = {"top": top, "offset": offset, "slope": slope, "grad_logp": grad_logp, "listed": listed}
    arguments: dict[str, Any] = {name: x.to(device, wide) for name, x in numbers.items()}
    arguments |= {"slope": arguments["slope"] if entropy else None, "ids": ids.to(device), "labels": labels.to(device)}
    grad = dlogits_(logits.to(device, dtype, copy=True), scale=0.5, **arguments).cpu()

    shifted = (logits * 0.5 - top[:, None]).clamp(min=-1e4)
    expected = shifted.exp() * (offset[:, None] - (slope[:, None] * shifted if entropy else 0))
    for row in range(N):
        for place, value in zip(ids[row].tolist(), listed[row].tolist()):
            if 0 <= place < V:
                expected[row, place] = value
        if labels[row] < V:
            expected[row, labels[row]] += grad_logp[row]
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(grad.double(), expected, rtol=rounding, atol=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_divergence(device: torch.device, alpha: float, logits: Tensor) -> None:
    """Where neither head can go there is no divergence, no gradient, and no nan."""
    from megatron_rl.ops.triton.divergence import Logits, add_sums_, slope_

    values = logits[:3].to(device)
    total = values.logsumexp(1)
    head = Logits(values, 1.0, total)
    sums = torch.zeros(3, 2, dtype=torch.float64, device=device)
    add_sums_(sums, head, head, alpha)
    torch.testing.assert_close(sums[:, 0], torch.zeros_like(total), rtol=0, atol=1e-14)
    ones, labels = torch.ones_like(total), torch.full((3,), -1, dtype=torch.int64, device=device)
    student = Logits(values.clone(), 1.0, total)
    grad = slope_(student, head, alpha, sums[:, 1].contiguous(), ones, labels, ones, 0 * ones, 0 * ones)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-14)
