"""Weights for a model that starts from nothing, the same under every layout: a tensor is drawn by its name."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.models.hf_config import load_config, tensor_shapes


class RandomWeights:
    """A `Reader` of tensors that exist nowhere: norms are one, biases zero, the rest N(0, initializer_range^2).

    Whole tensors are drawn, whatever slice is asked for, so that the layout does not show.
    """

    def __init__(self, path: str | Path, seed: int) -> None:
        self.seed = seed
        self.shapes = tensor_shapes(path)
        self.std = float(load_config(path).initializer_range)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensor(name)[start:stop]

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensor(name)[:, start:stop]

    def _tensor(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        key = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "big") >> 1
        return self.std * torch.randn(shape, generator=torch.Generator().manual_seed(key))
