"""The checksum of a tensor: what changes it, and what does not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_rl.rollout import checksum as module
from megatron_rl.rollout.checksum import checksum, sum_of_words

BLOCK = 10


def signed(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def odd_number(place: int) -> int:
    place = signed(place * 0x9E3779B97F4A7C15)
    return (place ^ (place >> 31)) | 1


def definition(tensor: torch.Tensor) -> int:
    """The double sum in Python's own integers."""
    total = 0
    data = tensor.flatten().view(torch.uint8).numpy().tobytes()
    data += bytes(-len(data) % 8)
    for i, bits in enumerate(np.frombuffer(data, np.int64).tolist()):
        total += odd_number(BLOCK + i // BLOCK) * odd_number(i % BLOCK) * bits
    return signed(total)


def gpu_sum(tensor: torch.Tensor) -> int:
    return sum_of_words(tensor.contiguous().flatten().view(torch.uint8))


def test_it_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", BLOCK)
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    assert gpu_sum(tensor) == definition(tensor)
    assert gpu_sum(tensor[:, :8].contiguous()) == definition(tensor[:, :8].contiguous())
    assert gpu_sum(tensor[3]) == definition(tensor[3].clone())  # begins and ends inside a word
    assert gpu_sum(tensor.T.contiguous().T) == definition(tensor)  # the same values, stored another way
    assert gpu_sum(tensor[:0]) == 0


@pytest.mark.parametrize("block", [50, module.BLOCK])
def test_every_change_is_seen(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
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
    for function in (checksum, gpu_sum):
        sums = {name: function(value) for name, value in changed.items()}
        assert len({function(tensor), *sums.values()}) == len(changed) + 1


@pytest.mark.parametrize("block", [2, module.BLOCK])
def test_blocks_that_change_places_do_not_cancel(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Under weights linear in the place these four would: the second pair moves back what the first moved ahead."""
    monkeypatch.setattr(module, "BLOCK", block)
    a, b = torch.full((4,), 1.0), torch.full((4,), 2.0)
    assert gpu_sum(torch.cat([a, b, b, a])) != gpu_sum(torch.cat([b, a, a, b]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("function", [checksum, gpu_sum])
def test_other_precisions(function: Callable[[torch.Tensor], int], dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert function(tensor) == function(tensor.clone()) != function(tensor.flip(0))
