"""What megatron-core's distributed optimizer holds: each rank's shards of master weights and Adam's moments.

megatron-core can save them itself, by way of several copies of the whole on every rank; here a rank's tensors are saved
as they lie, and gathered only where data-parallel ranks share them.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

import megatron_rl.parallel.device  # noqa: F401  (installs the CPU backend before megatron-core)

# isort: split
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

MASTER, MOMENTS = "param", ("exp_avg", "exp_avg_sq")


class Shard(NamedTuple):
    """Elements `start` to `stop` of a flattened parameter: their float32 master weights and moments on this rank."""

    parameter: Parameter
    start: int
    stop: int
    tensors: dict[str, Tensor]


def shards(optimizer: Any) -> Iterator[Shard]:
    """This rank's shards, in the order of the gradient buffers. Moments are made if there are none yet."""
    for part in optimizer.chained_optimizers:
        for _, ranges in _buckets(part):
            yield from _shards(part, ranges)


def sharded_state(optimizer: Any, weights: dict[str, Any], group: dist.ProcessGroup, *, loading: bool) -> dict:
    """Moments (and master weights, where the weights are not float32) beside the sharded `weights`. Collective."""
    extracted, _ = extract_sharded_tensors_and_factories(weights)
    places = {place.data: place for place in nested_values(extracted)}
    state: dict[int, Any] = {}
    for number, part in enumerate(optimizer.chained_optimizers):
        state[number] = part.state_dict()
        state[number]["tensors"] = {
            index: {name: _beside(places[parameter], name, tensor) for name, tensor in tensors.items()}
            for index, (parameter, tensors) in enumerate(_wholes(part, group, loading=loading))
        }
    return state


def load_state(optimizer: Any, state: dict[int, Any], group: dist.ProcessGroup) -> None:
    """Takes back what `sharded_state` gave out, once it is loaded."""
    for number, part in enumerate(optimizer.chained_optimizers):
        loaded = state[number].pop("tensors")
        order = [parameter for parameter, _ in _wholes(part, group, loading=True)]
        held = {parameter: loaded[index] for index, parameter in enumerate(order)}
        part.load_state_dict(state[number])
        for _, ranges in _buckets(part):
            for parameter, start, stop, tensors in _shards(part, ranges):
                for name in _names(part):
                    tensors[name].copy_(held[parameter][name].view(-1)[start:stop])


def _buckets(part: Any) -> Iterator[tuple[Any, Any]]:
    """Each bucket of the gradient buffers, and which parameters' elements this rank holds of it."""
    part.init_state_fn(part.optimizer, part.config)
    for buffer, by_dtype in zip(part.buffers, part.gbuf_ranges, strict=True):
        (ranges,) = by_dtype.values()
        yield from zip(buffer.buckets, ranges, strict=True)


def _shards(part: Any, ranges: Any) -> Iterator[Shard]:
    for parameter, where in ranges["param_map"].items():
        tensors = part._get_main_param_and_optimizer_states(parameter)
        yield Shard(parameter, where["param"].start, where["param"].end, tensors)


def _names(part: Any) -> tuple[str, ...]:
    """A float32 master weight is the weight itself."""
    return (MASTER, *MOMENTS) if part.config.bf16 else MOMENTS


def _wholes(part: Any, group: dist.ProcessGroup, *, loading: bool) -> Iterator[tuple[Parameter, dict[str, Tensor]]]:
    """Each parameter with its tensors in the parameter's shape: what there is, or room for what is loaded."""
    names = _names(part)
    for bucket, ranges in _buckets(part):
        if group.size() == 1:
            for parameter, _, _, tensors in _shards(part, ranges):
                yield parameter, {name: tensors[name].view(parameter.shape) for name in names}
            continue
        gathered = {} if loading else {name: _gathered(part, bucket, ranges, name, group) for name in names}
        for parameter, (start, stop) in bucket.param_to_index.items():
            if loading:
                yield parameter, {name: torch.empty(parameter.shape) for name in names}
            else:
                yield parameter, {name: gathered[name][start:stop].view(parameter.shape) for name in names}


def _gathered(part: Any, bucket: Any, ranges: Any, name: str, group: dist.ProcessGroup) -> Tensor:
    """One kind of tensor of a whole bucket, on the CPU of every data-parallel rank."""
    whole = torch.zeros_like(bucket.grad_data, dtype=torch.float32)
    mine = whole.new_zeros(whole.numel() // group.size())
    for parameter, where in ranges["param_map"].items():
        held = part._get_main_param_and_optimizer_states(parameter)[name]
        mine[where["gbuf_local"].start : where["gbuf_local"].end] = held
    dist.all_gather_into_tensor(whole, mine, group=group)
    return whole.cpu()


def _beside(place: Any, name: str, tensor: Tensor) -> Any:
    """The tensor, sharded as the weight that it belongs to."""
    fields = {"key": f"optimizer.{name}.{place.key}", "data": tensor}
    return replace(place, **fields, **({"dtype": tensor.dtype} if hasattr(place, "dtype") else {}))
