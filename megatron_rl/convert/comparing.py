"""Two models or checkpoints against each other: `convert diff`, and `verify` by checksums."""

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.checkpoint.scratch import room
from megatron_rl.checkpoint.torch_dist import Spec, as_bytes
from megatron_rl.convert.jobs import THREADS
from megatron_rl.convert.rows import blocks
from megatron_rl.convert.tensors import Tensors
from megatron_rl.metrics.bar import counting
from megatron_rl.types import RunError

BLOCK = 2**22


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
    spec, stack = tensors.specs[name], _stack_of(name, tensors)
    rest = Spec(dtype or spec.dtype, spec.shape[len(stack) :])
    for index in itertools.product(*map(range, stack)):
        for start, stop in blocks(rest.shape[0], rest.row_bytes, BLOCK):
            block = room(str(id(tensors)), (stop - start, *rest.shape[1:]), rest.dtype)
            tensors.read(name, index, start, stop, block)
            yield block


def checksum(tensors: Tensors, name: str, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of the bytes of a tensor, in a type of its own or the one asked for."""
    digest = hashlib.sha256()
    for block in rows(tensors, name, dtype):
        digest.update(as_bytes(block))
    return digest.hexdigest()


def checksums(source: Tensors, result: Tensors, on_bytes: Callable[[int], object]) -> tuple[dict[str, str], list[str]]:
    """SHA-256 of every tensor of the result; and a sentence for each that is not the source's in the same type."""
    both = sorted(source.specs.keys() & result.specs.keys())
    faults = [f"{name} is only in the first" for name in sorted(source.specs.keys() - result.specs.keys())]
    faults += [f"{name} is only in the second" for name in sorted(result.specs.keys() - source.specs.keys())]

    def look(name: str) -> tuple[str, bool]:
        held = checksum(result, name)
        same = checksum(source, name, result.specs[name].dtype) == held
        on_bytes(result.specs[name].nbytes)
        return held, same

    with ThreadPoolExecutor(THREADS) as threads:
        found = dict(zip(both, threads.map(look, both), strict=True))
    faults += [f"{name} has another SHA-256" for name, (_, same) in found.items() if not same]
    return {name: held for name, (held, _) in found.items()}, faults


def verified(source: Tensors, result: Tensors, left_out: Collection[str]) -> dict[str, str]:
    """SHA-256 of every tensor of the result, which are the source's; RunError where they are not."""
    with counting("verifying", sum(spec.nbytes for spec in result.specs.values())) as on_bytes:
        found, faults = checksums(source, result, on_bytes)
    faults = [fault for fault in faults if fault.split()[0] not in left_out]
    if faults:
        raise RunError(f"the result is not the source, and is not put in place: {'; '.join(faults[:3])}")
    return found


def _largest(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; infinite where only one is NaN, or they are infinite apart."""
    a, b = one.double(), other.double()
    apart = (a - b).abs()
    apart[(a == b) | (a.isnan() & b.isnan())] = 0.0
    return float(apart.nan_to_num(nan=float("inf"), posinf=float("inf")).max()) if apart.numel() else 0.0


def _stack_of(name: str, tensors: Tensors) -> tuple[int, ...]:
    """The dimensions before one layer's tensor: a checkpoint stacks layers and experts."""
    dimensions = (".decoder.layers." in name) + (".experts.experts." in name)
    return tensors.specs[name].shape[:dimensions]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
