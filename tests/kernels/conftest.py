"""Three modes: the interpreter, the compiler without a GPU, and a GPU.

Triton decides when it is imported whether kernels are interpreted, so the first has a process of its own. What a mode
needs and does not find skips its tests, with the reason.
"""

import importlib.util
import os

import pytest
import torch

from megatron_rl.ops.dispatch import INTERPRETER

# Small blocks, so that small inputs fill several of them and a part of one.
SMALL = {
    "rows.BLOCK": 64,
    "rows.LIST_BLOCK": 2,
    "dlogits.BLOCK": 16,
    "dlogits.LIST_BLOCK": 2,
    "divergence.BLOCK": 32,
    "average.BLOCK": 64,
    "scan.BLOCK": 16,
    "segments.BLOCK": 16,
}


def missing(mode: str) -> str | None:
    """What this process lacks for a mode."""
    interpreting = os.environ.get(INTERPRETER) == "1"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if mode == "interpreter":
        return None if interpreting else f"{INTERPRETER}=1 is not set"
    if interpreting:
        return f"{INTERPRETER}=1 is set"
    return "there is no GPU" if mode == "gpu" and not torch.cuda.is_available() else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mode in ("interpreter", "compiled", "gpu"):
        if item.get_closest_marker(mode) and (reason := missing(mode)):
            pytest.skip(reason)


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where kernels run: interpreted in small blocks, or on a GPU as they are."""
    if request.param == "cpu":
        for name, value in SMALL.items():
            monkeypatch.setattr(f"megatron_rl.ops.triton.{name}", value)
        monkeypatch.setattr("megatron_rl.ops.logit_stream.TOKENS", 3)
    return torch.device(request.param)
