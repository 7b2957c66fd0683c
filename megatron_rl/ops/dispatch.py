"""Which implementation of an operator runs: torch's, which defines it, or Triton's kernels, which are made for GPUs.

The device of the tensors decides: Triton on CUDA, torch elsewhere. The environment variable MEGATRON_RL_KERNELS set to
`torch` or `triton` decides instead, for comparisons and against doubt. It is read at every call, so it must be the same
on all ranks.
"""

import os

from torch import Tensor

VARIABLE = "MEGATRON_RL_KERNELS"
INTERPRETER = "TRITON_INTERPRET"


def uses_triton(tensor: Tensor) -> bool:
    """Whether an operator on `tensor` runs through `ops/triton`."""
    choice = os.environ.get(VARIABLE)
    if choice is None:
        return tensor.is_cuda
    if choice not in ("torch", "triton"):
        raise ValueError(f"{VARIABLE}={choice}: it is torch or triton, or not set for a choice by device")
    if choice == "triton" and not tensor.is_cuda and os.environ.get(INTERPRETER) != "1":
        raise ValueError(
            f"{VARIABLE}=triton, but a tensor is on {tensor.device}, where the kernels run in Triton's interpreter"
            f" only: set {INTERPRETER}=1 before the process starts, or leave {VARIABLE} out"
        )
    return choice == "triton"
