"""Which device this process computes on. Import this before megatron-core: it installs the CPU backend."""

import os
import random

import numpy as np
import torch

from megatron_rl.parallel import cpu_backend

ON_CPU = cpu_backend.install()


def device() -> torch.device:
    """The CPU, or this process's GPU (torchrun's LOCAL_RANK)."""
    if ON_CPU:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def backend() -> str:
    """gloo on the CPU. On CUDA NCCL carries tensors and gloo carries Python objects."""
    return "gloo" if ON_CPU else "cpu:gloo,cuda:nccl"


def describe() -> str:
    """One line for the log."""
    return f"CPU, {torch.get_num_threads()} thread(s) per process" if ON_CPU else torch.cuda.get_device_name(device())


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch. Megatron's own tracker is seeded by the mesh."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
