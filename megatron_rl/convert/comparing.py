"""Two models or checkpoints against each other: `convert diff`, and `verify` by checksums."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.checkpoint.torch_dist import Spec, as_bytes
from megatron_rl.convert.opening import stack_of
from megatron_rl.convert.rows import blocks
from megatron_rl.convert.tensors import Tensors

BLOCK = 2**24


class Difference(NamedTuple):
    """What is not the same. `largest` is the largest absolute difference, where the shapes agree and values differ."""

    name: str
    what: str
    largest: float | None = None


def differences(one: Tensors, other: Tensors, on_bytes: Callable[[int], object]) -> Iterator[Difference]:
    """All that differs, by name. Values are compared in float64; NaN equals NaN."""
    for name in sorted(one.specs.keys() | other.specs.keys()):
        if name not in other.specs or name not in one.specs:
            yield Difference(name, f"only in the {'first' if name in one.specs else 'second'}")
            continue
        mine, its = one.specs[name], other.specs[name]
        if mine.shape != its.shape:
            yield Difference(name, f"shape {list(mine.shape)} and {list(its.shape)}")
        else:
            if mine.dtype != its.dtype:
                yield Difference(name, f"dtype {_name(mine.dtype)} and {_name(its.dtype)}")
            largest = max((_largest(a, b) for a, b in zip(rows(one, name), rows(other, name))), default=0.0)
            if largest > 0:
                yield Difference(name, f"values differ by at most {largest:.6g}", largest)
        on_bytes(mine.nbytes)


def rows(tensors: Tensors, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """The tensor in blocks of rows, from its beginning to its end."""
    spec, stack = tensors.specs[name], stack_of(name, tensors)
    rest = Spec(dtype or spec.dtype, spec.shape[len(stack) :])
    for index in itertools.product(*map(range, stack)):
        for start, stop in blocks(rest.shape[0], rest.row_bytes, BLOCK):
            block = torch.empty((stop - start, *rest.shape[1:]), dtype=rest.dtype)
            tensors.read(name, index, start, stop, block)
            yield block


def checksum(tensors: Tensors, name: str, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of the bytes of a tensor, in a type of its own or the one asked for."""
    digest = hashlib.sha256()
    for block in rows(tensors, name, dtype):
        digest.update(as_bytes(block))
    return digest.hexdigest()


def unequal(source: Tensors, result: Tensors, on_bytes: Callable[[int], object]) -> Iterator[str]:
    """Tensors whose bytes are not the source's, brought to the result's type; and those that only one has."""
    for name in sorted(source.specs.keys() | result.specs.keys()):
        if name not in source.specs or name not in result.specs:
            yield f"{name} is only in the {'first' if name in source.specs else 'second'}"
            continue
        dtype = result.specs[name].dtype
        if checksum(source, name, dtype) != checksum(result, name):
            yield f"{name} has another checksum"
        on_bytes(result.specs[name].nbytes)


def _largest(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; infinite where only one is NaN, or they are infinite apart."""
    a, b = one.double(), other.double()
    apart = (a - b).abs()
    apart[(a == b) | (a.isnan() & b.isnan())] = 0.0
    return float(apart.nan_to_num(nan=float("inf"), posinf=float("inf")).max()) if apart.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
