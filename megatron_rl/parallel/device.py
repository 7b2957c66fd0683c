"""Which device this process computes on. Import this before megatron-core: it installs the CPU backend."""

import importlib.util
import os
import random

import numpy as np
import torch

from megatron_rl.parallel import cpu_backend
from megatron_rl.types import RunError


def check_transformer_engine() -> None:
    """RunError where a part of it is missing: importing megatron-core would end in a traceback about a file."""
    core, extension = (importlib.util.find_spec(f"transformer_engine{part}") is not None for part in ("", "_torch"))
    if core and not extension:
        raise RunError(
            "Transformer Engine is installed without its extension for torch (transformer_engine_torch), and "
            "megatron-core cannot be imported beside a part of it: build the extension, as docs/transformer_engine.md "
            "says, or uninstall transformer-engine"
        )


check_transformer_engine()
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
