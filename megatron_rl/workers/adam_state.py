"""What megatron-core's distributed optimizer holds: each rank's shards of master weights and Adam's moments.

megatron-core can save them itself, by way of several copies of the whole on every rank; here a rank's tensors are saved
as they lie, and gathered only where data-parallel ranks share them.
"""

from collections.abc import Callable, Iterator
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

ShardOf = Callable[[Parameter], Tensor]  # this rank's elements of a parameter that it holds some of, flat


class Shard(NamedTuple):
    """Elements `start` to `stop` of a flattened parameter: their float32 master weights and moments on this rank."""

    parameter: Parameter
    start: int
    stop: int
    tensors: dict[str, Tensor]


def shards(optimizer: Any) -> Iterator[Shard]:
    """This rank's shards, in the order of the gradient buffers. Moments are made if there are none yet."""
    for part in optimizer.chained_optimizers:
        yield from _shards(part)


def sharded_state(optimizer: Any, weights: dict[str, Any], *, loading: bool) -> dict:
    """Moments (and master weights, where the weights are not float32) beside the sharded `weights`. Collective."""
    state: dict[int, Any] = {}
    for number, part in enumerate(optimizer.chained_optimizers):
        state[number] = part.state_dict()
        state[number]["tensors"] = {
            name: beside(part, weights, f"optimizer.{name}.", _held(part, name), loading=loading)
            for name in _names(part)
        }
    return state


def load_state(optimizer: Any, state: dict[int, Any]) -> None:
    """Takes back what `sharded_state` gave out, once it is loaded."""
    for number, part in enumerate(optimizer.chained_optimizers):
        loaded = state[number].pop("tensors")
        part.load_state_dict(state[number])
        for name in _names(part):
            take(part, loaded[name], _held(part, name))


def wholes(part: Any, shard_of: ShardOf, *, loading: bool = False) -> Iterator[tuple[Parameter, Tensor]]:
    """Each parameter of a part of the optimizer with a tensor of its shape, which data-parallel ranks hold in shards.

    Gathered one by one; `loading`: room for what is read. Collective. Experts are a part of their own, and those ranks
    are the ones with the same experts.
    """
    shared = part.data_parallel_group.size() > 1
    for buffer, bucket in _buckets(part):
        for parameter in bucket.params_list:
            if not shared:
                yield parameter, shard_of(parameter).view(parameter.shape)
            elif loading:
                yield parameter, torch.empty(parameter.shape)
            else:
                yield parameter, _gathered(parameter, buffer, bucket, shard_of)


def complete(part: Any, flat_of: ShardOf) -> None:
    """Fills in, in a flat tensor of all elements of each parameter, those that other ranks hold. Collective.

    This rank's own are there, and all ranks' tensors have one dtype.
    """
    group = part.data_parallel_group
    for buffer, bucket in _buckets(part):
        for parameter in bucket.params_list:
            flat = flat_of(parameter)
            for rank, piece in _pieces(flat, parameter, buffer, bucket) if group.size() > 1 else ():
                dist.broadcast(piece, group=group, group_src=rank)


def beside(part: Any, weights: dict[str, Any], prefix: str, shard_of: ShardOf, *, loading: bool) -> dict[int, Any]:
    """The `wholes` as sharded tensors: placed as the sharded `weights`, and named after them. Collective."""
    extracted, _ = extract_sharded_tensors_and_factories(weights)
    places = {place.data: place for place in nested_values(extracted)}
    found = {}
    for index, (parameter, whole) in enumerate(wholes(part, shard_of, loading=loading)):
        tensor, place = whole if part.data_parallel_group.size() == 1 else whole.cpu(), places[parameter]
        fields = {"key": f"{prefix}{place.key}", "data": tensor}
        found[index] = replace(place, **fields, **({"dtype": tensor.dtype} if hasattr(place, "dtype") else {}))
    return found


def take(part: Any, loaded: dict[int, Tensor], shard_of: ShardOf) -> None:
    """This rank's shards of what `beside` gave out, once it is loaded."""
    order = (parameter for _, bucket in _buckets(part) for parameter in bucket.params_list)
    held = {parameter: loaded[index] for index, parameter in enumerate(order)}
    for parameter, start, stop, _ in _shards(part):
        shard_of(parameter).copy_(held[parameter].view(-1)[start:stop])


def _buckets(part: Any) -> Iterator[tuple[Any, Any]]:
    """Each bucket of a gradient buffer, which data-parallel ranks cut into equal shares, with its buffer."""
    part.init_state_fn(part.optimizer, part.config)
    for buffer in part.buffers:
        for bucket in buffer.buckets:
            yield buffer, bucket


def _shards(part: Any) -> Iterator[Shard]:
    part.init_state_fn(part.optimizer, part.config)
    for by_dtype in part.gbuf_ranges:
        (ranges,) = by_dtype.values()
        for held in ranges:
            for parameter, where in held["param_map"].items():
                tensors = part._get_main_param_and_optimizer_states(parameter)
                yield Shard(parameter, where["param"].start, where["param"].end, tensors)


def _names(part: Any) -> tuple[str, ...]:
    """A float32 master weight is the weight itself."""
    return (MASTER, *MOMENTS) if part.config.bf16 else MOMENTS


def _held(part: Any, name: str) -> ShardOf:
    return lambda parameter: part._get_main_param_and_optimizer_states(parameter)[name]


def _gathered(parameter: Parameter, buffer: Any, bucket: Any, shard_of: ShardOf) -> Tensor:
    """One kind of tensor of a parameter, on every data-parallel rank: each sends what lies in its share."""
    group = buffer.data_parallel_group
    whole = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
    for rank, piece in _pieces(whole, parameter, buffer, bucket):
        if rank == group.rank():
            piece.copy_(shard_of(parameter))
        dist.broadcast(piece, group=group, group_src=rank)
    return whole.view(parameter.shape)


def _pieces(flat: Tensor, parameter: Parameter, buffer: Any, bucket: Any) -> Iterator[tuple[int, Tensor]]:
    """(data-parallel rank, the elements that it holds) of a flat tensor of all elements of a parameter."""
    share = bucket.grad_data.numel() // buffer.data_parallel_group.size()
    # The bucket's own list of places leaves out the padding between parameters.
    start, stop = (place - bucket.offset for place in buffer.param_index_map[parameter][:2])
    for rank in range(start // share, (stop - 1) // share + 1):
        yield rank, flat[max(start, rank * share) - start : min(stop, (rank + 1) * share) - start]
