"""Weights for a model that starts from nothing, the same under every layout: a tensor is drawn by its name."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.models.hf_config import load_config, tensor_shapes
from megatron_rl.models.hf_map import SCALAR_HEAD, Reader


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
        return self.std * _normal(name, shape, self.seed)


class WithScalarHead:
    """A `Reader` of a language model's tensors that has a scalar head too."""

    def __init__(self, source: Reader, seed: int) -> None:
        self.source, self.seed = source, seed

    def shape(self, name: str) -> tuple[int, ...]:
        return (1, self.source.shape("model.norm.weight")[0]) if name in SCALAR_HEAD.hf else self.source.shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in SCALAR_HEAD.hf:
            return scalar_head(self.shape(name)[1], self.seed)
        return self.source.rows(name, start, stop)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.columns(name, start, stop)


def scalar_head(hidden_size: int, seed: int) -> Tensor:
    """[1, hidden] from N(0, 1 / (hidden + 1)^2): values start out near zero, and not all alike."""
    return _normal(SCALAR_HEAD.hf[0], (1, hidden_size), seed) / (hidden_size + 1)


def _normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))
