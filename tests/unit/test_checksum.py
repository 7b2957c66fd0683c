"""The checksum of a tensor: what changes it, and what does not."""

import pytest
import torch

from megatron_rl.rollout import checksum as module
from megatron_rl.rollout.checksum import checksum

MASK = (1 << 64) - 1


def definition(tensor: torch.Tensor) -> int:
    """sum_i w_i b_i in Python's own integers."""
    total = 0
    for i, bits in enumerate(tensor.flatten().view(torch.int32).tolist()):
        place = i * 0x9E3779B97F4A7C15 & MASK
        signed = place - (1 << 64) if place >> 63 else place
        total += bits * ((signed ^ (signed >> 31)) | 1)
    total &= MASK
    return total - (1 << 64) if total >> 63 else total


def test_it_is_its_definition_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    expected = definition(tensor)
    assert checksum(tensor) == expected
    monkeypatch.setattr(module, "CHUNK", 10)
    assert checksum(tensor) == expected
    assert checksum(tensor.T.contiguous().T) == expected  # the same values, stored another way


def test_every_change_is_seen() -> None:
    generator = torch.Generator().manual_seed(2)
    tensor = torch.randn(64, 32, generator=generator)
    rows = torch.arange(64)
    changed = {
        "one bit": torch.where(torch.arange(2048).view(64, 32) == 1000, tensor.nextafter(tensor + 1), tensor),
        "two rows": tensor[torch.where(rows == 3, 9, torch.where(rows == 9, 3, rows))],
        "neighbours": tensor[rows ^ 1],
        "shifted": tensor.roll(1, 0),
        "transposed": tensor.T.reshape(64, 32),
        "rounded": tensor.bfloat16().float(),
        "negated": -tensor,
        "dropped": torch.zeros_like(tensor),
    }
    sums = {name: checksum(value) for name, value in changed.items()}
    assert len({checksum(tensor), *sums.values()}) == len(changed) + 1


def test_blocks_that_change_places_do_not_cancel() -> None:
    """Under weights linear in the place these four would: the second pair moves back what the first moved ahead."""
    a, b = torch.full((4,), 1.0), torch.full((4,), 2.0)
    assert checksum(torch.cat([a, b, b, a])) != checksum(torch.cat([b, a, a, b]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone()) != checksum(tensor.flip(0))
