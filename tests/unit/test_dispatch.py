"""Which implementation runs: by device, or as the environment says. No kernel runs here, and Triton is not needed."""

import subprocess
import sys

import pytest
import torch

from megatron_rl.ops.dispatch import INTERPRETER, VARIABLE, uses_triton

CPU = torch.empty(1)

# The operators, forward and backward, in a process that cannot import Triton.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from megatron_rl.ops.divergence import Head, full_divergence
from megatron_rl.ops.ema import ema_update_
from megatron_rl.ops.linear_stats import linear_stats
from megatron_rl.ops.scan import exponential_average
from megatron_rl.ops.segments import segment_mean
from megatron_rl.ops.vocab_shard import VocabShard

hidden, weight = torch.ones(3, 4, requires_grad=True), torch.eye(5, 4, requires_grad=True)
ids, shard = torch.tensor([0, 0, 1]), VocabShard(0, 5)
stats = linear_stats(hidden, weight, ids, shard=shard, k=2)
divergence = full_divergence(Head(hidden, weight), Head(hidden, weight), ids, alpha=0.5, shard=shard)
smooth = exponential_average(stats.logp, ids, beta=0.5)
mean = segment_mean(smooth, ids == 0, torch.tensor([0, 2, 3]))
(mean.sum() + stats.topk_logp.sum() + divergence.loss.sum()).backward()
ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5, copies=[torch.zeros(2)])
print(bool(hidden.grad.isfinite().all() and weight.grad.isfinite().all()))
"""


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not uses_triton(CPU)
    assert not uses_triton(torch.empty(1, device="meta"))


def test_the_environment_decides_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert not uses_triton(CPU)
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setenv(INTERPRETER, "1")
    assert uses_triton(CPU)


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.delenv(INTERPRETER, raising=False)
    with pytest.raises(ValueError, match=r"MEGATRON_RL_KERNELS=triton, but a tensor is on cpu.*set TRITON_INTERPRET=1"):
        uses_triton(CPU)
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match="MEGATRON_RL_KERNELS=cuda: it is torch or triton"):
        uses_triton(CPU)


def test_a_cpu_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, capture_output=True, text=True)
    assert done.stdout == "True\n"
