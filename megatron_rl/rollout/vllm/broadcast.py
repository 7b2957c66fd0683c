"""Weights from the trainer's first rank straight into the workers of servers: by NCCL between GPUs, by gloo on CPUs.

A store beside the process group tells the name, precision and shape of each tensor before it comes.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SENDER = 0


def open_store(host: str, seconds: float) -> dist.TCPStore:
    """On a free port of this host."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def reach_store(host: str, port: int, seconds: float) -> dist.TCPStore:
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))


def join(store: dist.Store, rank: int, size: int, device: torch.device, seconds: float) -> Any:
    """The process group of sender and receivers; waits for all of them."""
    names = dist.PrefixStore("group", store)
    if device.type == "cpu":
        return dist.ProcessGroupGloo(names, rank, size, timedelta(seconds=seconds))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=seconds)
    return dist.ProcessGroupNCCL(names, rank, size, options)


def send(weights: Iterable[tuple[str, Tensor]], store: dist.Store, group: Any) -> int:
    """Every tensor to every receiver; the bytes of one copy."""
    number = sent = 0
    for name, tensor in weights:
        header = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        store.set(str(number), json.dumps(header))
        group.broadcast(tensor.contiguous(), SENDER).wait()
        number, sent = number + 1, sent + tensor.nbytes
    store.set(str(number), "null")
    return sent


def receive(store: dist.Store, group: Any, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    number = 0
    while (header := json.loads(store.get(str(number)))) is not None:
        name, dtype, shape = header
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        group.broadcast(tensor, SENDER).wait()
        yield name, tensor
        number += 1
