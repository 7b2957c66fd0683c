"""The override chooses the path: an operator reaches the kernel that is planted in its way, or it does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_rl.ops import dispatch
from megatron_rl.ops.divergence import Head, full_divergence
from megatron_rl.ops.ema import ema_update_
from megatron_rl.ops.linear_stats import linear_stats
from megatron_rl.ops.scan import exponential_average
from megatron_rl.ops.segments import segment_mean
from megatron_rl.ops.vocab_shard import VocabShard

pytestmark = pytest.mark.interpreter

IDS = torch.tensor([0, 0, 1])
SHARD = VocabShard(0, 5)


def head() -> Head:
    return Head(torch.ones(3, 4, requires_grad=True), torch.eye(5, 4, requires_grad=True))


def statistics() -> torch.Tensor:
    student = head()
    return linear_stats(student.hidden, student.weight, IDS, shard=SHARD).logp.sum()


def divergence() -> torch.Tensor:
    return full_divergence(head(), head(), IDS, alpha=0.5, shard=SHARD).loss.sum()


def average() -> torch.Tensor:
    return exponential_average(torch.ones(3, requires_grad=True), IDS, beta=0.5).sum()


def mean() -> torch.Tensor:
    values = torch.ones(3, requires_grad=True)
    return segment_mean(values, IDS == 0, torch.tensor([0, 2, 3])).sum()


def update() -> torch.Tensor:
    ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)
    return torch.ones((), requires_grad=True)


class Reached(Exception):
    pass


def reached(*_: Any, **__: Any) -> None:
    raise Reached


@pytest.mark.parametrize(
    ("operator", "kernel", "at"),
    [
        (statistics, "rows.row_statistics", "forward"),
        (statistics, "dlogits.dlogits_", "backward"),
        (divergence, "rows.row_statistics", "forward"),
        (divergence, "divergence.add_sums_", "forward"),
        (divergence, "divergence.slope_", "backward"),
        (average, "scan.decayed_sum", "forward"),
        (mean, "segments.means", "forward"),
        (mean, "segments.spread", "backward"),
        (update, "average.ema_update_", "forward"),
    ],
)
def test_a_planted_kernel_is_reached_by_the_override_alone(
    operator: Callable[[], torch.Tensor], kernel: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"megatron_rl.ops.triton.{kernel}", reached)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    operator().backward()
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    operator().backward()
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    if at == "forward":
        with pytest.raises(Reached):
            operator()
    else:
        loss = operator()
        with pytest.raises(Reached):
            loss.backward()
